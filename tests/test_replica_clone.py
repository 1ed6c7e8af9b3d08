"""A clone of a replica goes on exactly as the original would, and neither sees the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.errors import DeviceLostError
from pals.plant.replica import Replica
from tests.test_replica import FEW, bits, load, make, random_load

pytest.importorskip("numba")


@FEW
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 80),
    kv_blocks=st.integers(64, 400),
    cut_s=st.lists(st.floats(0.0, 0.9), min_size=1, max_size=4),
    lowering=st.sampled_from(["drain", "time-slice", "preempt"]),
)
def test_a_clone_steered_alike_goes_on_exactly_alike_and_leaves_the_other_alone(
    seed: int, count: int, kv_blocks: int, cut_s: list[float], lowering: str
) -> None:
    """Also a clone of a clone, in the middle of steps, writes on their way, ended requests and dips that are still to be drawn."""

    def steer(replica: Replica, until_s: float) -> Replica:
        replica.set_active_sequences(7, lowering)
        replica.set_limit_w(130.0)
        replica.advance(until_s + 0.3)
        replica.set_active_sequences(None)
        replica.set_clock_lock(1005)
        replica.inject(1, "external_limit", 120.0)
        replica.submit(load([5.0], 90, 30))
        replica.advance(60.0)
        return replica

    replica = make(kv_blocks=kv_blocks, max_num_seqs=24, boards=2, board_seed=seed)
    replica.submit(random_load(seed, count))
    replica.set_limit_w(110.0)
    for at_s in sorted(cut_s):
        replica.advance(at_s)
        replica = replica.clone()
    twin, before = replica.clone(), bits(replica)
    steer(twin, max(cut_s))
    assert bits(replica) == before

    steer(replica, max(cut_s))
    assert twin.energy_j() == replica.energy_j()
    assert twin.counters() == replica.counters()
    assert twin.boards() == replica.boards()
    for name in ("scheduled_s", "first_token_s", "last_token_s", "preemptions"):
        np.testing.assert_array_equal(getattr(twin.results(), name), getattr(replica.results(), name))
    assert not np.isnan(twin.results().last_token_s).any()


def test_a_clone_of_a_closed_loop_sends_what_the_other_sends_and_lost_boards_stay_lost() -> None:
    replica = make(boards=2)
    replica.keep_in_flight(20, load(np.zeros(400), np.arange(1, 401), 40))
    replica.advance(3.0)
    replica.inject(1, "lost", 1.0)
    twin = replica.clone()
    for r in (replica, twin):
        r.keep_in_flight(30, load(np.zeros(300), np.arange(1, 301), 25))
        r.advance(8.0)

    assert replica.sent_count > 200
    for first in (0, 5, replica.sent_count - 1):
        np.testing.assert_array_equal(twin.sent(first).last_token_s, replica.sent(first).last_token_s)
    np.testing.assert_array_equal(twin.sent().arrival_s, replica.sent().arrival_s)
    with pytest.raises(DeviceLostError):
        twin.boards()
