"""`pals agent`: steer the engines that are already running; also the part of `pals serve` that steers."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from pals.cli.main import say
from pals.cli.mending import mend, refuse_left_limits, warn_of_left_limits
from pals.cli.run_folder import bank_of, boards_told, emulated_bank, put_back, sweep
from pals.cli.writer import Writer, may_mend, will_write, writing
from pals.core import units
from pals.core.errors import ConfigError, EngineGoneError, PalsError
from pals.core.quantities import BoardInfo, EngineInfo
from pals.hardware.nvml import Nvml, open_boards
from pals.hardware.nvml_board import NvmlBoard
from pals.hardware.zeusd_board import Zeusd, zeusd_path
from pals.runtime.agent import AgentSetup, Board, Watcher
from pals.runtime.channel import find_engines, run_dir
from pals.runtime.config import BudgetEndpointConfig, Config, load_config
from pals.runtime.files import check_folder, read_token, state_dir
from pals.runtime.group import EngineGroup, group_ranks
from pals.runtime.live_budget import LiveBudget
from pals.runtime.loop import wall_clock
from pals.runtime.node import control_engines
from pals.runtime.targets import throughput
from pals.runtime.tick import TickRecord
from pals.views.budget_endpoint import PATH as BUDGET_PATH
from pals.views.budget_endpoint import serve_budget
from pals.views.dcgm import DcgmCollector, serve_dcgm
from pals.views.metrics import AgentMetrics, serve_metrics

EXIT_INTERRUPTED = 130


def agent(args: argparse.Namespace) -> int:
    """Run the agent until SIGINT or SIGTERM."""
    config = config_of(args)
    folder = run_dir(os.environ)
    check_folder(folder)
    token_of(config)
    engines_of(folder, args.engine)  # none, or not this one: say so before anything is opened
    stop = threading.Event()
    with stopping(stop):
        return steer(config, folder, lambda: living(folder, args.engine), stop)


def config_of(args: argparse.Namespace) -> Config:
    """The configuration from file and options."""
    overrides: dict[str, dict[str, Any]] = {
        "control": {
            "policy": args.policy,
            "mode": args.mode,
            "writer": args.writer,
            "profile": args.profile,
            "accept_mismatch": args.accept_mismatch,
            "period_s": args.period_s,
            "power_limit_w": args.power_limit_w,
            "sm_clock_mhz": args.sm_clock_mhz,
            "active_sequences": args.active_sequences,
            "lowering": args.lowering,
            "objective": args.objective,
            "experts": args.experts,
        },
        "slo": slo_of(args),
        "budget": {
            "power_w": args.budget,
            "default": args.budget_default,
            "port": args.budget_port,
            "host": args.budget_host,
            "token": args.budget_token,
        },
        "output": {"journal": args.journal, "metrics_port": args.metrics_port, "dcgm_port": args.dcgm_port},
    }
    return load_config(Path(args.config) if args.config else None, overrides)


def slo_of(args: argparse.Namespace) -> dict[str, float | None]:
    """The targets of the options, as `[slo]` calls them."""
    targets: dict[str, float | None] = {}
    for name in ("ttft_p95", "tpot_p95", "ttft_p99", "tpot_p99"):
        given = getattr(args, f"slo_{name}")
        option = f"--slo-{name.replace('_', '-')}"
        targets[f"{name}_s"] = None if given is None else units.seconds(given, option)
    if args.throughput_target is not None:
        targets |= throughput(args.throughput_target, "--throughput-target")
    return targets


def living(folder: Path, pid: int | None = None) -> list[EngineGroup]:
    """The living engines in `folder`, or the one with this process id."""
    engines = group_ranks(find_engines(folder))
    return engines if pid is None else [g for g in engines if pid in g.pids]


def engines_of(folder: Path, pid: int | None) -> list[EngineGroup]:
    """The same, at least one.

    Raises:
        ConfigError: none.
    """
    if engines := living(folder, pid):
        return engines
    raise ConfigError(
        f"no running engine with PALS {f'and process id {pid} ' if pid else ''}found in {folder}. Start one with "
        "`pals serve MODEL`, or `vllm serve MODEL` where pals-llm is installed (same user, same PALS_RUN_DIR)"
    )


def pick_engine(folder: Path, pid: int | None) -> EngineGroup:
    """The one engine in `folder`, or the one with this process id.

    Raises:
        ConfigError: none, or several and no choice.
    """
    engines = engines_of(folder, pid)
    if len(engines) == 1:
        return engines[0]
    raise ConfigError(f"several engines run: {', '.join(e.told() for e in engines)}; choose one with --engine PID")


@contextmanager
def boards_of(folder: Path, channel: EngineGroup | None, *, write: bool) -> Iterator[Nvml]:
    """Open the engine's boards; before that, mend what a killed agent left, if `write`."""
    bank = bank_of([channel]) if channel is not None else emulated_bank(folder)
    if write:
        put_back(folder, mend)
    with open_boards(emulated=bank, indices=None if channel is None else ()) as nvml:
        if channel is not None:
            nvml.boards = open_boards_of(channel.info, nvml)
        yield nvml


