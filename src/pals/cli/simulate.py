"""`pals simulate`: policies over hours of a trace in event time; requests and ticks as Parquet, a table and a figure."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pals.cli.emulate import add_board_options, reproducing
from pals.cli.main import add_control_options, say
from pals.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from pals.experiments.simulated_load import LoadWish
    from pals.experiments.simulated_run import PolicyTask, Simulation
    from pals.models.profile import Profile
    from pals.plant.workload import LengthSource
    from pals.runtime.config import Config

OUT = "out/simulate"
LAUNCH_SEQUENCES = 64  # as the demo and the profiles that come with it


def add_simulate(commands: Any) -> None:
    """The `simulate` command."""
    p = commands.add_parser(
        "simulate",
        help="policies over hours of a trace on a simulated replica, thousands of times faster than real time",
        description="Serve a trace on a simulated engine and simulated boards under one or more policies. The controller, its guard "
        "and its tick are the live ones; every watt and second is simulated. A seed gives the same Parquet files. docs/simulate.md",
        allow_abbrev=False,
    )
    p.add_argument(
        "--model", required=True, metavar="MODEL", help="model name (`pals models`) or folder with a config.json"
    )
    add_board_options(p)
    add_load_options(p)
    add_control_options(p, several_policies=True)
    p.add_argument(
        "--max-model-len", type=int, metavar="N", help="longer requests are left out (default: the model's context)"
    )
    p.add_argument("--no-enable-prefix-caching", action="store_true", help="compute every prompt in full")
    p.add_argument(
        "--faults", metavar="FILE", help="JSON or CSV of faults: time_s, kind, board, value (docs/simulate.md)"
    )
    add_plant_options(p)
    p.add_argument("--workers", type=int, default=1, metavar="N", help="policies at a time (default 1)")
    p.add_argument("--journal", action="store_true", help="also write a journal for each policy, for `pals replay`")
    p.add_argument("--out", default=OUT, metavar="FOLDER", help=f"Parquet files, table, figure (default {OUT})")


def add_plant_options(p: argparse.ArgumentParser) -> None:
    """How the simulated engine is launched, and how far the plant's constants are moved."""
    p.add_argument(
        "--max-num-seqs",
        type=int,
        default=LAUNCH_SEQUENCES,
        metavar="N",
        help=f"launch batch (default {LAUNCH_SEQUENCES})",
    )
    p.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="tokens of a step (default: as vLLM's server on such a board)",
    )
    p.add_argument("--perturb-seed", type=int, metavar="N", help="move the plant's constants at random, by this seed")
    p.add_argument(
        "--spread", type=float, metavar="S", help="how far: standard deviation of the factors (default 0.15)"
    )


def add_load_options(p: argparse.ArgumentParser) -> None:
    """Which requests arrive, and when."""
    p.add_argument(
        "--trace", default="azure-2023-conv", metavar="NAME|FILE",
        help="azure-2023-conv (default), azure-2023-code, mooncake-synthetic, servegen-m-large, vidur-arxiv, or a file",
    )  # fmt: skip
    p.add_argument("--data", metavar="DIR", help="where the committed traces are (default: data/ of the checkout)")
    p.add_argument("--trace-format", metavar="NAME", help="of the file (default: known from its header)")
    p.add_argument("--lengths", metavar="NAME|FILE", help="draw prompt and output lengths from another trace")
    p.add_argument("--arrivals", default="trace", metavar="LAW", help="trace (default), poisson, or gamma:CV")
    p.add_argument("--rate", type=float, metavar="X", help="mean requests per second (default: the trace's)")
    p.add_argument(
        "--load", type=float, metavar="SHARE", help="rate as a share of what the engine can answer, e.g. 0.65"
    )
    p.add_argument("--scaling", default="time", metavar="HOW", help="how a rate is reached: time (default) or thin")
    p.add_argument("--start-s", type=float, default=0.0, metavar="S", help="where in the trace to begin (default 0)")
    p.add_argument("--hours", type=float, metavar="H", help="cut or repeat the trace to so long (default: as it is)")
    p.add_argument("--seed", type=int, default=0, help="seed of every draw (default 0)")


