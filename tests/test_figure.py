"""The comparison figure: a readable PNG for any number of runs, and no figure from uneven series."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from pals.views.figure import RunSeries, draw_runs

pytest.importorskip("matplotlib")


def run(name: str, budget_w: float | None, target: float | None) -> RunSeries:
    """A minute of made-up serving, a tick every half second; the budget, if any, holds for the middle third."""
    time_s = [0.5 * i for i in range(121)]
    load = [0.6 + 0.4 * math.sin(t / 9.0) for t in time_s]
    limits = [1600.0 if budget_w is None or not 20 <= t < 40 else budget_w for t in time_s]
    return RunSeries(
        name=name,
        time_s=time_s,
        power_w=[min(limit, 400 + 900 * x + 40 * math.sin(7 * t)) for t, x, limit in zip(time_s, load, limits, strict=True)],
        limit_w=limits,
        budget_w=[budget_w if 20 <= t < 40 else None for t in time_s],
        active_limit=[64 if budget_w is None or not 20 <= t < 40 else 32 for t in time_s],
        running=[round(60 * x) for x in load],
        waiting=[round(max(0.0, 20 * (x - 0.8))) for x in load],
        tokens_per_s=[1500 * x for x in load],
        target_tokens_per_s=target,
    )  # fmt: skip


def size_of(png: Path) -> tuple[int, int]:
    """Width and height from the file's header."""
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return int(width), int(height)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_figure_has_room_for_each_run(tmp_path: Path, columns: int) -> None:
    runs = [run("static", None, 1000.0), run("pals-paper", None, None), run("pals-paper, budget steps", 700.0, 1000.0)]

    draw_runs(
        runs[:columns], tmp_path / "figure.png", title="One trace slice, three policies: Mixtral-8x7B on 4 × A100",
        subtitle="EMULATED: real vLLM, simulated boards",
    )  # fmt: skip

    width, height = size_of(tmp_path / "figure.png")
    assert 1000 <= height <= 1400
    assert 600 * columns <= width <= 800 + 700 * columns
    assert (tmp_path / "figure.png").stat().st_size > 40_000


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run"):
        draw_runs([], tmp_path / "figure.png", title="t", subtitle="s")


def test_uneven_series_are_refused() -> None:
    good = run("static", None, None)

    with pytest.raises(ValueError, match=r"'static'.*one length"):
        replace(good, waiting=[0])
    with pytest.raises(ValueError, match="not empty"):
        RunSeries(
            name="none", time_s=[], power_w=[], limit_w=[], budget_w=[], active_limit=[], running=[], waiting=[],
            tokens_per_s=[], target_tokens_per_s=None,
        )  # fmt: skip
