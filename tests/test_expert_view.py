"""`pals experts`: what is drawn is what was counted, what is not known says so, and every wrong use says what to do."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pals.cli.experts import experts
from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError, EngineGoneError
from pals.core.experts import ExpertCounts, ExpertSummary, jensen_shannon_distance, summarise
from pals.engines.model_zoo import read_config
from pals.runtime.expert_channel import read_engine
from pals.runtime.journal import Journal, JournalHeader
from pals.views.expert_figure import draw_experts
from pals.views.expert_history import history
from pals.views.expert_picture import binned, drift_by_chance, picture_of, short_names
from pals.views.expert_text import (
    ASCII_BARS,
    BARS,
    UNKNOWN,
    layer_lines,
    level,
    plain_experts,
    print_experts,
    print_history,
    sparkline,
)
from tests.expert_world import ExpertEngine, demonstration
from tests.worlds import board_info, engine_info


def run(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    wait: Callable[[float], object] = lambda seconds: None,
    **options: Any,
) -> str:
    """What the command prints."""
    given = {"model": None, "window": 5.0, "watch": None, "json": False, "png": None, "journal": None, **options}
    assert experts(argparse.Namespace(**given), {"PALS_RUN_DIR": str(folder)}, wait) == 0
    return capsys.readouterr().out


def running(folder: Path, **facts: Any) -> ExpertEngine:
    """An engine that has served for ten seconds."""
    engine = ExpertEngine(folder, **facts)
    engine.start()
    engine.serve(10.0)
    return engine


def window_of(**more: Any) -> ExpertCounts:
    """Three layers of eight experts; the second is counted by nobody."""
    routed = np.array([[80, 40, 40, 40, 0, 0, 0, 0], [0] * 8, [25] * 8])
    given: dict[str, Any] = {
        "time_s": 10.0, "span_s": 5.0, "steps": 10, "tokens": 100, "layers": ("m.0.moe", "m.1.moe", "m.2.moe"), "top_k": 2,
        "routed": routed, "distinct": np.array([30, 0, 80]),
    }  # fmt: skip
    return ExpertCounts.alike(**given | more)


def drawn(window: ExpertCounts, width: int = 100) -> str:
    summary = summarise(window, least_per_expert=1)
    picture = picture_of(window, summary, engine="model")
    return plain_experts(lambda console: print_experts(picture, console), width=width)


def size_of(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_each_bar_is_its_experts_load_and_an_unknown_layer_has_none() -> None:
    lines = drawn(window_of()).splitlines()

    first, second, third = (next(x for x in lines if x.startswith(f"    {i}  ")) for i in range(3))
    assert first.split()[1] == "▇" * 4 + "▅" * 12  # 3.2 and 1.6 times the mean, then four that nobody chose
    assert first.split()[2:] == ["3.0", f"{math.sqrt(775) / 25:.2f}", "60%"]
    assert second == "    1  not known: its router's counter did not follow the tokens"
    assert third.split()[1:] == ["▄" * 32, "8.0", "0.00", "25%"]
    assert "layers known      2 of 3; 100 tokens went through m.1.moe (1 layers)" in "\n".join(lines)


def test_what_is_not_known_is_never_a_zero() -> None:
    told = drawn(window_of(distinct=None, tokens=0, steps=0, routed=np.zeros((3, 8), np.int64)))
    assert "nothing is known of this window: no token was processed" in told
    assert "0.0" not in told

    told = drawn(window_of(distinct=None))
    assert "distinct experts  not known: ranks count their own tokens" in told
    assert [x.split()[2] for x in told.splitlines() if x.startswith(("    0  ", "    2  "))] == ["-", "-"]

    inside = window_of(bypassed=("m.1.moe",))
    assert "    1  not known: its kernel chooses experts itself, past the router" in drawn(inside)


def test_bars_of_few_tokens_are_said_to_be_partly_chance() -> None:
    window = window_of()
    picture = picture_of(window, summarise(window), engine="model")
    told = plain_experts(lambda console: print_experts(picture, console), width=100)
    assert "popularity CV     not known: 100 tokens are too few: 400 are needed" in told
    assert "partly chance" in told
    assert "partly chance" not in drawn(window)


@pytest.mark.parametrize("width", [40, 63, 64, 80, 100, 200])
@pytest.mark.parametrize(("experts_", "ranks"), [(8, 1), (128, 4), (160, 8), (257, 3)])
def test_every_layer_fits_the_width(width: int, experts_: int, ranks: int) -> None:
    routed = np.full((2, experts_), 50)
    window = window_of(
        layers=("a.0", "a.1"), routed=routed, tokens=25 * experts_, distinct=np.array([9, 9]), ranks=ranks
    )  # fmt: skip
    picture = picture_of(window, summarise(window, least_per_expert=1), engine="model")
    lines = [line.plain for line in layer_lines(picture, width)]

    assert all(len(line) <= width for line in lines)
    assert len({len(line) for line in lines if not line.lstrip().startswith("rank")}) == 1
    assert all(set("▄") == set(line.split()[1]) for line in lines[-2:])


def test_bars_read_without_colour_and_without_unicode() -> None:
    assert [level(x) for x in (0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.5, 4.0, 9.0)] == [None, *range(8)]
    assert len(set(BARS)) == len(set(ASCII_BARS)) == 8
    window = window_of()
    picture = picture_of(window, summarise(window), engine="model")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_experts(picture, Console(file=out, width=100, markup=False, highlight=False))
    out.flush()
    assert b"@@@@" not in out.buffer.read()
    out.buffer.seek(0)
    assert b"####++++" in out.buffer.read()


def test_colours_are_there_for_a_terminal() -> None:
    window, lines = window_of(), io.StringIO()
    picture = picture_of(window, summarise(window), engine="model")
    print_experts(picture, Console(file=lines, width=100, color_system="truecolor", force_terminal=True))
    assert "\x1b[38;2;213;94;0m▇" in lines.getvalue()


def test_neighbours_are_averaged_and_nothing_is_lost() -> None:
    load = np.arange(10, dtype=np.float64)
    assert binned(load, 1).tolist() == load.tolist()
    assert binned(load, 4).tolist() == [1.5, 5.5, 8.5]


@given(st.lists(st.one_of(st.none(), st.floats(0, 1e6)), min_size=1, max_size=300), st.integers(1, 120))
def test_a_line_of_bars_fits_and_marks_what_is_unknown(values: list[float | None], width: int) -> None:
    line = sparkline(values, width)
    assert 1 <= len(line) <= width
    assert set(line) <= {*BARS, UNKNOWN}
    if len(values) <= width:
        assert [c == UNKNOWN for c in line] == [v is None for v in values]


def test_short_names_tell_layers_apart() -> None:
    assert short_names(["model.layers.3.mlp.experts", "model.layers.10.mlp.experts"]) == ("3", "10")
    assert short_names(["model.layers.3.mlp.experts"]) == ("3",)
    assert short_names(["a.b.c", "a.c"]) == ("a.b.c", "a.c")  # nothing would be left of the second
    assert short_names(["same", "same"]) == ("same", "same")
    assert short_names([]) == ()


@given(st.lists(st.text("ab.", min_size=1, max_size=6), min_size=1, max_size=6, unique=True))
def test_short_names_of_different_layers_differ(names: list[str]) -> None:
    assert len(names) == 1 or len(set(short_names(names))) == len(names)


@pytest.mark.parametrize(("experts_", "first", "second"), [(8, 4000, 900), (128, 40_000, 13_000)])
def test_drift_by_chance_is_what_two_samples_of_one_popularity_show(experts_: int, first: int, second: int) -> None:
    random = np.random.default_rng(3)
    chance = random.dirichlet(np.full(experts_, 5.0))
    seen = [
        jensen_shannon_distance(random.multinomial(first, chance), random.multinomial(second, chance))
        for _ in range(100)
    ]
    assert np.sqrt(np.mean(np.square(seen))) == pytest.approx(drift_by_chance(experts_, first, second), rel=0.05)


def test_a_look_is_the_window_between_two_readings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = running(tmp_path, layers=5, experts=32, ranks=4, bypassed=(1,))
    before = read_engine(tmp_path, [os.getpid()])
    told = json.loads(run(tmp_path, capsys, engine.serve, json=True))
    after = read_engine(tmp_path, [os.getpid()])

    assert before is not None
    assert after is not None
    assert told["format"] == "pals-experts/1"
    assert (told["engine"], told["summary"]["tokens"], told["summary"]["span_s"]) == ("synthetic/moe", 3200, 5.0)
    counted = [layer["routed"] for layer in told["layers"]]
    assert counted[0] == (after.routed - before.routed)[0].tolist()
    assert (counted[1], told["layers"][1]["distinct_per_step"]) == (None, None)
    assert "past the router" in told["layers"][1]["why"]
    assert told["drift_from"] == "all that was served before"
    assert told["summary"]["drift"] < 1.5 * told["drift_by_chance"]


def test_a_watch_sees_a_shift_and_ends_when_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine, looks = running(tmp_path, layers=2, experts=32), iter(range(100))

    def wait(seconds: float) -> None:
        if (look := next(looks)) == 6:
            raise KeyboardInterrupt
        if look == 3:
            engine.shuffle()
        engine.serve(seconds)

    lines = run(tmp_path, capsys, wait, watch=4.0, json=True).splitlines()
    told = [json.loads(line) for line in lines]
    drift = [t["summary"]["drift"] for t in told]
    assert len(told) == 6
    assert max(drift[:3]) < 0.1 < 0.2 < min(drift[3:])
    assert [w["drift"] for w in told[-1]["over_time"]] == drift


def test_a_young_engine_drifts_from_its_first_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine, looks = ExpertEngine(tmp_path, layers=2, experts=32), iter(range(3))
    engine.start()
    engine.publish()

    def wait(seconds: float) -> None:
        if next(looks) == 2:
            raise KeyboardInterrupt
        engine.serve(seconds)

    first, second = (json.loads(line) for line in run(tmp_path, capsys, wait, watch=5.0, json=True).splitlines())
    assert first["summary"]["drift"] is None
    assert "too few" in first["summary"]["unknown"]["drift"]
    assert second["drift_from"] == "the first window"


def test_an_idle_engine_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running(tmp_path)
    assert "nothing is known of this window: no token was processed" in run(tmp_path, capsys)


def test_wrong_uses_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            run(tmp_path, capsys, **options)

    refused("no running engine with PALS")
    silent = ExpertEngine(tmp_path)
    silent.start()
    refused("PALS_EXPERTS=1 vllm serve MODEL")
    refused(r"no engine synthetic/mo runs .*did you mean 'synthetic/moe'\?", model="synthetic/mo")
    refused("at least 1 s", window=0.1)
    refused("must end in .png", png="x.gif")
    refused("is no folder", png=str(tmp_path / "none" / "x.png"))
    ExpertEngine(tmp_path, name="synthetic/other").start()
    refused("several engines: name one of")
    refused("cannot read the journal", journal=str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("model", "told"), [("meta-llama/Llama-3.1-8B", "is a dense model"), ("Qwen/Qwen3-30B-A3B", "tells no")]
)
def test_a_dense_model_has_no_experts(
    model: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = read_config(model)
    ExpertEngine(tmp_path, name=model).start(shape=ModelShape.from_config(config))
    with pytest.raises(ConfigError, match=told):
        run(tmp_path, capsys, model=model)


def test_an_engine_that_starts_anew_between_two_looks_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = running(tmp_path, layers=2)

    def restart(seconds: float) -> None:
        again = ExpertEngine(tmp_path, layers=2, time_s=engine.time_s)
        again.serve(1.0)

    with pytest.raises(EngineGoneError, match=r"started anew\. Look again"):
        run(tmp_path, capsys, restart)


def test_an_engine_whose_process_ended_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    engine = ExpertEngine(tmp_path, layers=2)
    engine.info = replace(engine.info, pid=process.pid)
    engine.start()
    engine.serve(1.0)

    def die(seconds: float) -> None:
        process.kill()
        process.communicate()

    with pytest.raises(EngineGoneError, match="has ended"):
        run(tmp_path, capsys, die)


def summary(end_s: float, span_s: float | None = 10.0, **more: Any) -> ExpertSummary:
    made = summarise(window_of(time_s=end_s, span_s=span_s), least_per_expert=1)
    return replace(made, **more)


def test_each_window_is_seen_once_and_those_that_were_filling_are_not() -> None:
    filling, full, later = summary(102.0, 2.0), summary(110.0), summary(121.0)
    assert history([None, filling, full, full, None, full, later, later]) == (full, later)
    idle = summary(121.0, 0.0, tokens=0)
    assert history([full, later, idle, idle]) == (full, later, idle)
    assert history([]) == ()


def test_over_time_shows_highest_lowest_and_why_values_are_missing() -> None:
    windows = [
        summary(10.0 * i, drift=d, unknown={"drift": "there is no reference yet"})
        for i, d in enumerate((None, 0.1, 0.4))
    ]
    lines = plain_experts(lambda console: print_history(windows, console), width=100).splitlines()
    assert lines[0] == "over time: 3 windows of 300 tokens, the last 20 s after the first"
    assert lines[1].split() == [
        *[
            "drift",
            "?▃█",
            "0.1",
            "to",
            "0.4,",
            "last",
            "0.4;",
            "not",
            "known",
            "in",
            "1",
            "windows:",
            "there",
            "is",
            "no",
            "reference",
            "yet",
        ]
    ]


def test_a_journal_without_summaries_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.jsonl"
    header = JournalHeader(
        policy="static", policy_settings={}, profile_json=None, boards=(board_info(),), engine=engine_info(), period_s=0.5,
        emulated=True, started_at="2026-01-01T00:00:00", command="pals agent",
    )  # fmt: skip
    Journal(path, header).close()
    with pytest.raises(ConfigError, match=r"says nothing of experts: .*PALS_EXPERTS=1"):
        run(tmp_path, capsys, journal=str(path))


def test_the_docs_show_what_is_printed(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "experts-view.md").read_text(encoding="utf-8")
    assert f"```text\n{demonstration(tmp_path)}\n```" in page


def test_the_figure_is_drawn_with_and_without_a_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    engine = running(tmp_path, layers=4, experts=32, ranks=4, bypassed=(2,))
    run(tmp_path, capsys, engine.serve, png=str(tmp_path / "one.png"))
    window = window_of()
    picture = picture_of(window, summarise(window), engine="model")
    draw_experts(picture, [summary(10.0 * i, drift=d) for i, d in enumerate((None, 0.1))], tmp_path / "both.png")
    draw_experts(None, [summary(10.0, drift=None, distinct_per_step=None)], tmp_path / "over.png")
    sizes = [size_of(tmp_path / f"{name}.png") for name in ("one", "both", "over")]
    assert len({width for width, _ in sizes}) == 1
    assert sizes[1][1] > sizes[0][1]
    with pytest.raises(ValueError, match="neither"):
        draw_experts(None, [], tmp_path / "none.png")
