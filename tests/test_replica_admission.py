"""Admission control of the simulated replica: those beyond the bound are refused, and everybody else is answered in full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_replica import FEW, bits, load, make, random_load

pytest.importorskip("numba")


def test_a_burst_fills_the_batch_and_the_queue_and_the_rest_is_refused() -> None:
    replica = make(max_num_seqs=4)
    replica.set_most_waiting(3)
    replica.submit(load(np.zeros(20), 50, 30))
    replica.run()
    times, now = replica.results(), replica.counters()

    assert times.refused.tolist() == [False] * 7 + [True] * 13  # first come, first served
    assert np.isnan(times.last_token_s).tolist() == times.refused.tolist()
    assert np.isnan(times.scheduled_s).tolist() == times.refused.tolist()
    assert (now.arrived_requests, now.finished_requests, now.refused_requests) == (7, 7, 13)
    assert now.arrived_prompt_tokens == 7 * 50


def test_with_nobody_allowed_to_wait_free_places_are_still_taken() -> None:
    replica = make(max_num_seqs=2)
    replica.set_most_waiting(0)
    replica.submit(load([0.0, 0.0, 0.1, 30.0], 50, 400))
    replica.run()

    assert replica.results().refused.tolist() == [False, False, True, False]


@FEW
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 80),
    kv_blocks=st.integers(64, 400),
    seqs=st.integers(1, 20),
    most=st.integers(0, 20),
    async_scheduling=st.booleans(),
)
def test_the_queue_keeps_its_bound_and_all_that_are_let_in_are_answered(
    seed: int, count: int, kv_blocks: int, seqs: int, most: int, async_scheduling: bool
) -> None:
    replica = make(kv_blocks=kv_blocks, max_num_seqs=seqs, async_scheduling=async_scheduling)
    work = random_load(seed, count)
    replica.set_most_waiting(most)
    replica.submit(work)
    while not replica.finished:
        replica.advance(replica.now_s + 0.02)
        now = replica.counters()
        assert now.running + now.waiting <= seqs + most
        assert 0 <= now.arrived_requests - now.finished_requests - (now.running + now.waiting) <= now.preemptions
    now, times = replica.counters(), replica.results()

    let_in = ~times.refused
    assert now.refused_requests == times.refused.sum() == count - now.arrived_requests
    assert now.finished_requests == let_in.sum()
    assert now.output_tokens == work.output_tokens[let_in].sum()
    assert not np.isnan(times.last_token_s[let_in]).any()
    assert np.isnan(times.last_token_s[times.refused]).all()
    assert np.all(np.diff(times.scheduled_s[let_in]) >= 0)
    assert (now.running, now.waiting, now.kv_usage) == (0, 0, 0.0)


def test_free_places_that_lack_memory_do_not_lengthen_the_queue() -> None:
    replica = make(kv_blocks=64, max_num_seqs=64)  # two such requests fit, 62 places stay free
    replica.set_most_waiting(3)
    replica.submit(load(np.arange(100) * 0.05, 400, 100))
    longest = 0
    while not replica.finished:
        replica.advance(replica.now_s + 0.05)
        longest = max(longest, replica.counters().waiting)

    assert longest == 3
    assert replica.counters().refused_requests > 0


def test_a_bound_holds_from_when_it_is_set_until_it_is_lifted() -> None:
    replica = make(max_num_seqs=1)
    replica.submit(load([0.0, 0.1, 0.2, 1.1, 1.2, 2.1, 2.2], 50, 900))
    replica.advance(1.0)
    replica.set_most_waiting(1)
    replica.advance(2.0)
    replica.set_most_waiting(None)
    replica.run()

    assert replica.results().refused.tolist() == [False] * 3 + [True] * 2 + [False] * 2
    with pytest.raises(ValueError, match="cannot wait"):
        replica.set_most_waiting(-1)


def test_a_closed_loop_refuses_nobody() -> None:
    replica = make(max_num_seqs=2)
    replica.set_most_waiting(0)
    replica.keep_in_flight(6, load(np.zeros(12), 50, 20))
    replica.run()

    assert replica.counters().finished_requests == 12
    assert not replica.results().refused.any()


def test_compiled_and_plain_refuse_the_same() -> None:
    made = [make(max_num_seqs=3, compiled=c) for c in (True, False)]
    for replica in made:
        replica.set_most_waiting(2)
        replica.submit(random_load(3, 40))
        replica.run()

    assert bits(made[0]) == bits(made[1])
    assert made[0].counters().refused_requests > 0
