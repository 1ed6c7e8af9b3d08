"""`pals experiment report`: one report of the rows on disk, as HTML and Markdown, and what a README carries of it; nothing is run."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pals.cli.extras import require
from pals.core.errors import ConfigError

if TYPE_CHECKING:
    from pals.experiments.lab.experiment import Experiment
    from pals.experiments.lab.report.sections import Told

ROWS = Path("out/experiments")
REPORTS = ("report.html", "report.md")
KINDS = (".html", ".md")
FIGURES = ("png", "svg")


def add_report_options(p: argparse.ArgumentParser) -> Any:
    """Options of `report` alone."""
    g = p.add_argument_group(
        "report", "of rows on disk; --out names a .html or .md file (default: both, in the folder of the rows)"
    )
    g.add_argument("--rows", type=Path, metavar="DIR", help=f"where the rows are (default {ROWS})")
    g.add_argument("--main-figure", type=Path, metavar="FILE", help="write the main figure alone, as .png or .svg")
    g.add_argument(
        "--main-table", type=Path, metavar="FILE.md", help="put the main table between the marks of this file"
    )
    return g


def report(args: argparse.Namespace, experiments: Sequence[Experiment]) -> int:
    """Write what is asked for; without rows of any experiment nothing is written.

    Raises:
        ConfigError: no rows, rows of another form, or a file that cannot be written.
    """
    from pals.cli.main import say
    from pals.experiments.lab.report.sections import read_all

    require("matplotlib")
    place, only = args.rows or ROWS, args.main_figure or args.main_table
    files = [] if only and args.out == ROWS else files_of(args.out, place)
    check_figure(args.main_figure)
    told = read_all(experiments, place)
    names = {t.experiment.name for t in told}
    missing = [e for e in experiments if e.name not in names]
    if not told:
        raise ConfigError(
            f"no rows of {', '.join(e.name for e in experiments)} in {place}; run `pals experiment run` first. Nothing was written"
        )
    for e in missing:
        say(f"no rows of {e.name}: left out")
    command = shlex.join(["pals", *args.given])
    try:
        for path in files:
            write_report(told, missing, command, path)
            say(f"{path}: {len(told)} experiments, {sum(len(t.charts) for t in told)} figures")
        if args.main_figure is not None:
            write_figure(told, args.main_figure)
        if args.main_table is not None:
            write_table(told, command, args.main_table)
    except OSError as e:
        raise ConfigError(f"cannot write the report: {e}. Files that were named before are written") from e
    return 0


def files_of(out: Path, place: Path) -> list[Path]:
    """What is to be written.

    Raises:
        ConfigError: neither HTML nor Markdown.
    """
    if out == ROWS:
        return [place / name for name in REPORTS]
    if out.suffix not in KINDS:
        raise ConfigError(f"--out {out}: of a report the name must end in {' or '.join(KINDS)}. Nothing was written")
    return [out]


def check_figure(path: Path | None) -> None:
    """Raise `ConfigError` for a figure's name of another kind."""
    if path is not None and path.suffix.removeprefix(".") not in FIGURES:
        raise ConfigError(f"--main-figure {path}: the name must end in .png or .svg. Nothing was written")


def write_report(told: Sequence[Told], missing: Sequence[Experiment], command: str, path: Path) -> None:
    """As the suffix says."""
    from pals.experiments.lab.report.markdown import write_markdown
    from pals.experiments.lab.report.page_html import html_page
    from pals.experiments.lab.report.sections import TITLE, report

    blocks = report(told, missing, command)
    if path.suffix == ".md":
        write_markdown(blocks, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html_page(TITLE, blocks), encoding="utf-8")


def write_figure(told: Sequence[Told], path: Path) -> None:
    """The main figure; says what it is made of.

    Raises:
        ConfigError: no experiment with rows has a panel in it.
    """
    from pals.cli.main import say
    from pals.experiments.lab.report.figures import MAIN, main_figure
    from pals.views.chart_drawing import drawn

    chart = main_figure({t.experiment.name: t.rows for t in told})
    if chart is None:
        raise ConfigError(f"the main figure needs rows of one of {', '.join(MAIN)}. It was not written")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn(chart, path.suffix.removeprefix(".")))
    say(f"{path}: {chart.caption}")


def write_table(told: Sequence[Told], command: str, path: Path) -> None:
    """The main table, between the marks.

    Raises:
        ConfigError: the file cannot be read, or holds no marks.
    """
    from pals.cli.main import say
    from pals.experiments.lab.report.headline import headline, put_between

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--main-table {path}: {e}. It was not written") from e
    try:
        written = put_between(text, headline(told, command))
    except ConfigError as e:
        raise ConfigError(f"--main-table {path}: {e}") from e
    path.write_text(written, encoding="utf-8")
    say(f"{path}: the main table is between its marks")
