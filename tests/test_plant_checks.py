"""The validation frame: errors are what they say, a check without cases is none, and what is asked for wrongly is named."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pals.cli.plant import validate
from pals.core.errors import ConfigError
from pals.experiments.plant_checks.measured import data_folder, read_table
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.experiments.plant_checks.validation import (
    QUOTED,
    RECORDED,
    draw,
    print_rows,
    refit,
    run_checks,
    validation_note,
    write_page,
    write_summary,
)


def row(at_most: float) -> CheckRow:
    points = [
        Residual(group="a", x=1.0, measured=100.0, predicted=110.0),
        Residual(group="b", x=2.0, measured=50.0, predicted=49.0),
    ]
    return error_row(
        "watts",
        "folder, b held out",
        points,
        at_most=at_most,
        x_axis="batch",
        note="odd rows left out: 3",
    )


def test_the_value_is_the_mean_of_absolute_errors() -> None:
    assert row(7).value == pytest.approx(6.0)
    assert row(7).worst == pytest.approx(10.0)
    assert row(7).cases == 2
    assert (row(7).reached, row(5).reached) == (True, False)


def test_a_check_without_cases_is_refused() -> None:
    with pytest.raises(ValueError, match="no case"):
        error_row("watts", "nothing", [], at_most=5, x_axis="batch")


def test_the_table_shows_what_is_missed_and_the_note() -> None:
    out = io.StringIO()
    print_rows(Console(file=out, width=140), "power", [row(7), row(5)])

    assert out.getvalue().count("reached") == 1
    assert out.getvalue().count("MISSED") == 1
    assert "odd rows left out: 3" in out.getvalue()


def test_residuals_are_drawn_and_the_summary_is_quoted(tmp_path: Path) -> None:
    drawn = draw(tmp_path / "power.png", [row(7)])
    write_page(tmp_path / "page.md", {"caps": [row(7), row(5)]})
    quoted = replace(row(7), check=next(iter(QUOTED)))
    write_summary(tmp_path / "summary.json", {"power": [row(7), quoted]})

    page = (tmp_path / "page.md").read_text()
    assert drawn
    assert (tmp_path / "power.png").read_bytes().startswith(b"\x89PNG")
    assert "| watts | folder, b held out | 2 | 6.0 % | 10.0 % | ≤ 5 % | **MISSED** |" in page
    assert page.count("odd rows left out: 3") == 1
    assert json.loads((tmp_path / "summary.json").read_text())["rows"][0]["value"] == 6.0
    assert validation_note(tmp_path / "summary.json").endswith(f"fitted to: {QUOTED[quoted.check]} 6.0 %")


def test_every_row_that_is_quoted_is_in_the_record() -> None:
    recorded = {r["check"] for r in json.loads(RECORDED.read_text(encoding="utf-8"))["rows"]}

    assert set(QUOTED) <= recorded


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown part of the plant 'sevring'"):
        list(run_checks(["sevring"], tmp_path))
    with pytest.raises(ConfigError, match="unknown part of the plant"):
        refit("cap", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="--data DIR"):
        data_folder(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"cannot read the measured data.*none\.csv"):
        read_table(tmp_path / "none.csv", ["a"])
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="lacks the columns c; it has a, b"):
        read_table(tmp_path / "t.csv", ["a", "c"])
    assert "pals plant validate --record" in validation_note(tmp_path / "none.json")


def test_a_record_holds_every_part_and_one_without_rows_to_quote_says_so(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", {})
    assert "no row to quote" in validation_note(tmp_path / "summary.json")

    args = argparse.Namespace(parts=["caps"], data=None, out=tmp_path, record=True)
    with pytest.raises(ConfigError, match="--record keeps every part"):
        validate(args)
