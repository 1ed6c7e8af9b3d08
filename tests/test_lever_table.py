"""Tables of levers: what binds is in effect, figures between levels, and silence outside what the profile measured."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.control.guard import Guard
from pals.control.lever_table import FREE, NATURAL, POWER, TOKENS, TPOT, Lever, LeverTables, key_of, running_at
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from tests.profile_world import whole_profile

GUARD = Guard(
    min_limit_w=100.0, max_limit_w=400.0, boards=4, launch_sequences=64, sm_clocks_mhz=tuple(range(210, 1411, 15))
)
BATCHES = np.array([64.0, 16.0, 4.0])
CHAT = key_of(1200.0, 225.0, 0.0, None)


@cache
def tables() -> LeverTables:
    return LeverTables(whole_profile().model(), GUARD, BATCHES)


def test_figures_at_a_level_are_the_profiles_own() -> None:
    rows = tables().rows(CHAT, 400.0)
    assert rows is not None
    point = OperatingPoint(power_limit_w=400.0, active_sequences=int(rows.levels[-1]))
    told = tables().fitted.forecast([point], Load(mix=CHAT.mix))
    here = rows.of(0, 64.0)
    assert here[POWER] == pytest.approx(float(told.power_w.value[0]))
    assert here[TPOT] == pytest.approx(float(told.tpot_p50_s.value[0]))


def test_under_a_lower_ceiling_no_lever_draws_more_and_none_is_faster() -> None:
    high, low = tables().rows(CHAT, 400.0), tables().rows(CHAT, 170.0)
    assert high is not None
    assert low is not None
    free_w = low.of(0, 64.0)[POWER]
    for i, lever in enumerate(low.levers):
        assert low.of(i, 64.0)[POWER] <= free_w * (1 + 1e-9)
        assert low.of(i, 64.0)[TOKENS] <= high.of(0, 64.0)[TOKENS] * (1 + 1e-9)
        assert lever.limit_w is None or lever.limit_w < 170.0


def test_a_lock_above_what_the_ceiling_leaves_is_the_ceiling_itself() -> None:
    rows = tables().rows(CHAT, 120.0)
    assert rows is not None
    top = rows.position(Lever(clock_mhz=max(tables().clocks_mhz)))
    assert top is not None
    assert rows.of(top, 64.0)[:NATURAL] == pytest.approx(rows.of(0, 64.0)[:NATURAL])


def test_a_mix_that_the_profile_may_not_speak_of_has_no_table() -> None:
    assert tables().rows(key_of(120_000.0, 4.0, 0.0, None), 400.0) is None


def test_lengths_near_the_grid_point_keep_it_and_others_do_not() -> None:
    assert key_of(1230.0, 220.0, 0.0, CHAT) is CHAT
    assert key_of(2400.0, 220.0, 0.0, CHAT) != CHAT
    assert key_of(1200.0, 225.0, 0.0, None).mix.prompt_tokens == pytest.approx(1200.0, rel=0.05)
    assert key_of(1200.0, 225.0, 500.0, None).mix.cached_tokens == pytest.approx(500.0, rel=0.05)


@given(st.floats(1.0, 5000.0))
def test_so_many_run_that_output_keeps_up(asked: float) -> None:
    rows = tables().rows(CHAT, 400.0)
    assert rows is not None
    for i, n in enumerate(running_at(rows.rates, rows.levels, asked)):
        if n > rows.levels[-1]:
            assert rows.rates[i, -1] < asked
        elif n >= 1.0:
            assert rows.of(i, float(n))[TOKENS] == pytest.approx(asked, rel=1e-6)
        else:
            assert rows.rates[i, 0] * n == pytest.approx(asked, rel=1e-6)


def test_levels_lie_between_what_was_measured_and_what_may_be_asked() -> None:
    lower = LeverTables(
        whole_profile().model(), Guard(min_limit_w=150.0, max_limit_w=300.0, boards=4, launch_sequences=64), BATCHES
    )
    assert lower.limits_w[0] == 150.0
    assert lower.limits_w[-1] == 300.0
    assert lower.clocks_mhz == ()  # boards that name no clocks
    with pytest.raises(ValueError, match="lowest limit"):
        LeverTables(
            whole_profile().model(), Guard(min_limit_w=50.0, max_limit_w=90.0, boards=4, launch_sequences=64), BATCHES
        )


def test_the_first_lever_is_no_lever() -> None:
    rows = tables().rows(CHAT, 400.0)
    assert rows is not None
    assert rows.levers[0] == FREE
    assert np.all(np.diff(rows.rates, axis=1) >= 0)
    assert isinstance(CHAT.mix, Mix)


def test_a_length_that_no_request_has_has_no_table_even_without_a_hull() -> None:
    unmeasured = LeverTables(replace(whole_profile().model(), rows=()), GUARD, BATCHES)
    assert unmeasured.rows(CHAT, 400.0) is not None
    assert unmeasured.rows(key_of(1200.0, 225.0, 1e14, None), 400.0) is None


def test_a_ceiling_below_the_lowest_limit_measured_is_not_raised() -> None:
    whole = whole_profile().model()
    high = LeverTables(replace(whole, rows=tuple(r for r in whole.rows if r.power_limit_w >= 200.0)), GUARD, BATCHES)
    rows = high.rows(CHAT, 120.0)
    assert rows is not None
    assert rows.ceiling_w == 120.0
    assert all(lever.limit_w is None for lever in rows.levers)
    assert rows.of(0, 64.0) == pytest.approx(high.rows(CHAT, 200.0).of(0, 64.0))  # type: ignore[union-attr]


@pytest.mark.parametrize(("guard", "told"), [
    (replace(GUARD, max_limit_w=700.0), "700 W"),
    (replace(GUARD, launch_sequences=256), "256"),
])  # fmt: skip
def test_a_profile_that_ends_before_the_boards_do_is_refused_at_once(guard: Guard, told: str) -> None:
    with pytest.raises(ValueError, match=f"{told}.*grid steps outside; profile again"):
        LeverTables(whole_profile().model(), guard, BATCHES)