def open_boards_of(engine: EngineInfo, nvml: Nvml) -> tuple[NvmlBoard, ...]:
    """Open the engine's boards.

    Raises:
        ConfigError: it does not say which they are, or counts them in an order that NVML does not know.
    """
    if not engine.boards:
        raise ConfigError(
            f"the engine {engine.name} (process {engine.pid}) does not say which boards it uses (CUDA_VISIBLE_DEVICES names "
            "something that vLLM does not resolve, or Ray placed it); PALS will not guess. Nothing was changed: start the "
            "engine with board indices or UUIDs in CUDA_VISIBLE_DEVICES"
        )
    if engine.cuda_order and len(kinds := kinds_of_board(nvml)) > 1:
        raise ConfigError(
            f"this node has boards of several kinds ({', '.join(sorted(kinds))}), and the engine {engine.name} (process "
            f"{engine.pid}) counts them fastest first, as CUDA does by default, not as NVML does; PALS will not guess. Nothing "
            "was changed: start the engine with CUDA_DEVICE_ORDER=PCI_BUS_ID, or with UUIDs in CUDA_VISIBLE_DEVICES"
        )
    return nvml.open(engine.boards)


def refuse_unwritable(boards: Sequence[Board], writer: Writer) -> None:
    """Raise `ConfigError` where a board must not, or cannot, be written."""
    if refused := [b.refusal for b in boards if b.refusal is not None]:
        raise ConfigError(f"{'; '.join(refused)}. Nothing was changed")
    if not writer.may_write:
        raise ConfigError(f"{writer.why_not}; nothing was changed")


def kinds_of_board(nvml: Nvml) -> set[str]:
    """The names of all boards that NVML lists; one that cannot be opened is left out."""
    names: set[str] = set()
    for i in count():
        try:
            names.update(b.info.name for b in nvml.open((i,)))
        except ConfigError:  # no such index
            return names
        except (PalsError, ValueError):
            continue
    return names


def steer(
    config: Config,
    folder: Path,
    find: Callable[[], Sequence[EngineGroup]],
    stop: threading.Event,
    also: Watcher | None = None,
) -> int:
    """Run the agent on the engines that `find` finds; return its exit code. `also` is shown every record too."""
    engines = find()
    bank = bank_of(engines)
    emulated = bank is not None
    _tidy(config, folder, engines, emulated=emulated)
    metrics, clock = AgentMetrics(), wall_clock(stop)
    budgets = LiveBudget(config.budget, now_s=clock.now_s, say=say)
    addresses = addresses_of(config)
    with (
        open_boards(emulated=bank, indices=()) as nvml,
        writing(config.control, nvml, _openable(engines, nvml), bank=bank, say=say) as writer,
        serving_metrics(metrics, config.output.metrics_port),
        dcgm_endpoint(config.output.dcgm_port, emulated=emulated) as dcgm,
        budget_endpoint(config.endpoint, budgets, token_of(config)),
    ):

        def boards(group: EngineGroup) -> Sequence[Board]:
            if group.info.bank != engines[0].info.bank:
                raise ConfigError(
                    f"it runs on {boards_told(group.info.bank)}, this agent steers {boards_told(engines[0].info.bank)}"
                )
            return [writer.board(b) for b in open_boards_of(group.info, nvml)]

        def watch(name: str, infos: Sequence[BoardInfo]) -> Watcher:
            while addresses:  # told with the first engine: nothing refuses any more
                say(addresses.pop())
            views = (metrics.engine(name, [b.index for b in infos]), dcgm.engine(infos))
            return Views(*views) if also is None else Views(*views, also)

        if writer.read_capd is not None:
            metrics.watch_capd(writer.read_capd)
        setup = AgentSetup(
            find=find,
            open_boards=boards,
            config=config,
            emulated=emulated,
            may_write=writer.may_write,
            cannot_write=writer.why_not,
            writer=writer.told,
            budget_keeper=writer.budget_keeper,
            folder=folder,
            watch=watch,
            say=say,
            journals=state_dir(os.environ),
            budgets=budgets,
        )
        return control_engines(setup, clock)


def _tidy(config: Config, folder: Path, engines: Sequence[EngineGroup], *, emulated: bool) -> None:
    """What agents before left behind, and sections for engines that are not there."""
    writes = will_write(config, emulated=emulated)
    if writes and may_mend(config.control, emulated=emulated):
        through = Zeusd(zeusd_path(os.environ)) if config.control.writer == "zeusd" else None
        put_back(folder, partial(mend, setters=through))
    elif writes:
        refuse_left_limits(folder)
    else:
        warn_of_left_limits(folder)
    sweep(folder)
    warn_of_strangers(config, engines)


