"""`pals emulate nvml`: the emulated boards behind a `libnvidia-ml.so.1` of our own, for nvitop, gpustat, zeus and the like."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pals.cli.main import say
from pals.core.errors import ConfigError
from pals.hardware.nvml_double.build import library
from pals.plant.bank_layout import STALE_S
from pals.plant.boards import BoardBank
from pals.plant.keeper import kept_fresh
from pals.plant.silicon import Load
from pals.plant.specs import parse_boards
from pals.runtime.channel import run_dir
from pals.runtime.files import own_folder


def add_nvml(kinds: Any) -> None:
    """`pals emulate nvml`."""
    p = kinds.add_parser(
        "nvml",
        help="let nvitop, gpustat, zeus and other NVML tools see the emulated boards",
        usage="pals emulate nvml [-h] [--boards BOARDS] [--load SHARE] [--unprivileged] [--seed-boards N] [-- CMD ...]",
        description="Build a libnvidia-ml.so.1 that answers from emulated boards. While `pals serve --emulate` runs, its "
        "boards are used. With CMD, run CMD so that it sees them; without, print what to export. "
        'Example: pals emulate nvml -- nvitop -1, or eval "$(pals emulate nvml)".',
        allow_abbrev=False,
    )
    p.add_argument("--boards", metavar="BOARDS", help="make boards of their own, e.g. 4xa100-sxm4-80gb, until Ctrl-C")
    p.add_argument(
        "--load", type=float, default=0.0, metavar="SHARE",
        help="with --boards: kernels run all the time and use this share of compute and of memory bandwidth, 0..1",
    )  # fmt: skip
    p.add_argument("--unprivileged", action="store_true", help="with --boards: they refuse writes, as without root")
    p.add_argument("--seed-boards", type=int, default=0, metavar="N", help="with --boards: their variation (default 0)")
    p.set_defaults(function=nvml, takes_engine_options=True)


def nvml(args: argparse.Namespace, rest: list[str]) -> int:
    """Print the environment, or run a command in it."""
    command = rest[1:] if rest[:1] == ["--"] else rest
    if command[:1] and command[0].startswith("-"):
        raise ConfigError(f"unknown option {command[0]!r} of `pals emulate nvml`; a command to run follows after --")
    from pals.cli.agent import stopping
    from pals.cli.serve import pals_cache

    with boards(args) as bank:
        environ = environment(library(pals_cache() / "nvml", os.environ), bank, os.environ)
        if command:
            return run(command, {**os.environ, **environ})
        say(f"EMULATED boards of {bank} for every program started with the line below")
        print("export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in environ.items()), flush=True)
        if args.boards:
            say("the boards live until Ctrl-C")
            ended = threading.Event()
            with stopping(ended):
                ended.wait()
    return 0


def environment(folder: Path, bank: Path, outside: Mapping[str, str]) -> dict[str, str]:
    """What makes a program see the boards. PALS_EMU: a vLLM started there would otherwise take them for real GPUs."""
    paths = [str(folder), *filter(None, [outside.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": ":".join(paths), "PALS_EMU_BOARDS": str(bank), "PALS_EMU": "1"}


@contextmanager
def boards(args: argparse.Namespace) -> Iterator[Path]:
    """The bank file: the run directory's, or one of its own for as long as the context lasts.

    Raises:
        ConfigError: there is none, or nobody keeps it.
    """
    folder = run_dir(os.environ)
    if not args.boards:
        if args.load or args.unprivileged or args.seed_boards:
            raise ConfigError("--load, --unprivileged and --seed-boards shape boards of their own: give --boards too")
        yield served_bank(folder)
        return
    if not 0.0 <= args.load <= 1.0:
        raise ConfigError(f"--load {args.load} lies outside 0..1. Nothing was started")
    spec, count = parse_boards(args.boards)
    own_folder(folder)
    path = folder / f"nvml-{os.getpid()}.bank"
    bank = BoardBank.create(path, spec, count, seed=args.seed_boards, writable=not args.unprivileged, apart=path.name)
    load = Load(compute=args.load, memory=args.load) if args.load else None
    if load is not None:
        bank.register_process(os.getpid(), range(count), round(args.load * bank.memory_bytes))
    bank.close()
    try:
        with kept_fresh(path, load=load):
            yield path
    finally:
        path.unlink(missing_ok=True)


def served_bank(folder: Path) -> Path:
    """The bank that a living `pals serve` keeps in this run directory."""
    from pals.cli.run_folder import emulated_bank

    path = emulated_bank(folder)
    age_s = float("inf")
    if path is not None:
        bank = BoardBank.open(path)
        age_s = bank.age_s(time.monotonic())
        bank.close()
    if path is None or not age_s < STALE_S:
        raise ConfigError(
            f"no emulated boards are kept in {folder}: start `pals serve MODEL --emulate BOARDS` (same PALS_RUN_DIR), or "
            "make boards here with --boards, e.g. --boards 4xa100-sxm4-80gb"
        )
    return path


def run(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run a command in the foreground; its exit code. Ctrl-C is the command's own affair."""
    try:
        process = subprocess.Popen(list(command), env=dict(environ))
    except OSError as e:
        raise ConfigError(f"cannot run {command[0]!r}: {e.strerror}") from e
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    return code if code >= 0 else 128 - code
