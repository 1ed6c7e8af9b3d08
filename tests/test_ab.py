"""A comparison is right as often as it claims, however often one looks and whatever the load does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.cli.ab import Stopper
from pals.cli.main import main
from pals.control.interleaved import ON, Interleaving
from pals.core.errors import ConfigError
from pals.core.quantities import LATENCY_BOUNDS_S, Budget, Decision, OperatingPoint, Slo
from pals.experiments.ab import Ending, Trial, arm_of, at_same_load, compare, pairs_of, quantile_s
from pals.experiments.ab_windows import ArmWindow, WindowTally, windows_of
from pals.experiments.anytime import estimate_effect, evidence, evidence_path
from pals.runtime.journal import Journal, JournalHeader, read_journal
from pals.runtime.tick import TickRecord
from tests.node_world import AgentWorld
from tests.worlds import BUCKETS, Clock, board_info, engine_info, telemetry

NONE = (0,) * BUCKETS
DESIGN = Interleaving(share=0.5, window_s=10.0)


def world(seed: int, count: int, saving: float) -> tuple[Interleaving, list[ArmWindow]]:
    """Windows of an engine whose load wanders and jumps, and whose boards draw partly for nothing."""
    design, rng, load, windows = Interleaving(share=0.5, seed=seed), np.random.default_rng(seed), 0.0, []
    for i in range(count):
        load = 0.9 * load + rng.normal(0.0, 0.15) + (1.0 if rng.random() < 0.02 else 0.0)  # bursts that last
        tokens = 10000.0 * exp(load)
        energy_j = (8000.0 + 0.6 * tokens) * exp(rng.standard_t(3) * 0.01)
        arm = design.arm(i)
        windows.append(
            ArmWindow(
                index=i, arm=arm, seconds=15.0, energy_j=energy_j * (1.0 - saving if arm == ON else 1.0),
                output_tokens=int(tokens), ttft_counts=NONE, tpot_counts=NONE, refused_requests=0, request_seconds=0.0,
                finished_requests=0,
            )
        )  # fmt: skip
    return design, windows


def differences_of(seed: int, count: int, saving: float) -> tuple[list[float], list[float]]:
    """Logarithms of the ratios of energy per token, and of tokens/s."""
    design, windows = world(seed, count, saving)
    pairs, _ = pairs_of(windows, design)
    energy = [log(a.energy_j / a.output_tokens) - log(b.energy_j / b.output_tokens) for a, b in pairs]
    return energy, [log(a.output_tokens / b.output_tokens) for a, b in pairs]


def ever_excluded(differences: Sequence[float], truth: float, alpha: float) -> bool:
    """Whether the interval misses `truth` after any number of pairs."""
    x = np.asarray(differences) - truth
    return float(np.maximum(evidence_path(x), evidence_path(-x)).max()) >= log(2.0 / alpha)


@pytest.mark.parametrize("saving", [0.0, 0.1])
def test_looking_after_every_pair_the_interval_misses_the_truth_in_at_most_five_percent_of_runs(saving: float) -> None:
    truth, runs = log(1.0 - saving), 300
    plain = adjusted = 0
    for seed in range(runs):
        energy, tokens = differences_of(seed, 120, saving)
        plain += ever_excluded(energy, truth, 0.05)
        adjusted += ever_excluded(at_same_load(energy, tokens), truth, 0.05)

    assert plain <= 0.05 * runs
    assert adjusted <= 0.05 * runs


def test_the_test_of_false_alarms_can_fail() -> None:
    """An interval for one look, looked at after every pair, is wrong far more often."""
    wrong = 0
    for seed in range(100):
        d = np.asarray(differences_of(seed, 120, 0.0)[0])
        wrong += any(
            abs(d[:n].mean()) > 1.96 * d[:n].std(ddof=1) / n**0.5 for n in range(6, len(d) + 1)
        )  # fmt: skip

    assert wrong > 15


def test_a_saving_of_ten_percent_is_found_within_the_hour_and_sooner_with_the_load_taken_out() -> None:
    found, widths = 0, []
    for seed in range(20):
        design, windows = world(seed, 160, 0.1)
        tally = WindowTally(design, 5.0)
        tally.windows = windows
        result = compare(tally, 0.95)
        assert result.same_load is not None
        assert result.same_load.low is not None
        assert result.saving is not None
        found += result.same_load.low > 0.0
        widths.append((result.same_load.half_width or 1.0) / (result.saving.half_width or 1.0))

    assert found >= 18
    assert max(widths) < 0.7


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1.0, 1.0), min_size=8, max_size=30), st.floats(-0.5, 0.5))
def test_the_interval_is_where_neither_side_has_evidence_and_moves_with_the_data(d: list[float], shift: float) -> None:
    found = estimate_effect(d, 0.05)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    x, needed = np.asarray(d), log(2.0 / 0.05)

    assert found.low <= found.value <= found.high
    assert evidence(x - found.low) == pytest.approx(needed, abs=1e-3)
    assert evidence(found.high - x) == pytest.approx(needed, abs=1e-3)
    moved = estimate_effect([v + shift for v in d], 0.05)
    assert moved is not None
    assert moved.low == pytest.approx(found.low + shift, abs=1e-6)
    assert moved.high == pytest.approx(found.high + shift, abs=1e-6)
    path = evidence_path(x)
    assert path[-1] == pytest.approx(evidence(x), abs=1e-9)
    assert path[:3] == pytest.approx(evidence_path(x[:3]), abs=1e-9)


def test_few_pairs_bound_nothing_and_one_outlier_moves_little() -> None:
    few = estimate_effect([-0.1] * 5, 0.05)
    assert few is not None
    assert (few.low, few.high) == (None, None)
    assert few.value == pytest.approx(-0.1)
    assert estimate_effect([], 0.05) is None

    rng = np.random.default_rng(1)
    d = list(rng.normal(-0.1, 0.01, 40))
    clean, dirty = estimate_effect(d, 0.05), estimate_effect([*d, 5.0], 0.05)
    assert clean is not None
    assert dirty is not None
    assert dirty.value == pytest.approx(clean.value, abs=0.01)
    assert dirty.high is not None
    assert dirty.high < 0.0


def test_the_slope_of_a_pair_is_learnt_from_those_before_it_only() -> None:
    energy, tokens = differences_of(5, 80, 0.0)
    later = [*energy[:20], *(9.0 for _ in energy[20:])]

    assert at_same_load(energy, tokens)[:20] == at_same_load(later, tokens)[:20]


def test_quantiles_lie_within_their_bucket() -> None:
    counts = [0] * BUCKETS
    counts[10], counts[20] = 90, 10

    p95 = quantile_s([counts, counts], 0.95)
    assert p95 is not None
    assert LATENCY_BOUNDS_S[19] < p95 < LATENCY_BOUNDS_S[20]
    assert quantile_s([NONE], 0.95) is None
    assert quantile_s([], 0.95) is None
    assert quantile_s([[*[0] * (BUCKETS - 1), 3]], 0.5) == LATENCY_BOUNDS_S[-1]


Power = Callable[[float, str], float | None]


def records_of(
    seconds: float, *, power: Power, mode: str = "canary", design: Interleaving = DESIGN
) -> list[TickRecord]:
    """Ticks each half second; a request takes its 100 tokens at 1000 tokens/s."""
    records: list[TickRecord] = []
    arm = ""
    for i in range(round(2 * seconds) + 1):
        t = 0.5 * i
        before, arm = arm, design.arm(design.window_at(t))
        sample = telemetry(100.0 + t, tokens=int(1000 * t), running=8)
        engine = replace(sample.engine, finished_requests=int(2 * t))  # type: ignore[type-var]
        sample = replace(sample, engine=engine, power_w=power(t, before) if i else None, window_s=0.5 if i else 0.0)
        decision = Decision(point=OperatingPoint(power_limit_w=400.0), reason="static", arm=arm)
        records.append(
            TickRecord(
                index=i, sample=sample, budget=Budget(), slo=Slo(), decision=decision, guarded=decision,
                enforced_limits_w=(400.0,), mode=mode,
            )
        )  # fmt: skip
    return records


def by_arm(t: float, before: str) -> float:
    """The arm whose period ends at `t` draws this."""
    return 540.0 if before == ON else 600.0


def test_a_period_counts_for_the_arm_whose_decision_was_in_force() -> None:
    tally = windows_of(records_of(100.0, power=by_arm), DESIGN, settle_s=0.0)

    assert [w.index for w in tally.windows] == list(range(10))
    for window in tally.windows:
        assert window.energy_j == pytest.approx(5400.0 if window.arm == ON else 6000.0)
        assert (window.seconds, window.output_tokens) == (10.0, 10000)
    arm = arm_of(tally.windows)
    assert arm.stay_s == pytest.approx(4.0)  # 8 in the engine, 2 a second


def test_the_first_seconds_of_a_window_do_not_count() -> None:
    def slow(t: float, before: str) -> float:
        return 9999.0 if 0.0 < t % 10.0 <= 3.0 else by_arm(t, before)

    tally = windows_of(records_of(100.0, power=slow), DESIGN, settle_s=3.0)

    assert {w.seconds for w in tally.windows} == {7.0}
    result = compare(tally, 0.95)
    assert result.on.power_w == pytest.approx(540.0)
    assert result.off.power_w == pytest.approx(600.0)
    assert result.saving is not None
    assert result.saving.value == pytest.approx(0.1)
    assert result.pairs == 5
    with pytest.raises(ConfigError, match="nothing remains"):
        WindowTally(DESIGN, 10.0)


def test_what_is_unknown_is_not_counted() -> None:
    def lost(t: float, before: str) -> float | None:
        return None if t == 15.0 else by_arm(t, before)

    tally = windows_of(records_of(100.0, power=lost), DESIGN, settle_s=2.0)
    assert ([w.index for w in tally.windows], tally.unsound) == ([0, 2, 3, 4, 5, 6, 7, 8, 9], 1)
    assert compare(tally, 0.95).pairs == 4

    records = records_of(100.0, power=by_arm)
    late = [r for r in records if not 18.0 < r.sample.time_s - 100.0 < 25.0]
    assert 1 not in [w.index for w in windows_of(late, DESIGN, settle_s=2.0).windows]
    advised = [replace(r, mode="advise") if r.sample.time_s > 155.0 else r for r in records]
    assert [w.index for w in windows_of(advised, DESIGN, settle_s=2.0).windows] == [0, 1, 2, 3, 4]


def test_pairs_without_output_say_nothing_of_energy_per_token() -> None:
    tally = windows_of(records_of(60.0, power=by_arm), DESIGN, settle_s=2.0)
    tally.windows = [replace(w, output_tokens=3) if w.index == 0 else w for w in tally.windows]

    result = compare(tally, 0.95)
    assert (result.pairs, result.left_out) == (2, 1)


def ending(longest_s: float) -> Ending:
    return Ending(level=0.95, precision=0.02, longest_s=longest_s, open_load=False)


def test_a_trial_ends_when_it_is_certain_or_the_time_is_over() -> None:
    certain, long = Trial(DESIGN, 2.0, ending(3600.0)), Trial(DESIGN, 2.0, ending(50.0))
    rng = np.random.default_rng(0)

    def noisy(t: float, before: str) -> float:
        return by_arm(t, before) * float(rng.normal(1.0, 0.02))

    for record in records_of(600.0, power=noisy):
        for trial in (certain, long):
            if trial.over is None:
                trial.observe(record)

    assert certain.over == "the saving is known within 2 %"
    assert certain.judged is not None
    assert certain.judged.low is not None
    assert certain.judged.high is not None
    assert certain.judged.low <= 0.1 <= certain.judged.high
    assert certain.result.pairs < 20
    assert (long.over, long.result.pairs) == ("the time is over", 2)


def test_a_trial_that_is_over_asks_the_agent_to_stop() -> None:
    stop = threading.Event()
    watcher = Stopper(Trial(DESIGN, 2.0, ending(20.0)), stop)

    for record in records_of(19.5, power=by_arm):
        watcher.observe(record)
    assert not stop.is_set()
    watcher.observe(records_of(20.0, power=by_arm)[-1])
    assert stop.is_set()


def journal_at(path: Path, records: Sequence[TickRecord], design: Interleaving | None = DESIGN) -> str:
    header = JournalHeader(
        policy="static", policy_settings={"power_limit_w": 300.0}, profile_json=None, boards=(board_info(),),
        engine=engine_info(), period_s=0.5, emulated=True, started_at="", command="", interleaving=design,
    )  # fmt: skip
    journal = Journal(path, header)
    for record in records:
        journal.append(record)
    journal.close()
    return str(path)


def test_a_canarys_journal_is_compared_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = journal_at(tmp_path / "j.jsonl", records_of(200.0, power=by_arm))

    assert main(["ab", journal, "--json", "--settle-s", "5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pairs"] == 10
    assert told["saving"]["value"] == pytest.approx(0.1)
    assert told["saving"]["low"] <= 0.1 <= told["saving"]["high"]
    assert told["on"]["j_per_token"] == pytest.approx(0.54)
    assert told["design"]["window_s"] == 10.0

    assert main(["ab", journal, "--settle-s", "2"]) == 0
    table = capsys.readouterr().out
    assert "saving, GPU energy per output token:  +10.0 % (95 % interval" in table
    assert "careful: a request stays 4.0 s, longer than the 2 s" in table
    assert "0.540" in table
    assert "static 300 W against static: 10 pairs" in table


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--policy", "pals-paper"], "a journal is analysed as it is"),
        (["--certain", "10%"], "--certain 10% must lie in"),
        (["--certain", "sure"], "expected a share"),
        (["--settle-s", "10"], "nothing remains"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ab", journal_at(tmp_path / "j.jsonl", []), *options]) == 2
    assert told in capsys.readouterr().err


def test_a_journal_without_two_arms_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ab", journal_at(tmp_path / "j.jsonl", [], design=None)]) == 2
    assert "not written in canary mode" in capsys.readouterr().err


def ab(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PALS_")} | {"PALS_RUN_DIR": str(folder)}
    command = [sys.executable, "-m", "pals.cli", "ab", "--metrics-port", "0", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)


@pytest.mark.parametrize(
    ("engines", "options", "told"),
    [
        (0, [], "no running engine with PALS found"),
        (2, [], "choose one with --engine PID"),
        (1, [], "real boards: say --mode auto to allow it. Nothing was changed"),
        (1, ["--mode", "advise"], "in advise mode both arms would be the same"),
        (1, ["--policy", "pals-paper"], "--throughput-target"),
        (1, ["--against", "statik"], "did you mean 'static'"),
        (1, ["--window-s", "1", "--settle-s", "0"], "at least 6 control periods"),
        (1, ["--hours", "0"], "--hours 0 must be above 0"),
        (1, ["--precision", "0%"], "--precision 0% must be above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    engines: int, options: list[str], told: str, tmp_path: Path
) -> None:
    world = AgentWorld(tmp_path, Clock())
    tmp_path.chmod(0o700)
    for i in range(engines):
        world.add(f"model-{i}", boards=(i,), pid=None if i == 0 else world.spawn().pid)
    before = sorted(tmp_path.iterdir())

    try:
        done = ab(tmp_path, *options)
    finally:
        world.close()

    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_simulated_canary_tells_the_saving_that_two_whole_runs_have(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    pytest.importorskip("pyarrow")
    config = tmp_path / "pals.toml"
    config.write_text("[control]\ncanary_window_s = 30\n")
    given = ["simulate", "--model", "mixtral-8x7b", "--boards", "4xa100-sxm4-80gb", "--load", "0.5", "--hours", "0.3"]

    def run(name: str, *options: str) -> float:
        out = tmp_path / name
        assert main([*given, "--config", str(config), "--journal", *options, "--out", str(out)]) == 0
        told = json.loads((out / "outcomes.json").read_text())
        return float(told[0]["tokens_per_j_gpu"])

    truth = 1.0 - run("off") / run("on", "--power-limit-w", "250")
    run("canary", "--power-limit-w", "250", "--mode", "canary:50%")
    header, records = read_journal(tmp_path / "canary" / "static.jsonl")
    assert header.interleaving is not None
    result = compare(windows_of(records, header.interleaving, 10.0), 0.95)

    assert result.pairs == 18
    for saving in (result.saving, result.same_load):
        assert saving is not None
        assert saving.low is not None
        assert saving.high is not None
        assert saving.low <= truth <= saving.high
    assert result.same_load is not None
    assert result.same_load.value == pytest.approx(truth, abs=0.03)
    assert main(["replay", str(tmp_path / "canary" / "static.jsonl")]) == 0
