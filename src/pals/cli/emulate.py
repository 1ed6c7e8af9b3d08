"""`pals emulate …`: real vLLM on emulated boards in virtual time without a server, and the boards for other people's tools."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pals.cli.emulate_nvml import add_nvml
from pals.cli.main import add_agent_options, say
from pals.cli.profile_commands import add_sweep_options
from pals.core.errors import ConfigError
from pals.engines.emulated_world import emulating

if TYPE_CHECKING:
    from pals.experiments.virtual_run import VirtualNode, VirtualResult
    from pals.plant.faults import FaultSchedule
    from pals.runtime.config import Config


def add_emulate(commands: Any) -> None:
    """The `emulate` command; each kind names its function, and whether unknown options go to vLLM."""
    p = commands.add_parser("emulate", help="emulated boards in virtual time, or for tools that know nothing of PALS")
    kinds = p.add_subparsers(dest="emulate", metavar="WHAT", required=True)
    add_run(kinds)
    add_profile(kinds)
    add_nvml(kinds)


def emulate(args: argparse.Namespace, rest: list[str]) -> int:
    """Run one kind."""
    return int(args.function(args, [a for a in rest if a != "--"]))


def add_run(kinds: Any) -> None:
    """`pals emulate run`."""
    p = kinds.add_parser(
        "run",
        help="serve a slice of the trace under one or more policies, deterministic and faster than real time",
        description="Serve a slice of the Azure 2023 trace in virtual time: real vLLM, its scheduler and the PALS plugin in "
        "one process. A seed gives the same journal, byte for byte; several policies (--policy static,pals-paper) meet "
        "identical arrivals. Options not listed here go to vLLM's engine.",
        allow_abbrev=False,
    )
    add_node_options(p)
    p.add_argument("--seconds", type=float, default=60.0, metavar="S", help="length of the trace slice (default 60)")
    p.add_argument("--start-s", type=float, default=0.0, metavar="S", help="where in the trace it begins (default 0)")
    p.add_argument("--time-scale", type=float, default=1.0, metavar="X", help="stretch arrivals: 0.5 doubles the rate")
    p.add_argument("--seed", type=int, default=7, help="seed of the prompts (default 7)")
    p.add_argument(
        "--faults",
        metavar="FILE",
        help="what goes wrong with the boards, and when: .csv or .json (docs/models/boards.md)",
    )
    p.add_argument("--out", default="out/emulate", metavar="FOLDER", help="journals, outcomes (default out/emulate)")
    add_agent_options(p)
    p.set_defaults(function=run, takes_engine_options=True)


def add_profile(kinds: Any) -> None:
    """`pals emulate profile`."""
    p = kinds.add_parser(
        "profile",
        help="the sweep of `pals profile` in virtual time: no server, no quiet machine needed",
        description="Measure real vLLM on emulated boards in virtual time, as `pals profile` does a running engine. Options not "
        "listed here go to vLLM's engine.",
        allow_abbrev=False,
    )
    add_node_options(p)
    add_sweep_options(p)
    p.set_defaults(function=profile, takes_engine_options=True)


def add_node_options(p: argparse.ArgumentParser) -> None:
    """Which model on which boards."""
    p.add_argument("model", metavar="MODEL", help="model name (`pals models`) or folder")
    add_board_options(p)


def add_board_options(p: argparse.ArgumentParser) -> None:
    """Which boards of the plant."""
    p.add_argument("--boards", required=True, metavar="BOARDS", help="e.g. 4xa100-sxm4-80gb or h100-sxm5-80gb")
    p.add_argument("--seed-boards", type=int, default=0, help="seed of the boards' variation (default 0)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Serve under each policy, print the table; 0 when every request was answered with the tokens asked for."""
    from pals.cli.agent import stopping
    from pals.experiments.trace import load_slice

    if not args.time_scale > 0:
        raise ConfigError(f"--time-scale {args.time_scale} must be above 0. Nothing was started")
    folder = Path(args.out)
    runs, faults = runs_of(args, folder), faults_of(args)
    specs = load_slice(args.seconds, start_s=args.start_s, time_scale=args.time_scale)
    results: list[VirtualResult] = []
    stop = threading.Event()
    with stopping(stop), node_of(args, rest) as node:
        from pals.experiments.virtual_run import run_policy

        folder.mkdir(parents=True, exist_ok=True)
        for name, config in runs:
            result = run_policy(
                replace(node, faults=faults), specs, config, name=name, seed=args.seed, command=reproducing(args.given, name), stop=stop,
                say=say,
            )  # fmt: skip
            if result is None:
                say(f"{name} was stopped; its journal holds the ticks so far")
                return 130
            say(
                f"{name}: {result.virtual_s:.1f} s of virtual time in {result.wall_s:.1f} s, {result.speed:.1f}x real time"
            )
            results.append(result)
    return conclude(args, folder, results)