def addresses_of(config: Config) -> list[str]:
    """What this agent serves, and where, in a line each."""
    output, endpoint = config.output, config.endpoint
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    lines = [
        (endpoint.port, f"budgets may be put at http://{host}:{endpoint.port}{BUDGET_PATH}"),
        (output.metrics_port, f"metrics at http://127.0.0.1:{output.metrics_port}/metrics"),
        (output.dcgm_port, f"boards as dcgm-exporter shows them at http://127.0.0.1:{output.dcgm_port}/metrics"),
    ]
    return [line for port, line in lines if port]


def token_of(config: Config) -> str | None:
    """The token of the budget endpoint; None where that is off.

    Raises:
        ConfigError: its file is missing, open to others, or holds none.
    """
    endpoint = config.endpoint
    return read_token(Path(endpoint.token)) if endpoint.port and endpoint.token else None


def _openable(engines: Sequence[EngineGroup], nvml: Nvml) -> list[NvmlBoard]:
    """The boards of those engines whose boards can be opened; what is wrong with the others is said when they are taken up."""
    boards: list[NvmlBoard] = []
    for engine in engines:
        with suppress(PalsError, ValueError):
            boards += open_boards_of(engine.info, nvml)
    return boards


def warn_of_strangers(config: Config, engines: Sequence[EngineGroup]) -> None:
    """Say which [engine] sections fit no engine that runs: it may come later, or the name is mistyped."""
    names = [n for e in engines for n in (e.info.name, e.info.model)]
    for name in config.engines:
        if name not in names:
            say(f"[engine.{name!r}]: no such engine runs yet; running: {', '.join(sorted(set(names))) or 'none'}")


@contextmanager
def serving_metrics(metrics: AgentMetrics, port: int) -> Iterator[None]:
    """Expose the metrics as long as the context, unless `port` is 0."""
    if not port:
        yield
        return
    close = serve_metrics(metrics, port)
    try:
        yield
    finally:
        close()


@contextmanager
def dcgm_endpoint(port: int, *, emulated: bool) -> Iterator[DcgmCollector]:
    """What shows boards as dcgm-exporter would; exposed as long as the context, unless `port` is 0."""
    collector = DcgmCollector(emulated=emulated)
    if not port:
        yield collector
        return
    close = serve_dcgm(collector, port)
    try:
        yield collector
    finally:
        close()


@contextmanager
def budget_endpoint(endpoint: BudgetEndpointConfig, budgets: LiveBudget, token: str | None) -> Iterator[None]:
    """Let budgets be put as long as the context, where there is a token."""
    if token is None:
        yield
        return
    close = serve_budget(budgets, host=endpoint.host, port=endpoint.port, token=token)
    try:
        yield
    finally:
        close()


class Views:
    """Everything that watches one engine's records."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def observe(self, record: TickRecord) -> None:
        """Take one record."""
        for watcher in self._watchers:
            watcher.observe(record)

    def close(self) -> None:
        """The engine is no longer steered."""
        for watcher in self._watchers:
            watcher.close()


@contextmanager
def stopping(stop: threading.Event, also: Callable[[], None] | None = None) -> Iterator[None]:
    """SIGINT, SIGTERM and a terminal that closes set `stop` (a second one too: the order of stopping is kept)."""

    def handler(signum: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            say(f"{signal.Signals(signum).name}: stopping in order")
        stop.set()
        if also is not None:
            also()

    before = {s: signal.signal(s, handler) for s in stop_signals()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_signals() -> list[signal.Signals]:
    """What asks a process to stop; SIGHUP not where it is ignored already (nohup)."""
    asked = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    return [s for s in asked if s is not signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]


def wait_for_channel(folder: Path, session: int, timeout_s: float, alive: Callable[[], bool]) -> EngineGroup:
    """Wait for the engine of the process session `session`, with all its data-parallel ranks.

    Raises:
        EngineGoneError: none came.
    """
    end_s = time.monotonic() + timeout_s
    mine: list[EngineGroup] = []
    while time.monotonic() < end_s and alive():
        mine = [g for g in living(folder) if all(session_of(pid) == session for pid in g.pids)]
        if mine and mine[0].complete:
            return mine[0]
        time.sleep(0.1)
    if mine and alive():  # the other ranks are on other nodes
        return mine[0]
    raise EngineGoneError(
        f"vLLM runs without the PALS plugin: no channel appeared in {folder}. Is pals-llm installed in vLLM's environment, "
        "and is VLLM_PLUGINS unset or does it name 'pals'?"
    )


def session_of(pid: int) -> int:
    """The process session of `pid`; 0 where it is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0
