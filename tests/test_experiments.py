"""The trace slice, a run's figures, the table and the figure."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from pals.core.errors import ConfigError
from pals.core.quantities import OperatingPoint, Slo
from pals.engines.openai_client import RequestResult, RequestSpec
from pals.experiments.demo import runs_of, series_of
from pals.experiments.outcome import outcome
from pals.experiments.scenarios import SCENARIOS, Scenario, scenario_of
from pals.experiments.trace import describe, load_slice
from pals.models.profile import MOST_BYTES, Profile
from pals.plant.specs import parse_boards
from pals.runtime.budgets import parse_budget
from pals.runtime.tick import TickRecord
from pals.views.figure import RunSeries, draw_runs
from pals.views.report import outcome_table
from tests.test_tick import go, rig
from tests.worlds import Board, Clock, Engine

SLO = Slo(throughput_tokens_s=1000.0, ttft_p95_s=1.0, tpot_p95_s=0.05)


def records() -> list[TickRecord]:
    clock = Clock(until_s=110.0)
    boards = [Board(clock, i) for i in range(4)]
    return go(rig(clock, boards, Engine(clock)), clock, parse_budget("0:1600,5:1000"), SLO)


def result(sent_s: float, ttft_s: float, tpot_s: float, tokens: int = 11) -> RequestResult:
    spec = RequestSpec(at_s=sent_s - 101, prompt_tokens=10, output_tokens=11)
    first_s = sent_s + ttft_s
    return RequestResult(
        spec=spec, sent_s=sent_s, first_token_s=first_s, last_token_s=first_s + 10 * tpot_s, output_tokens=tokens
    )


def test_the_slice_is_the_trace_and_keeps_its_window() -> None:
    whole, cut = load_slice(600.0), load_slice(60.0, start_s=30.0)

    assert len(whole) == 4123
    assert cut[0].at_s >= 0
    assert cut[-1].at_s < 60.0
    assert [(s.prompt_tokens, s.output_tokens) for s in cut] == [
        (s.prompt_tokens, s.output_tokens) for s in whole if 30.0 <= s.at_s < 90.0
    ]
    assert "Azure 2023" in describe(cut)
    with pytest.raises(ConfigError, match="600 s"):
        load_slice(601.0)


def test_a_runs_figures_are_counted_not_estimated() -> None:
    results = [result(101.0, 0.5, 0.02), result(102.0, 2.0, 0.02), result(108.0, 0.5, 0.1, tokens=10)]
    failed = RequestResult(spec=results[0].spec, sent_s=103.0, error="HTTP 503")

    o = outcome("run", [*results, failed], records(), SLO)

    assert (o.requests, o.failed, o.wrong_length, o.output_tokens) == (4, 1, 1, 32)
    assert o.span_s == pytest.approx(8.5)
    full_s = 105.0 + 0.5 - 101.0  # 1280 W until the tick after the budget's step, 980 W from then on
    assert o.gpu_energy_j == pytest.approx(full_s * 1280 + (8.5 - full_s) * 980, rel=0.03)
    assert o.tokens_per_j_node < o.tokens_per_j_gpu
    assert o.ttft_missed == pytest.approx(1 / 3)
    assert o.tpot_missed == pytest.approx(1 / 3)
    assert o.over_budget_s == 0.0  # the step came after what was drawn before it


def test_a_run_without_answers_is_an_error_that_says_why() -> None:
    failed = RequestResult(spec=load_slice(10.0)[0], sent_s=103.0, error="HTTP 503")

    with pytest.raises(ValueError, match="HTTP 503"):
        outcome("run", [failed], records(), SLO)


def test_the_table_names_gains_against_the_first_run() -> None:
    first = outcome("static", [result(101.0, 0.5, 0.02)] * 3, records(), SLO)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - rich keeps it
    console.print(outcome_table([first, first], title="Emulated"))
    console.file.close()
    text = console.export_text()

    assert "(+0.0%)" in text
    assert "tokens/J, node" in text
    assert "Emulated" in text


def test_the_figure_is_drawn_and_uneven_series_are_refused(tmp_path: Path) -> None:
    series = [series_of(run, records(), 101.0, SLO) for run in runs_of(SCENARIOS[0], 60.0)]

    draw_runs(series, tmp_path / "f.png", title="t", subtitle="s")

    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "f.png").stat().st_size > 20_000
    with pytest.raises(ValueError, match="one length"):
        RunSeries(
            name="x", time_s=[0.0, 1.0], power_w=[1.0], limit_w=[1.0], budget_w=[None], active_limit=[1], running=[1],
            waiting=[0], tokens_per_s=[1.0], target_tokens_per_s=None,
        )  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.slug)
def test_every_scenario_has_a_sound_profile_and_a_budget_that_bites(scenario: Scenario) -> None:
    profile = Profile.from_json(scenario.profile.read_text())
    model = profile.model()
    spec, count = parse_boards(scenario.boards)
    default = OperatingPoint(power_limit_w=spec.default_limit_w, active_sequences=profile.fingerprint.launch_sequences)

    assert (profile.source, profile.fingerprint.model) == ("emulated", scenario.model)
    assert (profile.fingerprint.board, profile.fingerprint.boards) == (spec.nvml_name, count)
    assert model.quality["power_w"][1] < 0.03
    assert model.quality["tokens_per_s"][1] < 0.03
    assert scenario.profile.stat().st_size <= MOST_BYTES
    assert count * spec.min_limit_w < scenario.low_budget_w < 0.9 * model.predict(default).power_w
    assert scenario.high_budget_w >= count * spec.default_limit_w


def test_a_scenario_is_found_by_a_short_name_and_others_are_refused_by_name() -> None:
    assert scenario_of(None) is SCENARIOS[0]
    assert scenario_of("mixtral-8x7b") is SCENARIOS[0]
    assert scenario_of("qwen3-30b").model == "Qwen/Qwen3-30B-A3B"
    with pytest.raises(ConfigError, match="no profile for openai-community/gpt2"):
        scenario_of("gpt2")
