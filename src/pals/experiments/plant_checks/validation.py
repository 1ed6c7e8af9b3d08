"""All checks of the plant: run them, show the table, draw the residuals, keep a summary for whoever quotes a simulated figure."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pals import __version__
from pals.core.errors import ConfigError
from pals.experiments.plant_checks.row import CheckRow

#: Modules of this package with `check(folder)`, and what they are about, in the order of the table.
CHECKS: dict[str, str] = {
    "kernels": "times of kernels and layers against shape",
    "serving": "TPOT and power against batch, vLLM",
    "caps": "throughput and power against limit and clock lock",
    "governor": "what a limit does to the clock",
    "discrete_events": "the simulated replica against real vLLM",
}
#: What can be fitted, the module with `fit(folder)`, and the file of constants under `pals/plant` that it makes. Silicon comes before
#: serving, which finds the activity of H100 and B200 anew.
FITS: dict[str, tuple[str, str]] = {
    "silicon": ("silicon", "board_specs.json"),
    "caps": ("caps", "steady_constants.json"),
    "kernels": ("kernel_fit", "kernel_constants.json"),
    "serving": ("serving", "step_constants.json"),
    "timelines": ("request_timelines", "step_constants.json"),
}
#: What the last `pals plant validate --record` found; quoted beside simulated figures.
RECORDED = Path(__file__).parents[1] / "data" / "plant-validation.json"
PAGES = Path(__file__).parents[4] / "docs" / "models"  # of the checkout
#: Rows that simulated figures quote, and as what.
QUOTED = {
    "TPOT against batch, H100, held-out models": "TPOT on H100",
    "power against batch, H100, held-out models": "power on H100",
    "TPOT against batch, B200, held-out models": "TPOT on B200",
    "power against batch, B200, held-out models": "power on B200",
    "throughput against limit, RTX PRO 6000 Blackwell, MoE": "throughput under a limit, RTX PRO 6000",
    "request timelines of vLLM 0.19, dense, TTFT mean": "mean TTFT on RTX 4090",
}
SILICON_NOTE = "rows of our own on silicon: none, no data-centre GPU was at hand"


def run_checks(names: Sequence[str], folder: Path) -> Iterator[tuple[str, list[CheckRow] | ConfigError]]:
    """The rows of each check as it is done, or why it cannot be: one part's data may lack while the others' are there.

    Raises:
        ConfigError: unknown check.
    """
    for name in [known(name, CHECKS) for name in names or CHECKS]:
        try:
            yield name, _module(name).check(folder)
        except ConfigError as e:
            yield name, e


def refit(name: str, folder: Path, into: Path) -> list[Path]:
    """Fit the constants of one part anew; write their files, whole, into the folder `into` and return the paths.

    Raises:
        ConfigError: unknown part, or data that cannot be read.
    """
    module, file = FITS[known(name, FITS)]
    found = _module(module).fit(folder)
    contents = {file: found}
    if file == "step_constants.json":
        contents = _with_steps(found)
    into.mkdir(parents=True, exist_ok=True)
    for name, constants in contents.items():
        (into / name).write_text(json.dumps(constants, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [into / name for name in contents]


def _with_steps(found: dict[str, Any]) -> dict[str, Any]:
    """The files of a fit of step times: its values in the constants of steps, its activity in those of boards."""
    plant = files("pals.plant")
    steps, boards = (
        json.loads((plant / name).read_text(encoding="utf-8")) for name in ("step_constants.json", "board_specs.json")
    )
    for board, values in found.items():
        if board.startswith("_"):
            steps[board] = _rounded(values)
            continue
        activity = values.pop("activity", None)
        steps[board] = {**steps.get(board, {}), **_rounded(values)}
        if activity is not None:
            groups = boards[board]["silicon"]
            for group in groups.values():
                group |= _rounded({name: w for name, w in activity.items() if name in group})
    changed = any(board.startswith("_") for board in found)
    return {"step_constants.json": steps} | ({"board_specs.json": boards} if changed else {})


def _rounded(values: Any) -> Any:
    """Every number to four digits, which is more than any fit knows."""
    if isinstance(values, dict):
        return {name: _rounded(v) for name, v in values.items()}
    return float(f"{values:.4g}") if isinstance(values, float) else values


def known(name: str, names: Mapping[str, Any]) -> str:
    """`name`, if it is one of `names`.

    Raises:
        ConfigError: it is not.
    """
    if name not in names:
        raise ConfigError(f"unknown part of the plant {name!r}; known: {', '.join(names)}. Nothing was done")
    return name


def _module(name: str) -> Any:
    return importlib.import_module(f"pals.experiments.plant_checks.{name}")


def print_rows(console: Console, title: str, rows: Sequence[CheckRow]) -> None:
    """One check as a table; beneath it which data and split, and what there is to say of a row."""
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("check", overflow="fold")
    for heading in ("cases", "error", "worst", "target"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("data", justify="right", no_wrap=True)
    notes = list(dict.fromkeys(note for row in rows for note in (row.data, row.note) if note))
    for row in rows:
        verdict = row.verdict if row.reached else f"[red]{row.verdict}[/red]"
        marks = " ".join(f"({notes.index(note) + 1})" for note in (row.data, row.note) if note)
        table.add_row(
            row.check, str(row.cases), told(row.value, row.unit), told(row.worst, row.unit), wanted(row), verdict, marks
        )
    console.print(table)
    for i, note in enumerate(notes, 1):
        console.print(f"({i}) {note}", style="dim", highlight=False, markup=False)
    console.print()


def told(value: float, unit: str) -> str:
    """A figure with its unit."""
    return f"{value:.1f} {unit}" if abs(value) < 100 else f"{value:.0f} {unit}"


def wanted(row: CheckRow) -> str:
    """The target as a person writes it."""
    low, high = row.target
    return f"≤ {high:g} {row.unit}" if low == 0 else f"{low:g}–{high:g} {row.unit}"


def write_summary(path: Path, results: dict[str, list[CheckRow]]) -> None:
    """Keep what was found, without the points behind it."""
    rows = [
        {
            "part": name, "check": r.check, "data": r.data, "basis": r.basis, "cases": r.cases, "value": round(r.value, 2),
            "worst": round(r.worst, 2), "unit": r.unit, "target": list(r.target), "reached": r.reached, "in_sample": r.in_sample,
            "note": r.note,
        }
        for name, found in results.items()
        for r in found
    ]  # fmt: skip
    head = {"command": "pals plant validate", "version": __version__, "silicon": SILICON_NOTE}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_page(path: Path, results: dict[str, list[CheckRow]]) -> None:
    """The table as a page of the documentation, with the plots that lie beside it."""
    lines = [
        "# The plant against measurements",
        "",
        "Written by `pals plant validate --record`. Errors are mean absolute errors, in %, on cases that were not fitted, unless a "
        f"row says otherwise. {SILICON_NOTE[0].upper()}{SILICON_NOTE[1:]}.",
    ]
    for name, rows in results.items():
        lines += ["", f"## {CHECKS[name].capitalize()} (`pals plant validate {name}`)", ""]
        lines += [
            "| check | data and split | cases | error | worst | target | |",
            "| --- | --- | ---: | ---: | ---: | ---: | --- |",
        ]
        for r in rows:
            verdict = r.verdict if r.reached else f"**{r.verdict}**"
            cells = (r.check, r.data, str(r.cases), told(r.value, r.unit), told(r.worst, r.unit), wanted(r), verdict)
            lines.append(f"| {' | '.join(cells)} |")
        notes = dict.fromkeys(r.note for r in rows if r.note)
        if notes:
            lines += ["", *(f"- {', '.join(r.check for r in rows if r.note == note)}: {note}" for note in notes)]
        if any(r.residuals for r in rows):
            lines += ["", f"![residuals of {name}](validation-{name}.png)"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def validation_note(recorded: Path = RECORDED) -> str:
    """One line to print beside a figure that rests on the plant: how far it is from what was measured."""
    try:
        rows = json.loads(recorded.read_text(encoding="utf-8"))["rows"]
        errors = [f"{QUOTED[r['check']]} {r['value']:.1f} %" for r in rows if r["check"] in QUOTED]
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{recorded} does not hold the plant's errors ({e}); `pals plant validate --record` makes it"
    if not errors:
        return f"{recorded} holds no row to quote; `pals plant validate --record` makes it anew"
    return f"the boards are simulated; the plant's mean error on measurements it was not fitted to: {'; '.join(errors)}"


def draw(path: Path, rows: Sequence[CheckRow]) -> bool:
    """Predicted against measured, and the error along the axis, of each row that has points; False: there are none.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    from pals.views.residuals import Scatter, draw_scatters

    scatters = [
        Scatter(
            title=row.check,
            x_axis=row.x_axis,
            points={
                group: [(p.x, p.measured, p.predicted) for p in row.residuals if p.group == group]
                for group in dict.fromkeys(p.group for p in row.residuals)
            },
        )
        for row in rows
        if row.residuals
    ]
    if not scatters:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_scatters(scatters, path)
    return True
