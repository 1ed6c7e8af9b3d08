"""capd in any order of requests, expiries, crashes, other hands, lost boards and budgets: a quick run, and a long one."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.capd_machine import CapdMachine

STEPS = 1_000_000


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        CapdMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_boards_are_never_outside_found_leased_or_exit_policy() -> None:
    run(150, 50)


@pytest.mark.slow
def test_the_same_for_a_million_steps() -> None:
    before, n = CapdMachine.steps, 0
    while CapdMachine.steps - before < STEPS:
        seed(n)(CapdMachine)
        run(400, 60)
        n += 1
    print(f"{CapdMachine.steps - before} steps in {n} runs")
