"""`pals profile evaluate`: the fitted profile and its rivals against withheld rows, simulated and measured."""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pals.cli.extras import require
from pals.core.errors import ConfigError

if TYPE_CHECKING:
    from pals.experiments.profile_checks.judge import Judged
    from pals.experiments.profile_checks.line import Line
    from pals.experiments.profile_checks.run import Job, Unjudged
    from pals.experiments.profile_checks.table import Told

QUICK = {"models": "OLMoE-1B-7B", "boards": "h100-sxm5-80gb", "seeds": "1", "rival_seeds": 1, "level_seeds": 1}


def add_evaluate(subparsers: Any) -> None:
    """The `evaluate` kind of `pals profile`."""
    p = subparsers.add_parser(
        "evaluate",
        help="print how far profiles are from the truth, and their rivals on the same rows",
        description="Simulate engines on plants with moved constants, sweep them, and compare the fitted profile, a random forest, a "
        "polynomial, boosting and interpolation on withheld rows; the same on public measurements. Results are kept a case at "
        "a time: run the same command to go on. Exit code 1 where a target is missed.",
    )
    p.add_argument("--models", metavar="A,B", help="shipped models (default: all)")
    p.add_argument("--boards", metavar="A,B", help="4xa100-sxm4-80gb, h100-sxm5-80gb, 8xh200-sxm5-141gb (default: all)")
    p.add_argument("--seeds", metavar="A,B", help="of the plants' constants, at least 1 (default 1 to 10)")
    p.add_argument("--plants", type=int, metavar="N", help="each engine on N of them, others for each (default: all)")
    p.add_argument(
        "--rival-seeds",
        type=int,
        default=3,
        metavar="N",
        help="judge the rivals on the first N of them (default 3); 0: nowhere",
    )
    p.add_argument(
        "--level-seeds",
        type=int,
        default=1,
        metavar="N",
        help="withhold levels and choose points on N plants of each (default 1)",
    )
    p.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default 2)")
    p.add_argument("--no-simulated", action="store_true", help="measured sets alone")
    p.add_argument("--no-silicon", action="store_true", help="simulated engines alone")
    p.add_argument("--quick", action="store_true", help="one model on one board on one plant, and no measured set")
    p.add_argument("--data", type=Path, metavar="DIR", help="the measured data (default: data/ of the checkout)")
    p.add_argument(
        "--out", type=Path, default=Path("out/profile-evaluation"), metavar="DIR",
        help="rows, results, page, summary (default out/profile-evaluation)",
    )  # fmt: skip
    p.add_argument("--record", action="store_true", help="also keep page and summary in the documentation and package")
    p.set_defaults(function=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Print the table; 0 where every target is reached, 1 where one is missed, 130 on Ctrl-C.

    Raises:
        ConfigError: bad options (nothing was done), or cases that could not be judged, named behind the table of the others.
    """
    require("scipy", "sklearn", "numba", "pyarrow")
    from pals.cli.agent import stopping
    from pals.cli.main import say
    from pals.experiments.profile_checks.judge import Judged
    from pals.experiments.profile_checks.summary import lines_of

    check_options(args)
    jobs = jobs_of(args)
    if not jobs:
        raise ConfigError("no case is left: none of these models fits these boards. Nothing was done")
    stop = threading.Event()
    with stopping(stop):
        found = run_all(jobs, args.workers, stop)
    if len(found) < len(jobs):
        say(f"interrupted: {len(found)} of {len(jobs)} cases are kept in {args.out}; run the same command to go on")
        return 130
    lines = lines_of([case for case in found if isinstance(case, Judged)])
    failed = [case for case in found if not isinstance(case, Judged)]
    show(args, lines, told_of(jobs), record=args.record and not failed)
    if failed:
        told = "; ".join(f"{case.name}: {case.why}" for case in failed)
        raise ConfigError(f"{len(failed)} of {len(jobs)} cases could not be judged, the table is of the others: {told}")
    return 1 if any(line.reached is False for line in lines) else 0


def check_options(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for options that exclude one another, or make no sense."""
    restricted = (args.quick, args.models, args.boards, args.seeds, args.data, args.no_simulated, args.no_silicon)
    if args.record and any(restricted):
        raise ConfigError("--record keeps every case; leave out what restricts them. Nothing was done")
    if args.quick and any((args.models, args.boards, args.seeds, args.data, args.no_simulated)):
        raise ConfigError(
            "--quick is one model on one board on one plant; leave out what names others. Nothing was done"
        )
    if args.workers < 1 or min(args.rival_seeds, args.level_seeds) < 0:
        raise ConfigError("--workers must be at least 1, --rival-seeds and --level-seeds at least 0. Nothing was done")


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Simulated and measured cases.

    Raises:
        ConfigError: unknown names or numbers, or data that cannot be read.
    """
    from pals.experiments.plant_checks.measured import data_folder
    from pals.experiments.profile_checks.combination import SEEDS, combinations
    from pals.experiments.profile_checks.run import Job
    from pals.experiments.profile_checks.silicon import silicon_cases

    if args.quick:
        args = argparse.Namespace(**{**vars(args), **QUICK, "no_silicon": True})
    seeds, jobs = seeds_of(args.seeds) or SEEDS, []
    if not args.no_simulated:
        found = combinations(names_of(args.models), names_of(args.boards), seeds)
        engines = list(dict.fromkeys((c.model, c.boards) for c in found))
        for turn in range(min(len(seeds), args.plants or len(seeds))):
            for i, engine in enumerate(engines):  # each begins with another plant, so that every plant has its turn
                c = next(c for c in found if (c.model, c.boards, c.seed) == (*engine, seeds[(i + turn) % len(seeds)]))
                rivals, levels = turn < args.rival_seeds, turn < args.level_seeds
                jobs.append(Job(subject=c, rivals=rivals, levels=levels, folder=args.out))
    if not args.no_silicon:
        cases = silicon_cases(data_folder(args.data))
        jobs += [Job(subject=case, rivals=args.rival_seeds > 0, folder=args.out) for case in cases]
    return jobs


def run_all(jobs: list[Job], workers: int, stop: threading.Event) -> list[Judged | Unjudged]:
    """With a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pals.experiments.profile_checks.run import run_jobs

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("judging", total=len(jobs))
        return run_jobs(jobs, workers=workers, stop=stop.is_set, done=lambda job: bar.advance(task))


def show(args: argparse.Namespace, lines: list[Line], told: Told, *, record: bool) -> None:
    """Print, and write page and summary."""
    from rich.console import Console

    from pals.experiments.profile_checks.table import PAGE, RECORDED, print_table, write_page, write_summary

    print_table(Console() if sys.stdout.isatty() else Console(width=190), lines, told)
    pages = [args.out / "profile-evaluation.md", *([PAGE] if record else [])]
    summaries = [args.out / "summary.json", *([RECORDED] if record else [])]
    for path in pages:
        write_page(path, lines, told)
    for path in summaries:
        write_summary(path, lines, told)
    print(f"page and summary: {', '.join(map(str, (*pages, *summaries)))}")


def told_of(jobs: list[Job]) -> Told:
    """Command, and what is to be known of seeds, splits, rivals and assumptions."""
    from pals.experiments.profile_checks.remarks import remarks_of
    from pals.experiments.profile_checks.table import Told

    return Told(command=shlex.join(["pals", *sys.argv[1:]]), remarks=remarks_of(jobs))


def names_of(text: str | None) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",")] if text else []


def seeds_of(text: str | None) -> tuple[int, ...]:
    """Seeds separated by commas.

    Raises:
        ConfigError: no whole numbers above 0: 0 would look like the plant's default constants.
    """
    try:
        seeds = tuple(int(name) for name in names_of(text))
    except ValueError as e:
        raise ConfigError(f"--seeds takes whole numbers separated by commas ({e}). Nothing was done") from e
    if any(seed < 1 for seed in seeds):
        raise ConfigError("--seeds must be at least 1. Nothing was done")
    return seeds
