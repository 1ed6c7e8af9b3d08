"""Budgets: what holds when, from where, and until when; put ones live as long as they were promised, and no longer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.runtime.budgets import BudgetSchedule, InForce, parse_budget, parse_default
from pals.runtime.live_budget import LiveBudget
from tests.worlds import Clock

STEPS = parse_budget("10:900,20:none,30:1.6kW", default_w=800.0)


def test_budgets_step_at_their_times() -> None:
    schedule = parse_budget("0:none,30:1kW,60:1600")

    assert [schedule.at(t).power_w for t in (0.0, 29.9, 30.0, 60.0, 1e6)] == [None, None, 1000.0, 1600.0, 1600.0]
    assert parse_budget("1200").at(0.0).power_w == parse_budget("1.2kW").at(1e6).power_w == 1200.0


def test_the_default_holds_before_the_first_step_and_a_step_that_says_none_is_no_gap() -> None:
    assert [STEPS.at(t).power_w for t in (0.0, 10.0, 20.0, 30.0)] == [800.0, 900.0, None, 1600.0]
    assert STEPS.in_force(0.0) == InForce(power_w=800.0, source="default", until_s=10.0)
    assert STEPS.in_force(25.0) == InForce(power_w=None, source="schedule", until_s=30.0)
    assert STEPS.in_force(31.0) == InForce(power_w=1600.0, source="schedule", until_s=None)
    assert BudgetSchedule().in_force(3.0) == InForce(power_w=None, source="none", until_s=None)


def test_a_row_of_a_file_may_expire_and_then_the_default_holds(tmp_path: Path) -> None:
    path = tmp_path / "budget.csv"
    path.write_text("time_s,power_w,expires_s\n0,2kW,30\n60,900,\n90,none,none\n100,700,101.5\n")
    schedule = parse_budget(str(path), default_w=500.0)

    told = {t: schedule.at(t).power_w for t in (0.0, 29.9, 30.0, 59.9, 60.0, 90.0, 100.0, 101.5, 1e6)}
    assert list(told.values()) == [2000.0, 2000.0, 500.0, 500.0, 900.0, None, 700.0, 500.0, 500.0]
    assert schedule.in_force(3.0).until_s == 30.0
    assert schedule.in_force(40.0) == InForce(power_w=500.0, source="default", until_s=60.0)
    two = tmp_path / "two.csv"
    two.write_text("time_s,power_w\n0,2000\n60,900\n")
    assert parse_budget(str(two)) == parse_budget("0:2000,60:900")


@pytest.mark.parametrize(
    "rows", ["0,100,0\n", "5,100,4\n", "0,100,inf\n", "0,100,nan\n", "0,100\n", "0,100,x\n", "0,100,9,9\n", ""]
)
def test_a_bad_file_is_refused(rows: str, tmp_path: Path) -> None:
    path = tmp_path / "budget.csv"
    path.write_text(f"time_s,power_w,expires_s\n{rows}")
    with pytest.raises(ConfigError, match=r"budget '.*budget\.csv'"):
        parse_budget(str(path))


@pytest.mark.parametrize(
    "text",
    ["", "lots", "0:5:6:7", "30:1000,10:900", "0:-5", "nan", "0:inf", "nan:100", "inf:100", "0:100,nan:50", "-1", "0", "1kw", "0:1MW"],
)  # fmt: skip
def test_a_bad_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        parse_budget(text)


@given(st.text(alphabet="0123456789:,.kWnoeas -", max_size=30))
def test_any_text_is_a_budget_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert all(w is None or w > 0 for w in parse_budget(text).watts)


def test_a_default_is_watts_or_none() -> None:
    assert (parse_default("none", "-"), parse_default("800W", "-"), parse_default(800, "-")) == (None, 800.0, 800.0)
    with pytest.raises(ConfigError, match="budget default"):
        parse_default("nothing", "budget default")


def live(clock: Clock, said: list[str], schedule: BudgetSchedule = STEPS, least_w: float | None = 300.0) -> LiveBudget:
    budget = LiveBudget(schedule, now_s=clock.now_s, say=said.append, wall_s=lambda: 0.0)
    budget.least_w = least_w
    budget.at(0.0)
    return budget


def at(budget: LiveBudget, clock: Clock, elapsed_s: float) -> float | None:
    """A tick so long after the start."""
    clock.now = 100.0 + elapsed_s
    return budget.at(elapsed_s).power_w


def test_a_budget_that_was_put_wins_while_it_lives_then_schedule_and_default_return_and_each_is_said_once() -> None:
    clock, said = Clock(), list[str]()
    budget = live(clock, said)

    assert budget.put(1200.0, ttl_s=15.0, by="127.0.0.1:4711") is None
    assert [at(budget, clock, t) for t in (0.5, 10.0, 14.5)] == [1200.0] * 3  # the schedule's step at 10 s waits
    assert budget.in_force() == InForce(power_w=1200.0, source="put", until_s=15.0, by="127.0.0.1:4711")
    assert budget.remaining_s(budget.in_force()) == 0.5
    assert [at(budget, clock, t) for t in (15.0, 15.5, 20.0, 30.0)] == [900.0, 900.0, None, 1600.0]

    assert len(said) == 2
    for word in ("1200 W", "127.0.0.1:4711", "15 s", "1970", "before: 800 W (default)"):
        assert word in said[0]
    assert said[1] == "the budget of 1200 W that 127.0.0.1:4711 put has expired; now in force: 900 W (schedule)"


def test_the_newest_put_wins_and_withdrawing_returns_to_the_schedule() -> None:
    clock, said = Clock(), list[str]()
    budget = live(clock, said)

    budget.put(1200.0, ttl_s=60.0, by="a")
    budget.put(700.0, ttl_s=5.0, by="b")
    assert at(budget, clock, 1.0) == 700.0
    assert "before: 1200 W (put by a)" in said[-1]
    assert at(budget, clock, 6.0) == 800.0, "the older one does not come back"
    budget.put(1200.0, ttl_s=60.0, by="a")
    assert budget.withdraw(by="c")
    assert at(budget, clock, 7.0) == 800.0
    assert said[-1] == "the budget of 1200 W that a put was withdrawn by c; now in force: 800 W (default)"
    assert not budget.withdraw(by="c")


def test_what_boards_cannot_keep_is_refused_and_nothing_changes() -> None:
    clock, said = Clock(), list[str]()
    budget = live(clock, said)
    budget.put(1200.0, ttl_s=60.0, by="a")

    assert "300 W is the lowest budget that can be promised" in str(budget.put(299.0, ttl_s=60.0, by="b"))
    assert at(budget, clock, 1.0) == 1200.0
    assert len(said) == 1
    assert budget.put(300.0, ttl_s=60.0, by="b") is None
    assert "no engine" in str(live(clock, said, least_w=None).put(1200.0, ttl_s=60.0, by="a"))


def test_a_step_of_the_schedule_that_expires_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "budget.csv"
    path.write_text("time_s,power_w,expires_s\n0,2000,30\n")
    clock, said = Clock(), list[str]()
    budget = live(clock, said, parse_budget(str(path)))

    assert [at(budget, clock, t) for t in (1.0, 30.0, 30.5)] == [2000.0, None, None]
    assert said == ["the schedule's 2000 W (schedule) has expired; now in force: no budget"]


@given(
    st.lists(
        st.tuples(
            st.floats(0.01, 20), st.sampled_from(["put", "withdraw", "tick"]), st.floats(1, 2000), st.floats(0.1, 30)
        )
    )
)
def test_whatever_happens_what_holds_is_the_last_put_that_lives_or_the_schedule(
    events: list[tuple[float, str, float, float]],
) -> None:
    clock = Clock()
    budget, put = live(clock, []), tuple[float, float]((0.0, -1.0))
    for after_s, what, power_w, ttl_s in events:
        clock.now += after_s
        if what == "put" and budget.put(power_w, ttl_s=ttl_s, by="x") is None:
            assert power_w >= 300.0
            put = (power_w, clock.now + ttl_s)
        elif what == "withdraw":
            budget.withdraw(by="x")
            put = (0.0, -1.0)
        expected = put[0] if clock.now < put[1] else STEPS.at(clock.now - 100.0).power_w
        assert budget.in_force().power_w == expected
        assert what != "tick" or budget.at(clock.now - 100.0).power_w == expected
