"""What `pals profile` asks of a sweep, and how it shows one: every wrong option is told before anything is written."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.cli import main
from pals.cli.main import parser
from pals.cli.profile import counted_since, forget_if_empty, keep_file, out_of, partial_of, with_popularity
from pals.cli.profile_plan import facts_of, plan_of, shape_of
from pals.cli.profile_progress import HEADER, SweepNotes, line_of, so_far
from pals.control.guard import Guard
from pals.core.errors import ConfigError
from pals.core.load import Mix
from pals.core.routing import popularity_parts
from pals.engines.model_zoo import shipped_config
from pals.models.profile import MOST_BYTES, Profile
from pals.models.row import ProfileRow
from pals.profiler.plan import MOST_POINTS, SweepPlan
from pals.profiler.repeats import Drift
from pals.profiler.sweep import Progress
from tests.profile_world import FACTS, profile
from tests.routing_world import CountingWorker, gamma_weights
from tests.worlds import board_info, engine_info

CLOCKS = tuple(range(210, 1411, 15))
BOARD = board_info(clocks_mhz=CLOCKS)
GUARD = Guard.of([BOARD], 64)
MIX = Mix(name="chat", prompt_tokens=1200, output_tokens=225)
ROW = ProfileRow(
    power_limit_w=300.0, active_sequences=32, mix=0, running=31.5, power_w=285.0, tokens_per_s=1000.0,
    prefill_tokens_per_s=5000.0, steps_per_s=30.0, sm_clock_mhz=1234.0, window_s=8.0, ttft_p95_s=0.25, tpot_p95_s=0.0321,
)  # fmt: skip


def options(*given: str) -> argparse.Namespace:
    return parser().parse_args(["profile", *given])


def test_the_defaults_stay_inside_boards_engine_and_the_promise_of_the_issue() -> None:
    plan = plan_of(options(), GUARD, None)

    assert (min(plan.limits_w), max(plan.limits_w)) == (GUARD.min_limit_w, GUARD.max_limit_w)
    assert (min(plan.sequences) >= 1, max(plan.sequences)) == (True, 64)
    assert plan.clocks_mhz
    assert set(plan.clocks_mhz) <= set(CLOCKS)
    assert plan.points <= MOST_POINTS
    judged = SweepPlan(
        mixes=plan.mixes, limits_w=plan.limits_w, sequences=plan.sequences
    )  # the sweep that is evaluated
    assert (plan.error, plan.points, plan.settle_s, plan.window_s) == (
        judged.error, judged.points, judged.settle_s, judged.window_s,
    )  # fmt: skip
    assert plan.seconds == pytest.approx(judged.seconds, rel=0.02)
    assert plan.seconds < 20 * 60
    assert [m.prompt_tokens for m in plan.mixes][:1] == [1200]
    assert (
        plan_of(options(), Guard.of([replace(BOARD, max_sm_clock_mhz=100, sm_clocks_mhz=())], 64), None).clocks_mhz
        == ()
    )


def test_candidates_are_those_given() -> None:
    plan = plan_of(
        options("--limits-w", "400,200,200", "--sequences", "8,64", "--clocks", "1000,1410", "--error", "2.5",
                "--minutes", "3", "--points", "12", "--seed", "5", "--prompt-tokens", "300", "--output-tokens", "30"),
        GUARD, None,
    )  # fmt: skip

    assert (plan.limits_w, plan.sequences) == ((200.0, 400.0), (8, 64))
    assert plan.clocks_mhz == (990, 1410)  # the nearest that the board supports, from below
    assert (plan.error, plan.seconds, plan.points, plan.seed) == (0.025, 180.0, 12, 5)
    assert (plan.mixes[0].prompt_tokens, plan.mixes[0].output_tokens) == (300, 30)
    assert plan_of(options("--clocks", "none"), GUARD, None).clocks_mhz == ()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--limits-w", "50,200"], "--limits-w 50: possible here are 100..400 W per board"),
        (["--limits-w", "500"], "100..400 W"),
        (["--limits-w", "nan"], "100..400 W"),
        (["--limits-w", "300W"], "numbers separated by commas"),
        (["--limits-w", ""], "numbers separated by commas"),
        (["--sequences", "0,8"], "1..64 active sequences"),
        (["--sequences", "8.5"], "numbers separated by commas"),
        (["--clocks", "100"], "210..1410 MHz"),
        (["--clocks", "fast"], "numbers separated by commas"),
        (["--points", "51"], "1 to 50 points"),
        (["--points", "7"], "a profile needs 8"),
        (["--limits-w", "300,400", "--sequences", "8", "--clocks", "none"], "make 6 points, and a profile needs 8"),
        (["--minutes", "20"], "between 0 and 20"),
        (["--minutes", "nan"], "between 0 and 20"),
        (["--minutes", "0"], "between 0 and 20"),
        (["--error", "0"], "percentage"),
        (["--error", "nan"], "percentage"),
        (["--window-s", "0"], "window"),
        (["--window-s", "nan"], "finite"),
        (["--settle-s", "inf"], "finite"),
        (["--settle-s", "-1"], "times must be"),
        (["--prompt-tokens", "1"], "at least 2"),
        (["--seed", "-1"], "0 or more"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(given: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        plan_of(options(*given), GUARD, None)


def test_a_lock_on_boards_that_take_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="accept no clock lock"):
        plan_of(options("--clocks", "1000"), replace(GUARD, sm_clocks_mhz=()), None)


def test_mixes_are_cut_to_the_engines_context_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(options(), GUARD, 1024)

    assert all((1 + m.spread) * (m.prompt_tokens + m.output_tokens) <= 1024 for m in plan.mixes)
    assert "this engine takes 1024 tokens a request" in capsys.readouterr().err


def test_facts_come_from_the_driver_the_guard_and_the_engine() -> None:
    shape = shape_of(None)
    assert shape is None
    facts = facts_of(
        replace(engine_info(launch=32), parallelism="tp4 pp1 dp1 ep0"),
        [replace(BOARD, found_limit_w=300.0)] * 4,
        Guard.of([replace(BOARD, found_limit_w=300.0)] * 4, 32),
        None,
    )

    assert (facts.boards, facts.tensor_parallel, facts.launch_sequences) == (4, 4, 32)
    assert (facts.min_limit_w, facts.max_limit_w) == (100.0, 300.0)  # never above what was found
    assert (facts.min_sm_clock_mhz, facts.max_sm_clock_mhz) == (210, 1410)


def test_a_models_shape_is_read_from_its_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shipped_config("Qwen/Qwen3-30B-A3B")))
    shape = shape_of(str(path))

    assert shape is not None
    assert shape.experts == 128
    for text in ("{", "[]", '{"hidden_size": 5}', '{"hidden_size": "a"}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="Nothing was changed"):
            shape_of(str(path))
    with pytest.raises(ConfigError, match="Nothing was changed"):
        shape_of(str(tmp_path / "none.json"))


def test_where_the_profile_goes_is_checked_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert out_of(str(tmp_path / "new" / "p.json")).parent.is_dir()
    assert partial_of(tmp_path / "p.json").name == "p.partial.jsonl"
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path, tmp_path / "file" / "p.json", tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ConfigError, match="Nothing was changed"):
            out_of(str(bad))


def test_a_refit_writes_what_the_rows_say_and_nothing_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "folder" / "new.json"
    old.write_text(profile().to_json().replace('"weights":', '"weighs":', 1))

    assert main(["profile", "refit", str(tmp_path / "missing.json"), "--out", str(new)]) == 2
    assert main(["profile", "refit", str(tmp_path / "other" / "missing.json")]) == 2
    assert capsys.readouterr().err.count("cannot read the profile") == 2
    assert list(tmp_path.iterdir()) == [old]
    assert main(["profile", "refit", str(old), "--out", str(new)]) == 0
    assert new.read_text() == profile().to_json()
    assert "weighs" in old.read_text()


def test_options_before_a_kind_are_refused_not_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["profile", "--points", "3", "simulate", "Qwen3-30B-A3B", "--boards", "h100-sxm5-80gb"]

    assert main(given) == 2
    assert "go behind its name" in capsys.readouterr().err


def test_a_row_is_one_line_under_its_header_and_the_unknown_is_a_dash() -> None:
    line = line_of(ROW, [MIX])
    locked = line_of(replace(ROW, sm_clock_lock_mhz=1200, ttft_p50_s=12.5), [MIX])

    assert len(line) == len(locked) == len(HEADER)
    for word in ("300 W", "32", "chat", "1000", "285", "3.509", "1234", "250", "32.1", "-"):
        assert word in line.split() or word in line
    assert "1200 MHz" in locked
    assert "12500" in locked


def test_notes_of_a_sweep_are_few_and_tell_what_was_left_out_and_how_repeats_drifted() -> None:
    notes = SweepNotes()
    drift = Drift(points=1, power=1.01, tokens_per_s=0.98, temperature_k=None)
    for i in range(9):
        notes.take(
            Progress(rows=i, points=50, row=None, error=None, seconds_left=1.0, drift=drift, notes=("try", f"why {i}"))
        )
    notes.take(Progress(rows=9, points=50, row=ROW, error=None, seconds_left=1.0, drift=drift, notes=("of a row",)))

    assert notes.lines[0] == "left out: why 0"
    assert notes.lines[-2:] == ("5 further points were left out", "1 point measured again: power +1.0%, tokens/s -2.0%")
    assert sum(map(len, notes.lines)) < 1000


@given(error=st.one_of(st.none(), st.floats(0, 10)), left_s=st.floats(-5, 1200), rows=st.integers(0, 50))
def test_progress_never_shows_less_than_no_time(error: float | None, left_s: float, rows: int) -> None:
    told = so_far(Progress(rows=rows, points=50, row=None, error=error, seconds_left=left_s, drift=None))
    minutes, seconds = told.split("at most ")[1].split(" left")[0].split(":")

    assert 60 * int(minutes) + int(seconds) == max(0, round(left_s))
    assert ("not yet known" in told) == (error is None)
    assert math.isfinite(int(minutes))


SIMULATED = ["profile", "simulate", "Qwen3-30B-A3B", "--boards", "h100-sxm5-80gb"]


def test_a_simulated_sweep_makes_a_small_profile_and_leaves_nothing_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"

    assert main([*SIMULATED, "--out", str(out), "--points", "10", "--window-s", "4"]) == 0
    made = Profile.from_json(out.read_text())
    told = capsys.readouterr()
    assert (made.source, made.facts.boards, made.fingerprint.model) == ("simulated", 1, "Qwen/Qwen3-30B-A3B")
    assert len(made.rows) <= 10
    assert out.stat().st_size <= MOST_BYTES
    assert list(tmp_path.iterdir()) == [out]
    assert "pals profile show" in told.err
    assert "power_w" in told.out
    assert told.out.count(" chat") + told.out.count(" prefill") + told.out.count(" decode") == len(made.rows)


def test_a_simulated_engine_that_counts_its_experts_stores_their_routing(tmp_path: Path) -> None:
    short = [*SIMULATED, "--points", "8", "--window-s", "4"]
    made = {}
    for name, more in (("bare", []), ("counted", ["--count-experts"])):
        assert main([*short, *more, "--out", str(tmp_path / name)]) == 0
        made[name] = Profile.from_json((tmp_path / name).read_text())
    assert made["bare"].rows == made["counted"].rows
    assert made["bare"].routing is None
    assert made["bare"].facts.popularity is None
    assert made["counted"].routing is not None
    assert made["counted"].facts.popularity is not None


def test_ctrl_c_keeps_the_rows_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pals.cli", *SIMULATED, "--out", str(tmp_path / "p.json"), "--error", "0.0001"]
    partial = tmp_path / "p.partial.jsonl"
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline_s = time.monotonic() + 60.0
    while not partial.exists() or len(partial.read_text().splitlines()) < 4:
        assert first.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    told = first.communicate(timeout=60)[0]

    assert first.returncode == 130, told
    assert "run the same command to go on" in told
    assert not (tmp_path / "p.json").exists()
    kept = partial.read_text().splitlines()
    assert len(kept) >= 4
    assert main([*command[3:], "--points", "12"]) == 0  # a smaller number is enough for this test
    rows = Profile.from_json((tmp_path / "p.json").read_text()).rows
    assert [(r.power_limit_w, r.mix, r.at_s) for r in rows[: len(kept) - 1]] == [
        (r["power_limit_w"], r["mix"], r["at_s"]) for r in map(json.loads, kept[1:])
    ]


def test_too_short_a_budget_keeps_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"

    assert main([*SIMULATED, "--out", str(out), "--minutes", "1"]) == 2
    assert "a profile needs 8. They are kept" in capsys.readouterr().err
    assert not out.exists()
    assert (tmp_path / "p.partial.jsonl").exists()
    assert main([*SIMULATED, "--out", str(out), "--minutes", "6", "--points", "9"]) == 0


def test_rows_of_one_simulated_plant_do_not_go_on_on_another(tmp_path: Path) -> None:
    short = [*SIMULATED, "--out", str(tmp_path / "p.json"), "--minutes", "1"]
    for plant in ([], ["--perturb-seed", "1"], ["--perturb-seed", "1", "--spread", "0.3"], ["--seed-boards", "4"]):
        assert main([*short, *plant]) == 2

    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4
    assert len({path.read_text() for path in kept}) == 4


def test_a_file_of_no_rows_is_forgotten_one_with_rows_or_of_others_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "p.partial.jsonl"
    forget_if_empty(kept)
    for content, left in (
        (b"", False),
        (b'{"format": "pals-sweep/2"}\n', False),
        (b'{"format": "pals-sweep/2"}\n{"mix": 0}\n', True),
        (b"somebody's notes\n", True),
        (b"\xd0\xff", True),
    ):
        kept.write_bytes(content)
        forget_if_empty(kept)
        assert kept.exists() == left


def test_a_file_that_is_replaced_is_never_half_written(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    out.write_text("old")
    keep_file(out, "new")

    assert out.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        keep_file(out, "\udc80")
    assert out.read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_a_sweep_on_an_engine_that_counts_stores_the_routing_and_the_popularity(tmp_path: Path) -> None:
    worker = CountingWorker(tmp_path, gamma_weights(2, 16), top_k=2)
    worker.work()
    began = worker.counts
    for _ in range(20):
        worker.work()
    counted = counted_since(began, worker.counts)
    assert counted is not None
    assert counted.tokens == 16000
    facts = with_popularity(FACTS, counted)
    assert facts.popularity == popularity_parts(counted.routed)
    assert counted_since(worker.counts, began) is None  # another run of the engine
    assert counted_since(None, None) is None
    assert counted_since(worker.counts, worker.counts) is None  # nothing was routed
    assert with_popularity(FACTS, None) == FACTS
