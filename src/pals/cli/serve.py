"""`pals serve`: real vLLM as a child process, PALS beside it; stops in order and leaves nothing behind."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pals.cli.agent import BANK_FILE, config_of, steer, stopping, wait_for_channel
from pals.cli.main import say
from pals.core.errors import ConfigError
from pals.engines.model_zoo import full_name, local_folder
from pals.engines.vllm_launcher import launch_vllm, stop, wait_ready
from pals.hardware.nvml import open_boards
from pals.plant.boards import BoardBank
from pals.plant.specs import parse_boards
from pals.runtime.agent import EXIT_ENGINE_GONE
from pals.runtime.channel import find_engines, process_alive, run_dir

READY_TIMEOUT_S = 900.0
DRAIN_TIMEOUT_S = 60.0
OWNER_FILE = "emulated-boards.owner"
_PARALLEL = ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What vLLM is asked to serve."""

    model: str
    served_names: tuple[str, ...]  # the first is what PALS calls it
    extra: list[str]
    environ: dict[str, str]


def serve(args: argparse.Namespace, rest: list[str]) -> int:
    """Serve until SIGINT or SIGTERM; 0 then, 3 when vLLM ended by itself."""
    config = config_of(args)
    rest = [a for a in rest if a != "--"]
    port = port_of(option(rest, "--port") or "8000")
    check_port(option(rest, "--host") or "127.0.0.1", port, "API port", "--port")
    for own, what in ((config.output.metrics_port, "metrics"), (config.output.dcgm_port, "dcgm")):
        if own and not args.no_agent:
            check_port("127.0.0.1", own, f"{what} port", f"--{what}-port")
    folder = run_dir(os.environ)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as exits:
        target = exits.enter_context(target_of(args, rest, folder))
        known = {e.info.pid for e in find_engines(folder)}
        log = Path(args.log) if args.log else folder / f"vllm-{os.getpid()}.log"
        say(f"starting vLLM for {target.served_names[0]}; its log: {log}")
        process = launch_vllm(
            target.model, served_names=target.served_names, port=port, extra_args=target.extra,
            environ=target.environ, log_path=log,
        )  # fmt: skip
        exits.callback(shut_down, process)
        wait_ready(process, f"http://127.0.0.1:{port}", READY_TIMEOUT_S, log)
        channel = wait_for_channel(folder, known, 10.0, lambda: process.poll() is None)
        say(f"serving {target.served_names[0]} at http://127.0.0.1:{port}/v1")
        ended = threading.Event()
        exits.enter_context(stopping(ended))
        gone = watch(process, ended)
        if args.no_agent:
            ended.wait()
            code = 0
        else:
            code = steer(config, folder, channel, ended)
        if gone.is_set():
            say(f"vLLM ended by itself (exit code {process.returncode}); see {log}")
            return EXIT_ENGINE_GONE
        return code


@contextmanager
def target_of(args: argparse.Namespace, rest: list[str], folder: Path) -> Iterator[Target]:
    """Resolve model and boards; emulated boards exist as long as the context."""
    environ = {**os.environ, "PALS_RUN_DIR": str(folder), "PALS_MODEL_NAME": args.model}
    names: tuple[str, ...] = (args.model,)
    if not args.emulate:
        if environ.get("PALS_EMU"):
            raise ConfigError("PALS_EMU is set but --emulate is not given; unset it, or say which boards to emulate")
        with open_boards():
            pass  # no driver: says so, and names --emulate
        yield Target(model=args.model, served_names=names, extra=rest, environ=environ)
        return
    spec, count = parse_boards(args.emulate)
    refuse_second_owner(folder)
    model = args.model
    if not Path(model).is_dir():
        names = tuple(dict.fromkeys((full_name(args.model), args.model)))
        environ["PALS_MODEL_NAME"] = names[0]
        model = str(local_folder(args.model, cache_folder()))
    extra = rest if any(a.split("=")[0] in _PARALLEL for a in rest) else [*rest, "--tensor-parallel-size", str(count)]
    bank = folder / BANK_FILE
    (folder / OWNER_FILE).write_text(str(os.getpid()))
    BoardBank.create(bank, spec, count, seed=args.seed_boards, writable=not args.unprivileged).close()
    say(f"EMULATED: {count} × {spec.nvml_name}; no GPU is used, every watt and second below is simulated")
    environ |= {"PALS_EMU": "1", "PALS_EMU_BOARDS": str(bank), "HF_HUB_OFFLINE": "1"}
    try:
        yield Target(model=model, served_names=names, extra=extra, environ=environ)
    finally:
        bank.unlink(missing_ok=True)
        (folder / OWNER_FILE).unlink(missing_ok=True)


def refuse_second_owner(folder: Path) -> None:
    """Raise `ConfigError` where another living server has emulated boards in this run directory."""
    try:
        pid = int((folder / OWNER_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return
    if pid != os.getpid() and process_alive(pid):
        raise ConfigError(
            f"another emulated server (process {pid}) uses {folder}; stop it, or set PALS_RUN_DIR to another folder. "
            "Nothing was started"
        )


def cache_folder() -> Path:
    """Where built model folders are kept: $XDG_CACHE_HOME/pals, else ~/.cache/pals."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pals" / "models"


def port_of(text: str) -> int:
    """A port number.

    Raises:
        ConfigError: it is none.
    """
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"{text!r} is not a port (1..65535). Nothing was started")
    return int(text)


def option(rest: list[str], name: str) -> str | None:
    """The value of `name` among vLLM's own options."""
    for i, arg in enumerate(rest):
        if arg == name and i + 1 < len(rest):
            return rest[i + 1]
        if arg.startswith(name + "="):
            return arg.split("=", 1)[1]
    return None


def check_port(host: str, port: int, what: str, flag: str) -> None:
    """Raise `ConfigError` where the port cannot be bound."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except (OSError, OverflowError) as e:
            raise ConfigError(
                f"{what} {port} on {host} cannot be used ({e}); choose another with {flag}. Nothing was started"
            ) from e


def watch(process: subprocess.Popen[bytes], ended: threading.Event) -> threading.Event:
    """Set `ended` when the process ends by itself; the event returned says that it did."""
    gone = threading.Event()

    def wait() -> None:
        process.wait()
        if not ended.is_set():
            gone.set()
            ended.set()

    threading.Thread(target=wait, name="vllm-watch", daemon=True).start()
    return gone


def shut_down(process: subprocess.Popen[bytes]) -> None:
    """Let vLLM answer what it accepted, then stop it."""
    if process.poll() is None:
        say("stopping vLLM; accepted requests are answered first")
    stop(process, DRAIN_TIMEOUT_S)
