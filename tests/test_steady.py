"""A limit or a lock settles as measured: inert above natural draw, on the limit below it, never faster for less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.plant.boards import BoardBank
from pals.plant.silicon import Load
from pals.plant.specs import BoardSpec, board_specs
from pals.plant.steady import Settled, Work, draw_w, kernel_s, settle, settle_spread, shares, step_s

BOARDS = sorted(board_specs())
works = st.builds(
    Work, memory_s=st.floats(1e-4, 0.1), core_s=st.floats(1e-4, 0.1), host_s=st.floats(0.0, 0.02),
    overlap=st.floats(1.0, 8.0), activity=st.floats(0.0, 1.0), reference_mhz=st.just(1400.0),
)  # fmt: skip


def settled(name: str, work: Work, limit_w: float, ceiling_mhz: float | None = None) -> Settled:
    spec = board_specs()[name]
    return settle(
        spec.silicon, work, limit_w=limit_w, floor_mhz=spec.min_sm_clock_mhz,
        ceiling_mhz=spec.max_sm_clock_mhz if ceiling_mhz is None else ceiling_mhz,
    )  # fmt: skip


def natural_w(name: str, work: Work, clock_mhz: float | None = None) -> float:
    spec = board_specs()[name]
    return float(draw_w(spec.silicon, work, clock_mhz or spec.max_sm_clock_mhz, spec.silicon.leak_reference_c))


@given(name=st.sampled_from(BOARDS), work=works, above_w=st.floats(1.0, 500.0))
def test_a_limit_above_natural_draw_does_nothing(name: str, work: Work, above_w: float) -> None:
    found = settled(name, work, natural_w(name, work) + above_w)

    assert not found.binds
    assert found.clock_mhz == board_specs()[name].max_sm_clock_mhz
    assert found.power_w == pytest.approx(natural_w(name, work))


@given(name=st.sampled_from(BOARDS), work=works, share=st.floats(0.0, 1.0))
def test_mean_power_lies_on_a_binding_limit(name: str, work: Work, share: float) -> None:
    low_w, high_w = natural_w(name, work, board_specs()[name].min_sm_clock_mhz), natural_w(name, work)
    limit_w = low_w + 1.0 + share * (high_w - low_w)

    found = settled(name, work, limit_w)

    assert found.power_w <= limit_w + 1.0
    if found.binds:
        assert found.power_w >= limit_w - 4.0


@given(name=st.sampled_from(BOARDS), work=works, limits=st.tuples(st.floats(50.0, 900.0), st.floats(50.0, 900.0)))
def test_a_lower_limit_never_gives_more_throughput(name: str, work: Work, limits: tuple[float, float]) -> None:
    low, high = (settled(name, work, limit_w) for limit_w in sorted(limits))

    assert low.step_s >= high.step_s * (1.0 - 1e-9)
    assert low.power_w <= high.power_w + 1e-6


@given(name=st.sampled_from(BOARDS), work=works, limit_w=st.floats(50.0, 900.0), lock=st.floats(0.2, 1.0))
def test_a_lock_is_an_upper_bound(name: str, work: Work, limit_w: float, lock: float) -> None:
    lock_mhz = max(board_specs()[name].min_sm_clock_mhz, lock * board_specs()[name].max_sm_clock_mhz)

    found, free = settled(name, work, limit_w, lock_mhz), settled(name, work, limit_w)

    assert found.clock_mhz <= lock_mhz
    assert found.clock_mhz == pytest.approx(min(lock_mhz, free.clock_mhz), abs=0.01)


@given(name=st.sampled_from(BOARDS), work=works, clocks=st.tuples(st.floats(210, 1980), st.floats(210, 1980)))
def test_power_never_falls_and_time_never_rises_with_the_clock(
    name: str, work: Work, clocks: tuple[float, float]
) -> None:
    low, high = sorted(clocks)

    assert natural_w(name, work, low) <= natural_w(name, work, high) * (1 + 1e-9)
    assert step_s(work, low) >= step_s(work, high) * (1 - 1e-9)


@given(work=works, clock_mhz=st.floats(1400, 3000))
def test_shares_make_a_load(work: Work, clock_mhz: float) -> None:
    compute, memory, busy = shares(work, clock_mhz)

    Load(compute=compute, memory=memory, busy=min(1.0, busy))
    assert max(compute, memory) <= busy + 1e-9


def test_times_add_up_without_overlap_and_the_longer_one_counts_with_much() -> None:
    work = Work(0.010, 0.004, 0.0, 1.0, 0.5, 1400.0)

    assert kernel_s(work, 700.0) == pytest.approx(0.018)
    assert kernel_s(work._replace(overlap=60.0), 700.0) == pytest.approx(0.010, rel=0.01)
    assert kernel_s(work._replace(overlap=60.0), 280.0) == pytest.approx(0.020, rel=0.01)


def test_at_the_clock_floor_the_limit_is_exceeded_or_kernels_are_held_back() -> None:
    spec = board_specs()["a100-sxm4-80gb"]
    work = Work(0.001, 0.02, 0.0, 1.0, 1.0, 1410.0)
    floor_w = natural_w(spec.name, work, spec.min_sm_clock_mhz)
    limit_w = floor_w - 10.0
    asked: dict[str, float] = {
        "limit_w": limit_w,
        "floor_mhz": spec.min_sm_clock_mhz,
        "ceiling_mhz": spec.max_sm_clock_mhz,
    }

    over = settle(spec.silicon, work, **asked)
    held = settle(spec.silicon, work, **asked, lowest_duty=0.1)

    assert (over.clock_mhz, over.duty) == (spec.min_sm_clock_mhz, 1.0)
    assert over.power_w == pytest.approx(floor_w)
    assert held.power_w == pytest.approx(limit_w)
    assert held.step_s == pytest.approx(over.step_s / held.duty)
    assert held.duty < 1.0


def test_near_natural_draw_the_clamp_is_soft_and_far_from_it_hard() -> None:
    spec = board_specs()["rtx-5090"]
    work = Work(0.006, 0.006, 0.0, 1.0, 0.5, 3090.0)
    natural = natural_w(spec.name, work)
    limits_w = np.array([natural - 120.0, natural - 1.0, natural + 120.0])
    asked: dict[str, Any] = {
        "limit_w": limits_w,
        "floor_mhz": spec.min_sm_clock_mhz,
        "ceiling_mhz": spec.max_sm_clock_mhz,
    }

    soft = settle_spread(spec.silicon, work, spread=0.02, **asked)
    hard = settle(spec.silicon, work, **asked)

    assert soft.power_w[[0, 2]] == pytest.approx(hard.power_w[[0, 2]], abs=0.1)
    assert hard.power_w[1] - 10.0 < soft.power_w[1] < hard.power_w[1] - 2.0
    assert settle_spread(spec.silicon, work, spread=0.0, **asked).power_w == pytest.approx(hard.power_w)


def run_bank(folder: Path, spec: BoardSpec, work: Work, limit_w: float, boards: int = 12) -> tuple[float, float]:
    """Mean clock, MHz, and power, W, of `boards` boards that repeat `work` for a second after two of settling."""
    bank = BoardBank.create(folder / f"{limit_w}", spec, boards, seed=7, now_s=0.0)
    for i in range(boards):
        bank.set_limit(i, limit_w, 0.0)
    clocks, start_j = [], np.zeros(boards)
    for now_s in np.arange(0.0, 3.0, 0.02).tolist():
        if abs(now_s - 2.0) < 0.005:
            start_j = np.array([bank.energy_integral_j(i, now_s) for i in range(boards)])
        paces = [bank.pace_mhz([i], now_s) for i in range(boards)]
        clocks += paces if now_s >= 2.0 else []
        for i, pace_mhz in enumerate(paces):
            compute, memory, busy = shares(work, pace_mhz)
            load = Load(compute=compute, memory=memory, busy=min(1.0, busy))
            bank.book([i], now_s, now_s + 0.02, load, now_s)
    energy_j = np.array([bank.energy_integral_j(i, 3.0) for i in range(boards)]) - start_j
    bank.close()
    return float(np.mean(clocks)), float(energy_j.mean())


@pytest.mark.parametrize(
    ("name", "share"),
    [("a100-sxm4-80gb", 0.6), ("a100-sxm4-80gb", 0.85), ("h100-sxm5-80gb", 0.6), ("rtx-3090", 0.7), ("rtx-pro-6000", 1.2)],
)  # fmt: skip
def test_the_dynamic_governor_comes_to_rest_here(tmp_path: Path, name: str, share: float) -> None:
    spec = board_specs()[name]
    work = Work(0.010, 0.008, 0.001, 4.0, 0.6, float(spec.max_sm_clock_mhz))
    limit_w = min(spec.max_limit_w, share * natural_w(name, work))

    clock_mhz, power_w = run_bank(tmp_path, spec, work, limit_w)

    found = settled(name, work, limit_w)
    assert clock_mhz == pytest.approx(found.clock_mhz, rel=0.02)
    assert power_w == pytest.approx(found.power_w, rel=0.015)


@settings(deadline=None, max_examples=10)
@given(limit_w=st.floats(100.0, 400.0))
def test_arrays_and_floats_say_the_same(limit_w: float) -> None:
    spec = board_specs()["a100-sxm4-80gb"]
    work = Work(0.01, 0.01, 0.0, 4.0, 0.7, 1410.0)
    asked = {"floor_mhz": spec.min_sm_clock_mhz, "ceiling_mhz": spec.max_sm_clock_mhz}

    one = settle(spec.silicon, work, limit_w=limit_w, **asked)
    many = settle(spec.silicon, Work(*(np.full(2, float(v)) for v in work)), limit_w=np.full(2, limit_w), **asked)

    assert np.asarray(many.clock_mhz) == pytest.approx([float(one.clock_mhz)] * 2)
    assert np.asarray(many.step_s) == pytest.approx([float(one.step_s)] * 2)
