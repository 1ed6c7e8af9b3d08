"""The virtual clock: time passes in waits only, and what is due happens on the way, in order."""

from __future__ import annotations

import pytest

from pals.runtime.clock import VirtualClock, WallClock


def test_actions_run_at_exactly_their_times_and_in_the_order_of_asking() -> None:
    clock = VirtualClock()
    seen: list[tuple[str, float]] = []
    for name, at_s in (("late", 2.0), ("first", 1.0), ("second", 1.0), ("beyond", 5.0)):
        clock.call_at(at_s, lambda name=name: seen.append((name, clock.now_s())))  # type: ignore[misc]

    clock.wait_until(3.0)

    assert seen == [("first", 1.0), ("second", 1.0), ("late", 2.0)]
    assert (clock.now_s(), clock.next_due_s()) == (3.0, 5.0)


def test_an_action_may_ask_for_the_next_and_may_itself_wait() -> None:
    clock = VirtualClock()
    seen: list[float] = []

    def every_second() -> None:
        seen.append(clock.now_s())
        clock.call_at(clock.now_s() + 1.0, every_second)
        clock.wait_until(clock.now_s() + 0.25)  # as a slow driver call would

    clock.call_at(0.0, every_second)
    clock.wait_until(3.5)

    assert seen == [0.0, 1.0, 2.0, 3.0]
    assert clock.now_s() == 3.5


def test_time_never_runs_backwards() -> None:
    clock = VirtualClock(10.0)
    seen: list[float] = []
    clock.call_at(9.0, lambda: seen.append(clock.now_s()))

    clock.wait_until(7.0)

    assert seen == [10.0]
    assert clock.now_s() == 10.0


def test_an_actions_error_ends_the_wait_at_its_time() -> None:
    clock = VirtualClock()

    def fail() -> None:
        raise OSError("board lost")

    clock.call_at(1.0, fail)
    with pytest.raises(OSError, match="board lost"):
        clock.wait_until(3.0)
    assert clock.now_s() == 1.0


def test_waiting_for_ever_is_refused_and_dropped_actions_stay_away() -> None:
    clock = VirtualClock()
    clock.call_at(1.0, lambda: pytest.fail("was dropped"))
    clock.drop_all()
    clock.wait_until(2.0)
    with pytest.raises(ValueError, match="never"):
        clock.wait_until(clock.next_due_s())


def test_the_wall_clock_does_not_wait_for_what_has_passed() -> None:
    clock = WallClock()
    before_s = clock.now_s()
    clock.wait_until(before_s - 1000.0)
    clock.wait_until(before_s + 0.01)
    assert clock.now_s() >= before_s + 0.01
