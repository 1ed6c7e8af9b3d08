"""`pals agent`: steer an engine that is already running; also the part of `pals serve` that steers."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pals.cli.main import say
from pals.core.errors import ConfigError, EngineGoneError
from pals.core.quantities import OperatingPoint
from pals.hardware.nvml import Nvml, open_boards
from pals.runtime.agent import FOUND_RECORD, AgentSetup, control_engine
from pals.runtime.channel import find_engines, run_dir
from pals.runtime.config import Config, load_config
from pals.runtime.group import EngineGroup, group_ranks
from pals.runtime.loop import left_by_dead_agent
from pals.runtime.tick import TickRecord
from pals.views.dcgm import DcgmCollector, serve_dcgm
from pals.views.metrics import AgentMetrics, serve_metrics

BANK_FILE = "emulated-boards.bank"


def agent(args: argparse.Namespace) -> int:
    """Run the agent until SIGINT or SIGTERM."""
    config = config_of(args)
    folder = run_dir(os.environ)
    channel = pick_engine(folder, args.engine)
    stop = threading.Event()
    with stopping(stop):
        return steer(config, folder, channel, stop)


def config_of(args: argparse.Namespace) -> Config:
    """The configuration from file and options."""
    overrides: dict[str, dict[str, Any]] = {
        "control": {
            "policy": args.policy,
            "mode": args.mode,
            "profile": args.profile,
            "period_s": args.period_s,
            "power_limit_w": args.power_limit_w,
            "active_sequences": args.active_sequences,
        },
        "slo": {
            "throughput_tokens_s": args.target_tokens_s,
            "ttft_p95_s": args.ttft_p95_s,
            "tpot_p95_s": args.tpot_p95_s,
        },
        "budget": {"power_w": args.budget_w},
        "output": {"journal": args.journal, "metrics_port": args.metrics_port, "dcgm_port": args.dcgm_port},
    }
    return load_config(Path(args.config) if args.config else None, overrides)


def pick_engine(folder: Path, pid: int | None) -> EngineGroup:
    """The one engine in `folder`, or the one with this process id.

    Raises:
        ConfigError: none, or several and no choice.
    """
    engines = group_ranks(find_engines(folder))
    if pid is not None:
        engines = [g for g in engines if any(r.info.pid == pid for r in g.ranks)]
    if len(engines) == 1:
        return engines[0]
    if not engines:
        raise ConfigError(
            f"no running engine with PALS {f'and process id {pid} ' if pid else ''}found in {folder}. Start one with "
            "`pals serve MODEL`, or `vllm serve MODEL` where pals-llm is installed (same user, same PALS_RUN_DIR)"
        )
    names = ", ".join(f"{e.info.pid} ({e.info.model})" for e in engines)
    raise ConfigError(f"several engines run: {names}; choose one with --engine PID")


def emulated_bank(folder: Path) -> Path | None:
    """The emulated boards of this run directory, where there are any."""
    bank = folder / BANK_FILE
    return bank if os.path.exists(bank) else None  # unlike Path.exists, False where the folder is closed to us


@contextmanager
def boards_of(folder: Path, channel: EngineGroup | None, *, write: bool) -> Iterator[Nvml]:
    """Open the engine's boards; before that, mend what a killed agent left, if `write`."""
    bank = emulated_bank(folder)
    indices = channel.info.boards if channel is not None else None
    if indices == ():
        raise ConfigError(
            "the engine does not say which boards it uses (CUDA_VISIBLE_DEVICES lists no indices); PALS will not guess. "
            "Nothing was changed: start the engine with board indices in CUDA_VISIBLE_DEVICES"
        )
    if write:
        mend(folder, bank)
    with open_boards(emulated=bank, indices=indices) as nvml:
        yield nvml


def mend(folder: Path, bank: Path | None) -> int:
    """Put boards back that a dead agent left limited; return how many."""
    left_w = left_by_dead_agent(folder / FOUND_RECORD)
    if not left_w:
        return 0
    mended = 0
    with open_boards(emulated=bank, indices=None) as nvml:
        for board in nvml.boards:
            found_w = left_w.get(board.info.uuid)
            if found_w is not None and board.info.found_limit_w != found_w:
                board.apply(OperatingPoint(power_limit_w=found_w))
                mended += 1
    (folder / FOUND_RECORD).unlink(missing_ok=True)
    if mended:
        say(f"an earlier agent ended without putting {mended} boards back; they are at the limits it had found again")
    return mended


def steer(config: Config, folder: Path, channel: EngineGroup, stop: threading.Event) -> int:
    """Run the agent on this engine; return its exit code."""
    emulated = emulated_bank(folder) is not None
    wants_to_write = (config.control.mode or ("auto" if emulated else "advise")) == "auto"
    with (
        boards_of(folder, channel, write=wants_to_write and (emulated or os.geteuid() == 0)) as nvml,
        dcgm_endpoint(config.output.dcgm_port, nvml, emulated=emulated) as dcgm,
    ):
        metrics = AgentMetrics()
        port = config.output.metrics_port
        close = serve_metrics(metrics, port) if port else lambda: None
        try:
            setup = AgentSetup(
                boards=nvml.boards,
                channel=channel,
                config=config,
                emulated=emulated,
                may_write=all(b.can_write() for b in nvml.boards),
                folder=folder,
                sinks=(metrics.observe, *dcgm),
                say=say,
            )
            if port:
                say(f"metrics at http://127.0.0.1:{port}/metrics")
            return control_engine(setup, stop)
        finally:
            close()


@contextmanager
def dcgm_endpoint(port: int, nvml: Nvml, *, emulated: bool) -> Iterator[Sequence[Callable[[TickRecord], None]]]:
    """Expose the boards as dcgm-exporter would, where `port` is not 0; yields the sinks that feed it."""
    if not port:
        yield ()
        return
    collector = DcgmCollector(emulated=emulated)
    close = serve_dcgm(collector, port)
    say(f"boards as dcgm-exporter shows them at http://127.0.0.1:{port}/metrics")
    try:
        yield (collector.engine([b.info for b in nvml.boards]).observe,)
    finally:
        close()


@contextmanager
def stopping(stop: threading.Event, also: Callable[[], None] | None = None) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` (a second one too: the order of stopping is kept)."""

    def handler(signum: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            say(f"{signal.Signals(signum).name}: stopping in order")
        stop.set()
        if also is not None:
            also()

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def wait_for_channel(folder: Path, known: set[int], timeout_s: float, alive: Callable[[], bool]) -> EngineGroup:
    """Wait for an engine that was not `known`, with all its data-parallel ranks.

    Raises:
        EngineGoneError: none came.
    """
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s and alive():
        fresh = group_ranks([e for e in find_engines(folder) if e.info.pid not in known])
        if fresh and fresh[-1].complete:
            return fresh[-1]
        time.sleep(0.1)
    raise EngineGoneError(
        f"vLLM runs without the PALS plugin: no channel (or not one of every rank) appeared in {folder}. Is pals-llm "
        "installed in vLLM's environment, and is VLLM_PLUGINS unset or does it name 'pals'?"
    )
