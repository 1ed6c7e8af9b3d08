"""What the counters say of the demand: rates, lengths, who comes late, and whether clients wait for their answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.control.demand import Demand, late, observe
from pals.core.quantities import LATENCY_BOUNDS_S, EngineSample
from tests.worlds import BUCKETS, engine_sample

PERIOD_S = 0.5


def grown(
    s: EngineSample, now_s: float, *, came: int, ended: int, prompt: int = 1000, output: int = 200
) -> EngineSample:
    """The sample a period later: `came` requests arrived and were prefilled, `ended` are over."""
    inside = s.running + came - ended
    return replace(
        s, time_s=now_s, steps=s.steps + 10, running=inside, arrived_requests=s.arrived_requests + came,
        arrived_prompt_tokens=s.arrived_prompt_tokens + came * prompt, prefill_tokens=s.prefill_tokens + came * prompt,
        output_tokens=s.output_tokens + ended * output, finished_requests=s.finished_requests + ended,
    )  # fmt: skip


def followed(
    counts: list[tuple[int, int]], *, prompt: int = 1000, output: int = 200, d: Demand | None = None
) -> Demand:
    d = d or Demand()
    s = d.before or engine_sample()
    start = d.at_s if d.before is not None else 0.0
    d = d if d.before is not None else observe(d, s, 0.0, PERIOD_S)
    for i, (came, ended) in enumerate(counts, start=1):
        s = grown(s, start + i * PERIOD_S, came=came, ended=ended, prompt=prompt, output=output)
        d = observe(d, s, start + i * PERIOD_S, PERIOD_S)
    return d


def test_nothing_is_known_before_a_few_requests_have_ended() -> None:
    assert not followed([(1, 0)] * 20).known
    assert followed([(1, 1)] * 20).known


def test_rate_and_lengths_are_those_of_the_counters() -> None:
    d = followed([(2, 2)] * 200)
    assert d.arrivals_per_s == pytest.approx(4.0, rel=0.01)
    assert d.prompt_tokens == pytest.approx(1000.0)
    assert d.output_tokens == pytest.approx(200.0)


def test_a_surge_is_believed_within_seconds_and_chance_is_not() -> None:
    rng = np.random.default_rng(0)
    steady = followed([(int(n), int(n)) for n in rng.poisson(2.0, 400)])
    assert steady.arrivals_per_s == pytest.approx(4.0, rel=0.25)
    surged = followed([(6, 2)] * 10, d=steady)
    assert surged.arrivals_per_s > 8.0


def test_lengths_that_change_are_followed_within_a_few_hundred_requests() -> None:
    d = followed([(2, 2)] * 300)
    d = followed([(2, 2)] * 300, d=d, prompt=2000, output=50)
    assert d.prompt_tokens == pytest.approx(2000.0, rel=0.06)
    assert d.output_tokens == pytest.approx(50.0, rel=0.2)


def test_clients_that_wait_for_answers_are_known_from_requests_inside_that_never_vary() -> None:
    start = [(32, 0)]
    assert followed(start + [(1, 1)] * 60).closed(PERIOD_S)
    rng = np.random.default_rng(1)
    open_loop = start + [(int(a), int(b)) for a, b in zip(rng.poisson(2, 60), rng.poisson(2, 60), strict=True)]
    assert not followed(open_loop).closed(PERIOD_S)
    assert not followed(start + [(0, 0)] * 60).closed(PERIOD_S)  # nobody comes or goes: nothing is known


def test_counters_that_fall_begin_anew() -> None:
    d = followed([(2, 2)] * 50)
    assert observe(d, engine_sample(), 100.0, PERIOD_S).counted.arrived == 0.0


@pytest.mark.parametrize(
    "counter", ["finished_requests", "refused_requests", "arrived_prompt_tokens", "prefill_tokens"]
)
def test_one_counter_that_falls_is_another_engine(counter: str) -> None:
    d = followed([(2, 2)] * 50)
    assert d.before is not None
    raised: dict[str, Any] = {counter: 10**6}
    fallen: dict[str, Any] = {counter: 0}
    much = replace(d.before, time_s=25.5, **raised)
    again = observe(observe(d, much, 25.5, PERIOD_S), replace(much, time_s=26.0, **fallen), 26.0, PERIOD_S)
    assert again.counted.arrived == again.counted.finished == 0.0
    assert again.arrivals_per_s >= 0.0


@given(st.lists(st.integers(0, 30), min_size=BUCKETS, max_size=BUCKETS), st.floats(0.002, 100.0))
def test_late_requests_lie_between_those_surely_late_and_those_maybe(new: list[int], target_s: float) -> None:
    seen = late((0,) * BUCKETS, tuple(new), target_s)
    bounds = (0.0, *LATENCY_BOUNDS_S, float("inf"))
    surely = sum(n for n, low in zip(new, bounds, strict=False) if low >= target_s)
    maybe = sum(n for n, high in zip(new, bounds[1:], strict=False) if high > target_s)
    assert surely - 1e-9 <= seen.late <= maybe + 1e-9
    assert seen.counted == sum(new)


def test_without_a_target_nobody_is_late() -> None:
    assert late((0,) * BUCKETS, (1,) * BUCKETS, None) == (0.0, 0.0)
