"""Two emulated boards beneath NVML's C library, in a short folder that other users may enter: what a real capd process is run on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pals.cli.emulate_nvml import environment
from pals.cli.shared_bank import shared_bank
from pals.hardware.nvml_double.build import library
from pals.plant.boards import BoardBank
from pals.plant.keeper import kept_fresh
from pals.plant.specs import parse_boards
from tests.leasing_client import Talk

ROOT = Path(__file__).parent.parent
BOARDS = "2xa100-sxm4-80gb"


@dataclass
class EmulatedNode:
    """The boards, and the files of a capd over them."""

    folder: Path
    bank: BoardBank
    environ: dict[str, str]

    def __post_init__(self) -> None:
        self.policy, self.socket, self.state = (self.folder / n for n in ("capd.toml", "capd.sock", "state"))
        self.policy.write_text("")
        self.found_w = self.limits_w()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self.folder / "notify"))
        self._notify.settimeout(20)
        self.environ = {**self.environ, "NOTIFY_SOCKET": str(self.folder / "notify")}
        self._started: list[subprocess.Popen[str]] = []

    def limits_w(self) -> tuple[float, ...]:
        """The limit of each board."""
        now_s = time.monotonic()
        return tuple(self.bank.reading(i, now_s).requested_limit_w for i in range(self.bank.count))

    def start(self, *command: str, **more: str) -> subprocess.Popen[str]:
        """Start a command that sees the boards."""
        environ = {**self.environ, **more}
        process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self._started.append(process)
        return process

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request to capd on a connection of its own."""
        with closing(Talk(str(self.socket))) as talk:
            return talk.ask(**request)

    def lower_all(self, socket: str) -> None:
        """Lease every board at 200 W, for a minute."""
        with closing(Talk(socket)) as talk:
            for board in talk.hello["boards"]:
                assert talk.lease(board["uuid"], 200.0, 1000, ttl_s=60.0)["outcome"] == "written"
        assert self.limits_w() == (200.0, 200.0)

    def told(self, word: str) -> None:
        """Wait until capd told its service manager so."""
        while word not in self._notify.recv(4096).decode():
            pass

    def close(self) -> None:
        """Let go of what is open, and end what still runs."""
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._notify.close()


def python(module: str, *options: str) -> Sequence[str]:
    """A command line that runs a module of this checkout."""
    return [sys.executable, "-m", module, *options]


@contextmanager
def boards_in(folder: Path) -> Iterator[tuple[BoardBank, Path]]:
    """The boards of a run directory, kept fresh, and their file; the folder is gone afterwards."""
    spec, count = parse_boards(BOARDS)
    with ExitStack() as exits:
        exits.callback(shutil.rmtree, folder, ignore_errors=True)
        path = exits.enter_context(shared_bank(folder, spec, count, (), seed=0, writable=True))
        exits.enter_context(kept_fresh(path))
        bank = BoardBank.open(path)
        exits.callback(bank.close)
        yield bank, path


@contextmanager
def emulated_node(cache: Path | None) -> Iterator[EmulatedNode]:
    """The boards at their default limits; nothing of it is left at the end.

    The library is built in `cache` where it is not yet; None: in the node's folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="capd-"))
    folder.chmod(0o755)
    with ExitStack() as exits:
        bank, path = exits.enter_context(boards_in(folder))
        outside = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        built = library(cache or folder, os.environ)
        made = EmulatedNode(folder, bank, {**outside, **environment(built, path, outside)})
        exits.callback(made.close)
        yield made


def until(true: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether it becomes true in time."""
    end_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.02)
    return True
