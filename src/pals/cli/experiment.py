"""`pals experiment`: runs experiments on the simulated plant, keeps their rows, prints tables and verdicts, makes a report of them.

A missed target is a result: the exit code is 0 all the same.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pals.cli.experiment_report import add_report_options, report
from pals.cli.extras import require
from pals.core.errors import ConfigError

if TYPE_CHECKING:
    from pals.experiments.lab.conduct import Conducted, Job
    from pals.experiments.lab.experiment import Experiment, Wish

OUT = Path("out/experiments")
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
RUN_OPTIONS = {"--policy": "policy", "--model": "model", "--boards": "boards", "--trace": "trace"}
OVERRIDES = {"policies": "--policy", "models": "--model", "boards": "--boards", "trace": "--trace"}


def add_experiment(commands: Any) -> None:
    """The `experiment` command."""
    p = commands.add_parser(
        "experiment",
        help="run experiments on simulated plants: energy, promises, comparisons of policies",
        description="`list` names the experiments, `run NAME… | all` runs them (so does NAME alone): cells not yet kept in the folder are "
        "simulated, then tables and verdicts are printed. `report [NAME…]` makes one report of all rows that are kept. Everything is "
        "simulated. Run the same command to go on after Ctrl-C. "
        "docs/experiments.md",
        allow_abbrev=False,
    )
    p.add_argument("words", nargs="+", metavar="list | run NAME… | run all | report [NAME…]", help="what to do")
    p.add_argument("--full", action="store_true", help="more seeds (each experiment says how many)")
    p.add_argument("--seed", type=int, default=1, metavar="N", help="the first seed, at least 1 (default 1)")
    p.add_argument("--policy", action="append", metavar="P,…", help="these policies alone")
    p.add_argument("--model", action="append", metavar="MODEL,…", help="shipped model, or folder with a config.json")
    p.add_argument("--boards", action="append", metavar="NxBOARD,…", help="boards, e.g. 4xa100-sxm4-80gb")
    p.add_argument("--trace", metavar="NAME|FILE", help="another trace, where the experiment replays one")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: the machine's cores)")
    p.add_argument("--again", action="store_true", help="run cells that are kept already, too")
    p.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"rows and pages (default {OUT})")
    add_report_options(p)


def experiment(args: argparse.Namespace) -> int:
    """List or run; 1 where a cell failed, 130 on Ctrl-C.

    Raises:
        ConfigError: an unknown experiment, or an option that makes no sense for one; nothing was run.
    """
    require("numba", "scipy", "pyarrow")
    verb, *names = args.words
    if verb == "list":
        return list_all(names)
    if verb == "report":
        check_report(args)
        return report(args, chosen(names or ["all"]))
    check_no_report(args)
    if verb != "run":
        names = args.words
    return run_all(args, chosen(names), wish_of(args))


def check_report(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for an option that only a run has a use for."""
    options = {
        "--full": args.full,
        "--again": args.again,
        "--seed": args.seed != 1,
        "--workers": args.workers is not None,
    }
    options |= {option: getattr(args, of) is not None for option, of in RUN_OPTIONS.items()}
    if given := [option for option, is_given in options.items() if is_given]:
        raise ConfigError(
            f"{given[0]} makes no sense for a report, which takes the rows that are kept. Nothing was written"
        )


def check_no_report(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for an option that only a report has a use for."""
    for option, value in (
        ("--rows", args.rows),
        ("--main-figure", args.main_figure),
        ("--main-table", args.main_table),
    ):
        if value is not None:
            raise ConfigError(f"{option} belongs to `pals experiment report`. Nothing was run")


def list_all(names: Sequence[str]) -> int:
    """Name and question of each."""
    from pals.experiments.lab.catalogue import EXPERIMENTS

    if names:
        raise ConfigError(f"`pals experiment list` takes no names ({', '.join(names)})")
    for e in EXPERIMENTS.values():
        print(f"{e.name:20} {e.question}")
    return 0


def chosen(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names, each once.

    Raises:
        ConfigError: none, or an unknown one.
    """
    from pals.experiments.lab.catalogue import EXPERIMENTS

    if list(names) == ["all"]:
        return list(EXPERIMENTS.values())
    for name in names:
        if name not in EXPERIMENTS:
            near = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"unknown experiment {name!r}; {hint}known: {', '.join(EXPERIMENTS)}, or `all`. Nothing was run"
            )
    if not names:
        raise ConfigError("name an experiment, or `all`; `pals experiment list` lists them. Nothing was run")
    return [EXPERIMENTS[name] for name in dict.fromkeys(names)]


