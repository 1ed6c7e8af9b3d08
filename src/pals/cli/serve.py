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
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from pals.cli.agent import config_of, living, steer, stopping, wait_for_channel, will_write
from pals.cli.main import say
from pals.cli.shared_bank import shared_bank
from pals.core.errors import ConfigError
from pals.engines.model_zoo import full_name, local_folder
from pals.engines.vllm_launcher import launch_vllm, stop, wait_ready
from pals.hardware.nvml import open_boards
from pals.plant.keeper import kept_fresh
from pals.plant.specs import parse_boards
from pals.runtime.agent import EXIT_ENGINE_GONE, FOUND_RECORD, indices_text
from pals.runtime.channel import run_dir
from pals.runtime.loop import left_by_dead_agent

READY_TIMEOUT_S = 900.0
DRAIN_TIMEOUT_S = 60.0
PARALLEL = (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp"))


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
    if not args.no_agent and will_write(config, emulated=bool(args.emulate)):
        refuse_second_agent(folder)
    with ExitStack() as exits:
        target = exits.enter_context(target_of(args, rest, folder))
        log = Path(args.log) if args.log else folder / f"vllm-{os.getpid()}.log"
        sockets = exits.enter_context(TemporaryDirectory(prefix="pals-ipc-", ignore_cleanup_errors=True))
        say(f"starting vLLM for {target.served_names[0]}; its log: {log}")
        process = launch_vllm(
            target.model, served_names=target.served_names, port=port, extra_args=target.extra,
            environ={"VLLM_RPC_BASE_PATH": sockets, **target.environ}, log_path=log,
        )  # fmt: skip
        exits.callback(shut_down, process)
        wait_ready(process, f"http://127.0.0.1:{port}", READY_TIMEOUT_S, log)
        channel = wait_for_channel(folder, process.pid, 10.0, lambda: process.poll() is None)
        say(f"serving {target.served_names[0]} at http://127.0.0.1:{port}/v1")
        ended = threading.Event()
        exits.enter_context(stopping(ended))
        gone = watch(process, ended)
        if args.no_agent:
            ended.wait()
            code = 0
        else:
            code = steer(config, folder, lambda: living(folder, channel.info.pid), ended)
            if code == EXIT_ENGINE_GONE and channel.alive():  # only the plugin has left, or vLLM is about to end
                say("vLLM serves on without PALS until it ends, or you stop it (Ctrl-C)")
                ended.wait()
        if gone.is_set():
            say(f"vLLM ended by itself (exit code {process.returncode}); see {log}")
            return EXIT_ENGINE_GONE
        return code


def refuse_second_agent(folder: Path) -> None:
    """Raise `ConfigError` where a living agent steers boards of this run directory, before vLLM is started."""
    try:
        left_by_dead_agent(folder / FOUND_RECORD)
    except ConfigError as e:
        raise ConfigError(f"{e}, or serve with --no-agent: a `pals agent` takes up new engines by itself") from e


@contextmanager
def target_of(args: argparse.Namespace, rest: list[str], folder: Path) -> Iterator[Target]:
    """Resolve model and boards; emulated boards exist as long as the context."""
    environ = {**os.environ, "PALS_RUN_DIR": str(folder), "PALS_MODEL_NAME": args.model}
    if args.boards:
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, chosen(args.boards, "--boards")))
        environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as NVML counts, and with it PALS
    names: tuple[str, ...] = (args.model,)
    if not args.emulate:
        if environ.get("PALS_EMU"):
            raise ConfigError("PALS_EMU is set but --emulate is not given; unset it, or say which boards to emulate")
        with open_boards(indices=chosen(args.boards, "--boards") if args.boards else None):
            pass  # no driver: says so, and names --emulate
        yield Target(model=args.model, served_names=names, extra=rest, environ=environ)
        return
    spec, count = parse_boards(args.emulate)
    boards, extra = emulated_boards(environ.get("CUDA_VISIBLE_DEVICES", ""), count, rest)
    model = args.model
    if not Path(model).is_dir():
        names = tuple(dict.fromkeys((full_name(args.model), args.model)))
        environ["PALS_MODEL_NAME"] = names[0]
        model = str(local_folder(args.model, cache_folder()))
    with (
        shared_bank(folder, spec, count, boards, seed=args.seed_boards, writable=not args.unprivileged) as bank,
        kept_fresh(bank),  # for those who read the boards through the C library, see docs/emulated-nvml.md
    ):
        told = "" if len(boards) == count else f", of which this server uses {indices_text(boards)}"
        say(f"EMULATED: {count} × {spec.nvml_name}{told}; no GPU is used, every watt and second below is simulated")
        environ |= {"PALS_EMU": "1", "PALS_EMU_BOARDS": str(bank), "HF_HUB_OFFLINE": "1"}
        yield Target(model=model, served_names=names, extra=extra, environ=environ)


def emulated_boards(visible: str, count: int, rest: list[str]) -> tuple[tuple[int, ...], list[str]]:
    """Which of `count` emulated boards this server uses, and vLLM's options: without any parallelism, all that are visible.

    Raises:
        ConfigError: boards that are not emulated, or fewer than the parallelism needs.
    """
    mine = chosen(visible, "CUDA_VISIBLE_DEVICES") if visible else tuple(range(count))
    if absent := [i for i in mine if i >= count]:
        raise ConfigError(
            f"boards {absent} are not among the {count} emulated ones (0..{count - 1}). Nothing was started"
        )
    given = [next((v for v in (option(rest, flag) for flag in flags) if v is not None), None) for flags in PARALLEL]
    if given == [None] * len(given):
        return mine, [*rest, "--tensor-parallel-size", str(len(mine))]
    if bad := [v for v in given if v is not None and not v.isdigit()]:
        raise ConfigError(f"{bad[0]!r} is not a size of a parallel group. Nothing was started")
    needed = prod(int(v) for v in given if v is not None)
    if needed > len(mine):
        raise ConfigError(
            f"this parallelism needs {needed} boards, {len(mine)} are there ({indices_text(mine)}); emulate more "
            "(--emulate 8x…) or choose more (--boards). Nothing was started"
        )
    return mine[:needed], rest


def chosen(text: str, where: str) -> tuple[int, ...]:
    """Board indices out of "4,5,6,7".

    Raises:
        ConfigError: not of that form.
    """
    words = [w.strip() for w in text.split(",")]
    if not all(w.isdigit() for w in words) or len(set(words)) != len(words):
        raise ConfigError(f"{where} {text!r}: expected different board indices like 4,5,6,7. Nothing was started")
    return tuple(int(w) for w in words)


def cache_folder() -> Path:
    """Where built model folders are kept: below $XDG_CACHE_HOME/pals, else ~/.cache/pals."""
    return pals_cache() / "models"


def pals_cache() -> Path:
    """Where whatever is built once is kept: $XDG_CACHE_HOME/pals, else ~/.cache/pals."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pals"


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
