"""Perturbed constants: the same for one seed, moved a little, and never what the driver reports."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.plant.boards import BoardBank
from pals.plant.perturb import BOARD_KEEPS, Law, perturb
from pals.plant.silicon import Load, load_power_w, voltage
from pals.plant.specs import BoardSpec, board_specs

NAMES = sorted(board_specs())


class Constants(NamedTuple):
    """As a step model's."""

    host_s: float
    overlap_p: float
    layers: int
    nothing: float
    name: str
    table_s: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A record in a record."""

    inner: Constants
    scale: float
    wrong: float | None = None


GIVEN = Constants(0.001, 1.05, 32, 0.0, "x", np.array([1.0, 2.0]))


@given(seed=st.integers(0, 2**32), spread=st.floats(0.01, 0.3), name=st.sampled_from(NAMES), law=st.sampled_from(["lognormal", "uniform"]))  # fmt: skip
def test_a_board_moves_in_what_nothing_reports_alone(seed: int, spread: float, name: str, law: Law) -> None:
    spec = board_specs()[name]
    moved = perturb(spec, seed=seed, spread=spread, law=law)

    assert moved == perturb(spec, seed=seed, spread=spread, law=law)
    assert all(getattr(moved, keep) == getattr(spec, keep) for keep in BOARD_KEEPS)
    widest = np.exp(2.5 * spread)
    for before, after in zip(spec.silicon, moved.silicon, strict=True):
        assert (after == 0.0) if before == 0.0 else (1 / widest - 1e-9 <= after / before <= widest + 1e-9)
    assert moved.silicon.static_w != spec.silicon.static_w
    assert moved.silicon.leak_reference_c == spec.silicon.leak_reference_c


@given(seed=st.integers(0, 1000), name=st.sampled_from(NAMES), low=st.floats(100, 3000), high=st.floats(100, 3000))
def test_a_moved_board_still_obeys_physics(seed: int, name: str, low: float, high: float) -> None:
    k = perturb(board_specs()[name], seed=seed, spread=0.2).silicon
    low, high = sorted((low, high))
    load = Load(compute=0.5, memory=0.5)

    assert 1.0 <= voltage(k, low / 1000) <= voltage(k, high / 1000)
    assert 0.0 < load_power_w(k, load, low) <= load_power_w(k, load, high)


def test_seeds_differ_and_a_spread_of_nothing_moves_nothing() -> None:
    spec = board_specs()["h100-sxm5-80gb"]
    static = [perturb(spec, seed=s, spread=0.15).silicon.static_w / spec.silicon.static_w for s in range(400)]

    assert len(set(static)) > 390  # the ends of the law are drawn in
    assert np.std(np.log(static)) == pytest.approx(0.15, rel=0.15)
    assert np.mean(np.log(static)) == pytest.approx(0.0, abs=0.03)
    assert perturb(spec, seed=3, spread=0.0) == spec


@given(seed=st.integers(0, 10_000))
def test_records_of_any_kind_move_by_field_and_keep_counts_words_and_floors(seed: int) -> None:
    outer = Outer(inner=GIVEN, scale=3.0)
    moved = perturb(outer, seed=seed, spread=0.2)

    assert (moved.inner.layers, moved.inner.name, moved.inner.nothing, moved.wrong) == (32, "x", 0.0, None)
    assert moved.inner.overlap_p >= 1.0
    assert moved.inner.host_s != GIVEN.host_s
    ratio = moved.inner.table_s / GIVEN.table_s
    assert ratio[0] == pytest.approx(ratio[1])
    assert GIVEN.table_s.tolist() == [1.0, 2.0]  # the given array is left alone
    assert perturb(GIVEN, seed=seed, spread=0.2).host_s == moved.inner.host_s  # whatever holds it
    kept = perturb(GIVEN, seed=seed, spread=0.2, keep=("host_s",))
    assert (kept.host_s, kept.overlap_p) == (GIVEN.host_s, moved.inner.overlap_p)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.0\.\.0\.5|outside 0\.\.0\.5"):
        perturb(GIVEN, seed=0, spread=0.9)
    with pytest.raises(ValueError, match="has no field hots_s; it has host_s"):
        perturb(GIVEN, seed=0, keep=("hots_s",))
    with pytest.raises(ValueError, match="unknown law"):
        perturb(GIVEN, seed=0, law="cauchy")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="neither a NamedTuple nor a dataclass"):
        perturb(3.0, seed=0)


def test_emulated_boards_run_on_perturbed_silicon_in_every_process(tmp_path: Path) -> None:
    spec: BoardSpec = board_specs()["a100-sxm4-80gb"]
    moved = perturb(spec, seed=7, spread=0.2)
    bank = BoardBank.create(tmp_path / "bank", moved, 1, now_s=0.0)
    other = BoardBank.open(bank.path)

    assert other.spec.silicon == bank.spec.silicon == moved.silicon
    assert dataclasses.replace(other.spec, silicon=spec.silicon) == dataclasses.replace(
        spec, hbm_bytes_s=other.spec.hbm_bytes_s, nvlink_bytes_s=other.spec.nvlink_bytes_s
    )
    for each in (bank, other):
        each.close()