def wish_of(args: argparse.Namespace) -> Wish:
    """What is asked for.

    Raises:
        ConfigError: a number that makes no sense.
    """
    from pals.experiments.lab.experiment import Wish

    if args.seed < 1:
        raise ConfigError(
            f"--seed {args.seed} must be at least 1: 0 would look like the plant's own constants. Nothing was run"
        )
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers} must be at least 1. Nothing was run")
    return Wish(
        full=args.full, seed=args.seed, policies=names_of(args.policy), models=names_of(args.model),
        boards=names_of(args.boards), trace=args.trace,
    )  # fmt: skip


def names_of(given: Sequence[str] | None) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    return tuple(dict.fromkeys(n.strip() for text in given or () for n in text.split(",") if n.strip()))


def check_takes(experiment: Experiment, wish: Wish) -> None:
    """Raise `ConfigError` for an option that the experiment has no use for."""
    for name, option in OVERRIDES.items():
        if getattr(wish, name) and name not in experiment.takes:
            raise ConfigError(f"{option} makes no sense for the experiment {experiment.name}. Nothing was run")


def run_all(args: argparse.Namespace, experiments: Sequence[Experiment], wish: Wish) -> int:
    """Run what is not kept, then show every experiment that was asked for."""
    from pals.cli.agent import stopping
    from pals.cli.main import say
    from pals.experiments.lab.conduct import conduct, jobs_of, pending

    for e in experiments:
        check_takes(e, wish)
    jobs = {e.name: jobs_of(e, e.cells(wish), args.out) for e in experiments}
    every = [job for of_one in jobs.values() for job in of_one]
    todo = every if args.again else pending(every)
    workers, stop, began_s = args.workers or os.cpu_count() or 1, threading.Event(), time.monotonic()
    say(
        f"SIMULATED: {len(todo)} of {len(every)} cells to run in {workers} processes; the others are kept in {args.out}"
    )
    with stopping(stop), bar_of(todo) as done:
        conducted = conduct(todo, workers=workers, stop=stop.is_set, done=done)
    wall_s = time.monotonic() - began_s
    for e in experiments:
        show(args, e, jobs[e.name], wall_s if len(experiments) == 1 and todo else None)
    say(f"{conducted.ran} cells in {wall_s:.0f} s of wall time")
    return conclude(args, conducted)


def conclude(args: argparse.Namespace, conducted: Conducted) -> int:
    """Say what failed or is left; the exit code."""
    from pals.cli.main import say

    for name, why in conducted.failed:
        say(f"failed: {name}: {why}")
    if not conducted.complete:
        say(f"interrupted: what is done is kept in {args.out}; run the same command to go on")
        return EXIT_INTERRUPTED
    return EXIT_FAILED if conducted.failed else 0


def show(args: argparse.Namespace, experiment: Experiment, jobs: Sequence[Job], wall_s: float | None) -> None:
    """Print the page, and keep it and the verdicts beside the rows."""
    from pals.experiments.lab.conduct import pending
    from pals.experiments.lab.pages import Page, markdown_of
    from pals.experiments.lab.store import Store, fresh_rows

    folder, cells = args.out / experiment.name, [j.cell for j in jobs]
    rows = fresh_rows(Store(folder), experiment, cells)
    page = Page(
        command=shlex.join(["pals", *args.given]), seeds=sorted({c.seed for c in cells}), cells=len(cells),
        missing=len(pending(jobs)), wall_s=wall_s,
    )  # fmt: skip
    text = markdown_of(experiment, rows, page)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "page.md").write_text(text, encoding="utf-8")
    verdicts = {
        "experiment": experiment.name,
        **asdict(page),
        "verdicts": [asdict(v) for v in experiment.verdicts(rows)],
    }
    (folder / "verdicts.json").write_text(json.dumps(verdicts, indent=1) + "\n", encoding="utf-8")


def bar_of(todo: Sequence[Job]) -> Any:
    """A context that gives what is told of each finished job: a bar on stderr with the time left."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def showing() -> Any:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("simulating", total=len(todo))
            yield lambda job: bar.update(task, advance=1, description=job.name)

    return showing()