def runs_of(args: argparse.Namespace, folder: Path) -> list[tuple[str, Config]]:
    """Name and configuration of each policy asked for.

    Raises:
        ConfigError: an option that means nothing in virtual time, or a bad one.
    """
    from pals.cli.agent import config_of

    for name, value in (
        ("--metrics-port", args.metrics_port),
        ("--budget-port", args.budget_port),
        ("--journal", args.journal),
        ("--writer", args.writer),
    ):
        if value:
            raise ConfigError(
                f"{name} has no meaning in virtual time: no port is opened, journals go to --out. Nothing was started"
            )
    runs = []
    for policy in (args.policy or "static").split(","):
        config = config_of(argparse.Namespace(**{**vars(args), "policy": policy.strip()}))
        output = replace(config.output, journal=str(folder / f"{policy.strip()}.jsonl"))
        runs.append((policy.strip(), replace(config, output=output)))
    return runs


def faults_of(args: argparse.Namespace) -> FaultSchedule:
    """The schedule of --faults; empty where it is not given.

    Raises:
        ConfigError: the file is wrong, or names what is not here: a board too many, or an event of the engine.
    """
    from pals.plant.faults import FaultSchedule, engine_events, load_faults
    from pals.plant.specs import parse_boards

    if not args.faults:
        return FaultSchedule()
    faults = load_faults(Path(args.faults))
    faults.check_boards(parse_boards(args.boards)[1])
    if strange := {e.kind for e in engine_events(faults.events)}:
        raise ConfigError(
            f"{', '.join(sorted(strange))} in {args.faults}: here a real vLLM runs, only its boards can fail. Nothing was started"
        )
    return faults


def conclude(args: argparse.Namespace, folder: Path, results: Sequence[VirtualResult]) -> int:
    """Print the table and where things are."""
    from pals.experiments.plant_checks.validation import validation_note
    from pals.views.report import outcome_table, wide_console

    outcomes = [r.outcome for r in results]
    (folder / "outcomes.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    console = wide_console()
    title = f"EMULATED, virtual clock: real vLLM serves {args.model}, simulated boards ({args.boards})"
    console.print(outcome_table(outcomes, title=title))
    console.print(validation_note(), soft_wrap=True)
    total_s, wall_s = sum(r.virtual_s for r in results), sum(r.wall_s for r in results)
    console.print(f"{total_s:.0f} s of virtual time in {wall_s:.1f} s: {total_s / wall_s:.1f}x real time")
    console.print(f"journals, for `pals replay`: {folder}", soft_wrap=True)
    unanswered = sum(o.failed - o.refused + o.wrong_length for o in outcomes)
    if unanswered:
        say(f"{unanswered} requests were not answered with exactly the tokens asked for")
    return 1 if unanswered else 0


def profile(args: argparse.Namespace, rest: list[str]) -> int:
    """Sweep in virtual time and write the profile; 130 and a partial file on Ctrl-C."""
    from pals.cli.agent import stopping
    from pals.cli.extras import require

    require("scipy")
    from pals.cli.profile import Target, measure_target

    stop = threading.Event()
    with stopping(stop), node_of(args, rest) as node:
        from pals.engines.virtual_engine import VirtualClosedLoop
        from pals.experiments.virtual_run import running

        with running(node) as live:
            return measure_target(
                args,
                Target(
                    boards=live.nvml.boards, channel=live.channel, load=VirtualClosedLoop(live.engine, seed=args.seed),
                    clock=live.grid_clock(stop), folder=node.folder, emulated=True, context_tokens=live.engine.context_tokens,
                ),
            )  # fmt: skip


@contextmanager
def node_of(args: argparse.Namespace, rest: list[str]) -> Iterator[VirtualNode]:
    """The node asked for, with a run directory of its own; this process becomes one that emulates."""
    from pals.cli.extras import require
    from pals.cli.serve import cache_folder
    from pals.cli.vllm_options import PARALLEL, given
    from pals.engines.model_zoo import full_name, local_folder
    from pals.plant.specs import parse_boards

    require("vllm", "pynvml")
    spec, count = parse_boards(args.boards)
    name, model = args.model, Path(args.model)
    if not model.is_dir():
        name = full_name(args.model)
        model = local_folder(args.model, cache_folder())
    parallel = any(given(rest, *flags) for flags in PARALLEL)
    options = rest if parallel else [*rest, "--tensor-parallel-size", str(count)]
    with tempfile.TemporaryDirectory(prefix="pals-virtual-") as scratch:
        from pals.experiments.virtual_run import BANK_FILE, VirtualNode

        folder = Path(scratch)
        say(f"EMULATED, virtual clock: {count} × {spec.nvml_name}; no GPU is used, every watt and second is simulated")
        with emulating(name, folder, folder / BANK_FILE):
            yield VirtualNode(
                model=model, options=options, spec=spec, count=count, board_seed=args.seed_boards, folder=folder
            )


def reproducing(argv: Sequence[str], policy: str, *, without: Sequence[str] = ("--out",)) -> str:
    """The command line of one policy's run, without what may differ between runs that must be equal."""
    kept: list[str] = []
    skip = False
    for arg in argv:
        if skip or arg.split("=")[0] in (*without, "--policy"):
            skip = not skip and "=" not in arg
            continue
        kept.append(arg)
    return shlex.join(["pals", *kept, "--policy", policy])