def simulate(args: argparse.Namespace) -> int:
    """Run the policies, write the files, print the table; 130 and what there is so far on Ctrl-C."""
    from pals.cli.agent import stopping
    from pals.cli.extras import require
    from pals.cli.simulate_report import conclude, describe, progress_of
    from pals.experiments.simulated_policies import run_policies

    require("numba", "pyarrow", "matplotlib")
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers} must be at least 1. Nothing was started")
    stop = threading.Event()
    with stopping(stop):
        sim = simulation_of(args)
        tasks = tasks_of(args, sim)
        check_tasks(sim, tasks)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        describe(sim, tasks)
        with progress_of(sim, tasks) as report:
            results = run_policies(sim, tasks, workers=args.workers, stop=stop, report=report)
    return conclude(args, sim, tasks, results)


def simulation_of(args: argparse.Namespace) -> Simulation:
    """Engine, boards and requests.

    Raises:
        ConfigError: an unknown model, board or trace, or sizes that do not fit.
    """
    from pals.experiments.simulated_faults import read_faults
    from pals.experiments.simulated_load import workload_of
    from pals.experiments.simulated_run import capacity_per_s

    engine = engine_of(args)
    wish = wish_of(args)
    engine = replace(engine, prefix_caching=not args.no_enable_prefix_caching)
    if args.faults:
        engine = replace(engine, faults=read_faults(Path(args.faults), boards=engine.boards))
    replica = engine.replica()
    replica.advance(1e-3)  # compiled here where it was not before, so that no run's speed counts it
    context = min(replica.kv_tokens, args.max_model_len or engine.model_context)
    if context < 2:
        raise ConfigError(f"--max-model-len {context} leaves no room for a request. Nothing was started")
    engine = replace(engine, context_tokens=context)

    def capacity_of(lengths: LengthSource, rng: np.random.Generator) -> float:
        answered = capacity_per_s(engine, lengths, rng)
        say(f"capacity: {answered:.2f} requests/s at the launch settings, when work never lacks")
        return answered

    whole = workload_of(wish, capacity_of)
    workload = whole.within_context(context)
    if not len(workload):
        raise ConfigError(f"every request is longer than {context} tokens, what this engine takes. Nothing was started")
    return replace(engine, workload=workload, left_out=len(whole) - len(workload))


def engine_of(args: argparse.Namespace) -> Simulation:
    """Engine and boards, without requests or faults.

    Raises:
        ConfigError: an unknown model or board, or a spread that makes no sense.
    """
    from pals.engines.model_zoo import read_config
    from pals.experiments.simulated_run import EMPTY, Simulation
    from pals.plant.faults import FaultSchedule
    from pals.plant.specs import parse_boards, usual_step_tokens

    spec, count = parse_boards(args.boards)
    model, config = read_config(args.model)
    return Simulation(
        model=model, config=config, spec=spec, boards=count, max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens or usual_step_tokens(spec, args.max_num_seqs),
        prefix_caching=True, board_seed=args.seed_boards, context_tokens=1, workload=EMPTY, perturb_seed=args.perturb_seed,
        spread=spread_of(args), faults=FaultSchedule(),
    )  # fmt: skip


def spread_of(args: argparse.Namespace) -> float:
    """How far the plant's constants are moved.

    Raises:
        ConfigError: without a seed, or outside 0..0.5.
    """
    from pals.plant.perturb import SPREAD

    if args.spread is None:
        return SPREAD
    if args.perturb_seed is None:
        raise ConfigError("--spread needs --perturb-seed: without it nothing is moved. Nothing was started")
    if not 0 <= args.spread <= 0.5:
        raise ConfigError(f"--spread {args.spread:g} must lie in 0..0.5. Nothing was started")
    return float(args.spread)


def wish_of(args: argparse.Namespace) -> LoadWish:
    """The load asked for.

    Raises:
        ConfigError: one that makes no sense.
    """
    from pals.experiments.plant_checks.measured import data_folder
    from pals.experiments.simulated_load import LoadWish
    from pals.plant.traces import COMMITTED
    from pals.plant.workload import SCALINGS

    if args.scaling not in SCALINGS:
        raise ConfigError(f"--scaling {args.scaling}: known are {', '.join(SCALINGS)}. Nothing was started")
    law, _, cv = args.arrivals.partition(":")
    if (law, bool(cv)) not in (("trace", False), ("poisson", False), ("gamma", True)) or not number(cv or "1"):
        raise ConfigError(
            f"--arrivals {args.arrivals}: known are trace, poisson and gamma:CV, e.g. gamma:2.5. Nothing was started"
        )
    committed = any(t in COMMITTED or t.startswith("servegen-") for t in (args.trace, args.lengths or ""))
    return LoadWish(
        trace=args.trace, folder=data_folder(Path(args.data) if args.data else None) / "traces" if committed else None, kind=args.trace_format,
        lengths=args.lengths, cv=None if law == "trace" else float(cv or 1.0), rate_per_s=args.rate, load=args.load,
        scaling=args.scaling, start_s=args.start_s, hours=args.hours, seed=args.seed,
    )  # fmt: skip


