"""`pals serve`: real vLLM as a child process, PALS beside it; stops in order and leaves nothing behind."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pals.cli.agent import config_of, living, steer, stopping, token_of, wait_for_channel
from pals.cli.extras import require
from pals.cli.main import say
from pals.cli.preflight import check_before_launch
from pals.cli.run_folder import SOCKETS, SOCKETS_PATH_MAX, sweep
from pals.cli.server_life import Server, Signals, log_kept_small, unfinished_in
from pals.cli.shared_bank import shared_bank
from pals.cli.vllm_options import (
    PARALLEL,
    Endpoint,
    check_ports,
    chosen,
    emulated_boards,
    endpoint_of,
    option,
    whole,
)
from pals.cli.writer import will_write
from pals.core.errors import ConfigError, EngineGoneError, NotPutBackError, PalsError
from pals.core.quantities import BoardInfo
from pals.engines.model_zoo import full_name, local_folder
from pals.engines.vllm_launcher import launch_vllm, wait_ready
from pals.hardware.nvml import open_boards
from pals.plant.keeper import kept_fresh
from pals.plant.specs import parse_boards
from pals.runtime.agent import EXIT_ENGINE_GONE, EXIT_NOT_PUT_BACK, FOUND_RECORD, indices_text
from pals.runtime.channel import find_engines, run_dir
from pals.runtime.config import Config
from pals.runtime.files import own_folder, state_dir
from pals.runtime.found import left_by_dead_agent
from pals.runtime.group import EngineGroup

READY_TIMEOUT_S = 900.0
DRAIN_S = 60
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
log = logging.getLogger("pals")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What vLLM is asked to serve."""

    model: str
    served_names: tuple[str, ...]  # the first is what PALS calls it
    extra: list[str]
    environ: dict[str, str]
    boards: tuple[BoardInfo, ...]  # that it will use; of real ones perhaps not all


