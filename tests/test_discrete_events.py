"""The simulator beside real vLLM: recorded emulated runs, and what is read off measured timelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pals.core.errors import ConfigError
from pals.experiments.plant_checks import request_timelines as timelines
from pals.experiments.plant_checks.discrete_events import COMPARED, emulated_rows, simulate
from pals.experiments.plant_checks.emulated_runs import CASES, Figures, digest, emulate, recorded
from pals.experiments.plant_checks.measured import data_folder
from pals.plant.specs import board_specs
from pals.plant.step_constants import step_constants

pytest.importorskip("numba")
pytest.importorskip("pyarrow")


def test_the_recorded_runs_are_of_the_present_plant() -> None:
    """Fails after a change of the plant's constants: record anew, as the file's module says."""
    stale = [case.name for case, kept, _ in recorded() if kept != digest(case)]
    assert stale == []
    assert [case for case, _, _ in recorded()] == list(CASES)


def test_the_simulator_serves_as_real_vllm_does_on_emulated_boards() -> None:
    rows = emulated_rows()

    assert [r.reached for r in rows] == [True] * len(COMPARED)
    assert max(r.worst for r in rows) < 1.0  # far inside the targets: the semantics are the same
    for case, _, found in recorded():
        served = simulate(case, until_s=found.last_token_s)
        assert served.output_tokens == found.output_tokens
        assert abs(served.preemptions - found.preemptions) <= 0.05 * found.preemptions


def test_a_step_that_slows_under_a_binding_limit_shows_beside_one_that_is_booked_ahead() -> None:
    case, _, found = next(r for r in recorded() if r[0].power_limit_w < 400.0)
    booked, real = (simulate(case, until_s=found.last_token_s, pace_when_planned=b) for b in (True, False))
    assert booked.ttft_p95_s == pytest.approx(found.ttft_p95_s, rel=0.01)
    assert real.ttft_p95_s != pytest.approx(found.ttft_p95_s, rel=0.01)


@pytest.mark.slow
def test_a_run_recorded_now_is_the_recorded_one() -> None:
    pytest.importorskip("vllm")
    case, _, found = recorded()[0]
    again = emulate(case, print)
    assert isinstance(again, Figures)
    for name in Figures.__dataclass_fields__:
        assert getattr(again, name) == pytest.approx(getattr(found, name), rel=1e-6)


def series(**columns: object) -> dict[str, np.ndarray]:
    return {k: np.asarray(v, float) for k, v in columns.items()}


def test_the_launch_limit_is_where_running_stood_while_others_waited() -> None:
    held = series(running=[60, 128, 128, 128, 90], waiting=[0, 4, 9, 3, 0], kv_cache_pct=[0.0] * 5)
    full = series(running=[30, 45, 42, 41, 40], waiting=[0, 9, 9, 9, 0], kv_cache_pct=[60, 99, 99, 99, 99])
    assert timelines.most_sequences(held) == 128
    assert timelines.most_sequences(full) == timelines.DEFAULT_SEQS


def test_kv_capacity_is_bounded_by_what_the_first_running_can_hold() -> None:
    count = 20
    requests = series(
        arrival_s=np.arange(count) * 0.1,
        scheduled_s=np.arange(count) * 0.1,
        first_token_s=np.arange(count) * 0.1 + 0.05,
        last_token_s=np.full(count, 1e6),
        input_tokens=np.full(count, 150),
        output_tokens=np.full(count, 10),
    )
    usage = series(running=[0, 5, 10], kv_cache_pct=[0.0, 50.0, 100.0])
    assert timelines.kv_blocks(usage, requests) == pytest.approx(100, abs=1)
    assert timelines.kv_blocks(series(running=[5, 9], kv_cache_pct=[0.0, 0.0]), requests) is None


def test_every_run_there_is_is_compared_and_unknown_names_are_refused(tmp_path: Path) -> None:
    folder = data_folder()
    runs = timelines.read_runs(folder)
    assert len(runs) == len(list((folder / timelines.FOLDER).glob("*__requests.csv.gz")))
    rows = timelines.timeline_rows(folder)
    judged = [r for r in rows if not r.in_sample]
    assert sum(r.cases for r in judged) == (len(runs) - 1) * len(timelines.AT_MOST)  # one is fitted on
    dense = next(r for r in judged if r.check.endswith("dense, TPOT mean"))
    assert all("Llama" in r.group for r in dense.residuals)
    assert dense.worst < 5.0
    own = next(r for r in rows if r.check.endswith("its own routing, TPOT mean"))
    assert own.in_sample
    assert own.verdict.endswith("in sample")
    with pytest.raises(ConfigError, match="board RTX9999: the plant does not know it"):
        timelines.step_model(folder, replace(runs[0], board="RTX9999"))
    with pytest.raises(ConfigError, match="model Babbage-1T; add it to"):
        timelines.step_model(folder, replace(runs[0], model="Babbage-1T"))


def test_the_shipped_host_time_is_what_the_fit_finds() -> None:
    fitted = timelines.fit(data_folder())["rtx-pro-6000"]["values"]
    shipped = step_constants(board_specs()["rtx-pro-6000"])
    assert shipped.host_s == pytest.approx(fitted["host_s"], rel=0.1)
    batch = 128
    assert shipped.host_s + batch * shipped.host_per_sequence_s == pytest.approx(
        fitted["host_s"] + batch * fitted["host_per_sequence_s"], rel=0.1
    )
