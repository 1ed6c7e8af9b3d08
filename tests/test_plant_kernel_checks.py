"""The check of the kernel formulas: what a benchmark's routing does, which shapes are held out, and that a fit finds constants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pals.core.errors import ConfigError
from pals.experiments.plant_checks import kernels as check
from pals.experiments.plant_checks.kernel_cases import Cases, held_out, joined, read_cases, subsample
from pals.experiments.plant_checks.kernel_fit import fit_cases
from pals.experiments.plant_checks.kernel_models import gemm_seconds
from pals.experiments.plant_checks.kernel_profiles import HELD_OUT_MODEL, read_profiles
from pals.experiments.plant_checks.routing import balanced_counts, benchmark_load
from pals.plant import kernels

DATA = Path(__file__).resolve().parents[1] / "data"


def gemm_cases(seconds: np.ndarray | None = None) -> Cases:
    rng = np.random.default_rng(3)
    m, n, k = (rng.choice([2**i for i in range(lo, 14)], 400) for lo in (0, 8, 8))
    columns = {"m": m, "n": n, "k": k}
    found = np.ones(400) if seconds is None else seconds
    return Cases("made up", "gemm", "h100-sxm5-80gb", "bfloat16", False, columns, found, held_out([n, k]))


def test_a_whole_shape_is_held_out_or_not_whatever_the_rows_around_it() -> None:
    cases = gemm_cases()
    n, k = cases.columns["n"], cases.columns["k"]
    assert 0.1 < cases.held_out.mean() < 0.4
    for shape in {(a, b) for a, b in zip(n, k, strict=True)}:
        rows = (n == shape[0]) & (k == shape[1])
        assert len(set(cases.held_out[rows])) == 1
        assert held_out([n[rows][:1], k[rows][:1]])[0] == cases.held_out[rows][0]


def test_a_fit_finds_constants_that_reproduce_the_kernels_it_was_shown() -> None:
    known = kernels.board_kernels("h100-sxm5-80gb").gemm["bfloat16"]
    board = kernels.constants_file()["h100-sxm5-80gb"]
    cases = gemm_cases(gemm_seconds(known, gemm_cases()))

    fitted = fit_cases([cases], {**board["given"], **kernels.constants_file()["_formats"]["bfloat16"]})

    again = gemm_seconds(kernels.GemmConstants(**{f: fitted[f] for f in known._fields}), cases)
    errors = np.abs(again / cases.seconds - 1)
    assert errors[cases.held_out].mean() < 0.02
    assert fitted["confidence"] == "A" and "made up" in fitted["fitted_on"]


def test_a_subsample_is_the_same_every_time_and_keeps_what_fits() -> None:
    cases = gemm_cases()
    assert subsample(cases, 1000) is cases
    assert np.array_equal(subsample(cases, 50).columns["m"], subsample(cases, 50).columns["m"])
    assert len(joined([cases, cases])) == 1 and len(joined([cases, cases])[0].seconds) == 800


@pytest.mark.parametrize("law", ["balanced", "power_law_1.01", "power_law_1.2"])
@pytest.mark.parametrize("old", [False, True])
def test_benchmark_routing_uses_every_assignment_once(law: str, old: bool) -> None:
    for tokens in (1, 4, 64, 1000):
        load = benchmark_load(law, 64, 8, tokens, 1, old)
        assert load.assignments[0] == tokens * 8
        assert load.touched[0] <= min(64, tokens * 8)
        assert np.all(load.slots[0] >= load.assignments[0])


def test_a_hot_rank_holds_more_than_its_share_under_a_power_law() -> None:
    assert benchmark_load("balanced", 64, 8, 1000, 8, False).assignments[0] == pytest.approx(1000, rel=0.05)
    assert benchmark_load("power_law_1.2", 64, 8, 1000, 8, False).assignments[0] > 1300
    assert balanced_counts(64, 8, 16).sum() == 128


def test_profiles_hold_out_a_model_as_a_whole() -> None:
    profiles = read_profiles(DATA)
    assert {c.board for c in profiles} == {"rtx-4090", "rtx-pro-6000"}
    for cases in profiles:
        if cases.columns["model"][0] == HELD_OUT_MODEL:
            assert cases.held_out.all()
        elif len(cases.seconds) > 200:
            assert 0.1 < cases.held_out.mean() < 0.3


def test_missing_tables_are_an_error_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "aiconfigurator-silicon").mkdir()
    with pytest.raises(ConfigError, match=r"index\.json"):
        read_cases(tmp_path)
    (tmp_path / "aiconfigurator-silicon" / "index.json").write_text("[]")
    with pytest.raises(ConfigError, match="no kernel tables"):
        read_cases(tmp_path)


@pytest.mark.slow
def test_every_row_of_the_check_is_a_finite_error_on_cases_the_fit_did_not_see() -> None:
    rows = check.check(DATA)
    assert len({r.check for r in rows}) == len(rows)
    assert all(np.isfinite(r.value) and r.cases > 0 for r in rows)
    reached = [r for r in rows if r.reached]
    assert len(reached) >= 0.6 * len(rows)