def serve(args: argparse.Namespace, rest: list[str]) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; 0 then, 1 when the agent failed or requests were cut, 3 when vLLM ended by itself."""
    config = config_of(args)
    rest = [a for a in rest if a != "--"]
    endpoint, drain_s = endpoint_of(rest), drain_of(args, rest)
    output = config.output
    own = [(output.metrics_port, "metrics"), (output.dcgm_port, "dcgm"), (config.endpoint.port, "budget")]
    check_ports(endpoint, [] if args.no_agent else own, hosts={"budget": config.endpoint.host})
    if not args.no_agent:
        token_of(config)
    require("vllm", "pynvml")
    folder = own_folder(run_dir(os.environ)).absolute()
    if not args.no_agent and will_write(config, emulated=bool(args.emulate)):
        refuse_second_agent(folder)
    sweep(folder)
    vllm_log = Path(args.log) if args.log else state_dir(os.environ) / f"vllm-{os.getpid()}.log"
    if vllm_log.is_dir():
        raise ConfigError(f"--log {vllm_log} is a folder; name a file. Nothing was started")
    signals = Signals()
    with ExitStack() as exits:
        exits.enter_context(stopping(signals.ended, also=signals.arrived))
        target = exits.enter_context(target_of(args, rest, folder))
        if not args.no_agent:
            check_target(config, target, exact=bool(args.emulate))
        sockets = exits.enter_context(socket_folder(folder))
        say(f"starting vLLM for {target.served_names[0]}; its log: {vllm_log}")
        process = launch_vllm(
            target.model, served_names=target.served_names, port=endpoint.port, extra_args=target.extra,
            environ={"VLLM_RPC_BASE_PATH": str(sockets), **target.environ}, log_path=vllm_log, drain_s=drain_s,
        )  # fmt: skip
        exits.enter_context(log_kept_small(vllm_log))
        exits.callback(find_engines, folder)  # removes the channel of an engine that had to be killed
        server = Server(process, signals, drain_s)
        exits.callback(server.shut_down)
        code = serve_on(
            args,
            config,
            server,
            endpoint,
            signals=signals,
            folder=folder,
            name=target.served_names[0],
            vllm_log=vllm_log,
        )
    return code or (EXIT_FAILED if server.cut else 0)


def serve_on(
    args: argparse.Namespace,
    config: Config,
    server: Server,
    endpoint: Endpoint,
    *,
    signals: Signals,
    folder: Path,
    name: str,
    vllm_log: Path,
) -> int:
    """Wait for vLLM, then steer it until it is told to stop or ends by itself."""
    process = server.process
    try:
        wait_ready(process, endpoint.url, READY_TIMEOUT_S, vllm_log, signals.ended)
        channel = wait_for_channel(
            folder, process.pid, 10.0, lambda: process.poll() is None and not signals.ended.is_set()
        )
    except EngineGoneError:
        if not signals.ended.is_set():
            raise
        return EXIT_INTERRUPTED
    signals.unfinished = lambda: unfinished_in(channel)
    say(f"serving {name} at {endpoint.url}/v1")
    gone = server.watch()
    if args.no_agent:
        signals.ended.wait()
        code = 0
    else:
        code = steered(config, folder, channel, signals)
    if gone.is_set():
        say(f"vLLM ended by itself (exit code {process.returncode}); see {vllm_log}")
        return EXIT_ENGINE_GONE
    return code


def steered(config: Config, folder: Path, channel: EngineGroup, signals: Signals) -> int:
    """Steer; an agent that fails leaves the server serving until it is told to stop."""
    try:
        code = steer(config, folder, lambda: living(folder, channel.info.pid), signals.ended)
        if code == EXIT_ENGINE_GONE and channel.alive():  # only the plugin has left, or vLLM is about to end
            say("vLLM serves on without PALS until it ends, or you stop it (Ctrl-C)")
            signals.ended.wait()
        return code
    except NotPutBackError as e:
        say(str(e))
        if not signals.ended.is_set():
            say("vLLM serves on without PALS until it ends, or you stop it (Ctrl-C)")
        signals.ended.wait()
        return EXIT_NOT_PUT_BACK
    except Exception as e:  # the server outlives its agent, whatever ends that
        if not isinstance(e, PalsError | OSError):
            log.exception("unexpected; please report this")
        if not signals.ended.is_set():
            boards = "boards are as they were found"
            if (folder / FOUND_RECORD).exists():
                boards = "boards may still be limited: after this server's end run `pals restore`"
            say(f"the agent failed: {e}")
            say(f"vLLM serves on without it, {boards}; start `pals agent` to steer again, or stop with Ctrl-C")
        signals.ended.wait()
        return EXIT_FAILED


def check_target(config: Config, target: Target, *, exact: bool) -> None:
    """Raise `ConfigError` for what the agent would refuse after the model has loaded."""
    sequences = whole(target.extra, "--max-num-seqs", least=1)
    ranks = whole(target.extra, *PARALLEL[2], least=1) or 1
    check_before_launch(
        config,
        target.boards,
        model=target.environ["PALS_MODEL_NAME"],
        served_as=option(target.extra, "--served-model-name") or target.served_names[0],
        launch_sequences=sequences * ranks if sequences is not None else None,
        exact=exact,
    )


def drain_of(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """How long accepted requests are answered when stopping, seconds.

    Raises:
        ConfigError: no such time, or two of them.
    """
    own = whole(rest, "--shutdown-timeout")
    if args.drain_s is not None and own is not None:
        raise ConfigError("--drain-s and vLLM's --shutdown-timeout say the same; give one. Nothing was started")
    if args.drain_s is not None and args.drain_s < 0:
        raise ConfigError(f"--drain-s {args.drain_s} must be 0 or more. Nothing was started")
    told = own if args.drain_s is None else args.drain_s
    return DRAIN_S if told is None else int(told)


@contextmanager
def socket_folder(folder: Path) -> Iterator[Path]:
    """Where vLLM puts its sockets: in the run directory, where its path is short enough for a Unix socket."""
    mine = folder.absolute() / f"{SOCKETS}{os.getpid()}"
    if len(str(mine)) > SOCKETS_PATH_MAX:
        with tempfile.TemporaryDirectory(prefix="pals-ipc-", ignore_cleanup_errors=True) as elsewhere:
            yield Path(elsewhere)
        return
    mine.mkdir(mode=0o700, exist_ok=True)
    try:
        yield mine
    finally:
        for left in mine.iterdir():
            left.unlink(missing_ok=True)
        mine.rmdir()


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
        # no driver: says so, and names --emulate
        with open_boards(indices=chosen(args.boards, "--boards") if args.boards else None) as nvml:
            infos = tuple(b.info for b in nvml.boards)
        yield Target(model=args.model, served_names=names, extra=rest, environ=environ, boards=infos)
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
        with open_boards(emulated=bank, indices=boards) as nvml:
            infos = tuple(b.info for b in nvml.boards)
        yield Target(model=model, served_names=names, extra=extra, environ=environ, boards=infos)


def cache_folder() -> Path:
    """Where built model folders are kept: below $XDG_CACHE_HOME/pals, else ~/.cache/pals."""
    return pals_cache() / "models"


def pals_cache() -> Path:
    """Where whatever is built once is kept: $XDG_CACHE_HOME/pals, else ~/.cache/pals."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pals"
