"""`pals plant …`: the simulated world against measured data, and its constants fitted anew."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pals.cli.extras import require
from pals.core.errors import ConfigError

if TYPE_CHECKING:
    from pals.experiments.plant_checks.row import CheckRow


def add_plant(commands: Any) -> None:
    """The `plant` command."""
    p = commands.add_parser("plant", help="check the simulated boards and engines against measured data")
    kinds = p.add_subparsers(dest="plant", metavar="WHAT", required=True)
    v = kinds.add_parser(
        "validate",
        help="print the plant's error on data it was not fitted to",
        description="Compare the plant with public measurements: one table a part, mean absolute errors, the split used, and "
        "plots of the residuals. Exit code 1 where a target is missed.",
    )
    v.add_argument(
        "parts", nargs="*", metavar="PART", help="kernels, serving, caps, governor, discrete_events (default: all)"
    )
    v.add_argument("--data", type=Path, metavar="DIR", help="the measured data (default: data/ of the checkout)")
    v.add_argument(
        "--out",
        type=Path,
        default=Path("out/plant"),
        metavar="DIR",
        help="page, plots, summary.json (default out/plant)",
    )
    v.add_argument(
        "--record",
        action="store_true",
        help="also keep the figures: for the demo and `pals simulate` to quote, and in docs/models",
    )
    v.set_defaults(function=validate)
    f = kinds.add_parser(
        "fit",
        help="fit constants anew from the training part of the data",
        description="Write the file of constants into --out; the plant goes on with its own until you copy the file into src/pals/plant. Silicon comes before serving, which finds the activity of H100 and B200 anew.",
    )
    f.add_argument("part", metavar="PART", help="silicon, caps, kernels, serving or timelines")
    f.add_argument("--data", type=Path, metavar="DIR", help="the measured data (default: data/ of the checkout)")
    f.add_argument(
        "--out", type=Path, default=Path("out/plant"), metavar="DIR", help="where the file goes (default out/plant)"
    )
    f.set_defaults(function=fit)


def plant(args: argparse.Namespace) -> int:
    """Run one kind."""
    return int(args.function(args))


def validate(args: argparse.Namespace) -> int:
    """Print the table; 0 where every target is reached, else 1."""
    require("scipy", "pyarrow", "numba", "matplotlib")
    from rich.console import Console

    from pals.experiments.plant_checks.measured import data_folder
    from pals.experiments.plant_checks.validation import SILICON_NOTE

    if args.record and (args.parts or args.data):
        raise ConfigError(
            "--record keeps every part, on the data of the checkout; leave out PART and --data. Nothing was done"
        )
    folder = data_folder(args.data)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(
        f"the plant against {folder}; mean absolute errors, on what was not fitted unless a row says otherwise\n",
        highlight=False,
    )
    results, failed = checked(args, folder, console)
    keep(results, args.out, record=args.record and not failed)
    judged = [row for rows in results.values() for row in rows if not row.in_sample]
    missed = sum(not row.reached for row in judged)
    console.print(SILICON_NOTE, highlight=False)
    console.print(
        f"{len(judged) - missed} of {len(judged)} targets reached, rows in sample not counted; validation.md with plots of the "
        f"residuals, and summary.json, are in {args.out}",
        highlight=False,
    )
    if failed:
        raise ConfigError(f"not checked: {', '.join(failed)}; see above. The other parts are in {args.out}")
    return 1 if missed else 0


def checked(args: argparse.Namespace, folder: Path, console: Any) -> tuple[dict[str, list[CheckRow]], list[str]]:
    """Each part's rows, shown and drawn as they come, and the parts that could not be checked."""
    from pals.experiments.plant_checks.validation import CHECKS, draw, print_rows, run_checks

    results: dict[str, list[CheckRow]] = {}
    failed: list[str] = []
    for name, rows in run_checks(args.parts, folder):
        if isinstance(rows, ConfigError):
            failed.append(name)
            console.print(f"[red]{name}[/red]: {rows}\n", highlight=False)
            continue
        results[name] = rows
        print_rows(console, CHECKS[name], rows)
        draw(args.out / f"validation-{name}.png", rows)
    return results, failed


def keep(results: dict[str, list[CheckRow]], out: Path, *, record: bool) -> None:
    """Write page and summary; with `record` also where the demo, `pals simulate` and the documentation find them."""
    from pals.experiments.plant_checks.validation import PAGES, RECORDED, write_page, write_summary

    write_summary(out / "summary.json", results)
    write_page(out / "validation.md", results)
    if record:
        write_summary(RECORDED, results)
        for page in out.glob("validation*"):
            shutil.copy2(page, PAGES / page.name)


def fit(args: argparse.Namespace) -> int:
    """Write the constants."""
    require("scipy", "pyarrow", "numba")
    from pals.experiments.plant_checks.measured import data_folder
    from pals.experiments.plant_checks.validation import refit

    for path in refit(args.part, data_folder(args.data), args.out):
        print(f"wrote {path}")
    return 0