def number(text: str) -> bool:
    """Whether it is a number above 0."""
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def tasks_of(args: argparse.Namespace, sim: Simulation) -> list[PolicyTask]:
    """The policies asked for, each with its configuration and profile.

    Raises:
        ConfigError: one that is unknown, asked for twice, or lacks a profile.
    """
    from pals.control.policies import UNPROFILED
    from pals.experiments.simulated_run import PolicyTask

    names = [name.strip() for given in args.policy or ["static"] for name in given.split(",")]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ConfigError(f"--policy {twice[0]} is given twice. Nothing was started")
    folder, tasks = Path(args.out), []
    for i, name in enumerate(names):
        config = config_for(args, sim, name)
        profile, path = (None, None) if name in UNPROFILED else profile_of(args, sim, name)
        tasks.append(
            PolicyTask(
                name=name,
                config=replace(config, control=replace(config.control, profile=path)),
                profile=profile,
                ticks=folder / f".ticks-{i}.parquet",
                journal=folder / f"{name}.jsonl" if args.journal else None,
                command=reproducing(args.given, name, without=("--out", "--workers")),
            )
        )
    return tasks


def check_tasks(sim: Simulation, tasks: Sequence[PolicyTask]) -> None:
    """Raise `ConfigError` for what the last policy would be refused for, before the first has run for long; say what is accepted."""
    from pals.experiments.simulated_node import SimulatedGroup
    from pals.experiments.simulated_run import accepted_by, rig_of
    from pals.runtime.agent import told_accepted

    for task in tasks:
        replica = sim.replica()
        rig = rig_of(sim, task, replica, SimulatedGroup(replica, sim.spec, sim.boards))
        if differences := accepted_by(sim, task, rig.meters):
            say(f"{task.name}: {told_accepted(str(task.config.control.profile), differences)}")


def config_for(args: argparse.Namespace, sim: Simulation, policy: str) -> Config:
    """The configuration of one policy; targets that nobody gave are those of the demo.

    Raises:
        ConfigError: a bad option or file.
    """
    from pals.cli.agent import config_of
    from pals.experiments.scenarios import slo_for

    quiet = {
        "journal": None,
        "metrics_port": 0,
        "dcgm_port": 0,
        "budget_port": 0,
        "budget_host": None,
        "budget_token": None,
        "writer": None,
    }
    given = config_of(argparse.Namespace(**{**vars(args), **quiet, "policy": "static"})).of(sim.engine).slo
    usual = slo_for(sim.asked_tokens_per_s)
    targets: dict[str, float | None] = {}
    if given.throughput_tokens_s is None and given.throughput_share is None:
        targets["throughput_target"] = usual.throughput_tokens_s
    if given.ttft_p95_s is None and given.ttft_p99_s is None:
        targets["slo_ttft_p95"] = usual.ttft_p95_s
    if given.tpot_p95_s is None and given.tpot_p99_s is None:
        targets["slo_tpot_p95"] = usual.tpot_p95_s
    return config_of(argparse.Namespace(**{**vars(args), **quiet, **targets, "policy": policy})).of(sim.engine)


def profile_of(args: argparse.Namespace, sim: Simulation, policy: str) -> tuple[Profile, str]:
    """The profile given, else the committed one of this model on these boards, and its path.

    Raises:
        ConfigError: neither.
    """
    from pals.experiments.scenarios import SCENARIOS
    from pals.plant.specs import parse_boards
    from pals.runtime.agent import load_profile

    if args.profile:
        return load_profile(Path(args.profile)), args.profile
    for s in SCENARIOS:
        if (s.model, parse_boards(s.boards)) == (sim.model, (sim.spec, sim.boards)):
            return load_profile(s.profile), str(s.profile)
    raise ConfigError(
        f"policy {policy} needs a profile, and none comes with PALS for {sim.model} on {sim.boards} × {sim.spec.name}. "
        f"Make one: `{sim.how_to_profile}`, then give --profile profile.json. Nothing was started"
    )
