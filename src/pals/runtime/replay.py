"""Replay: feed a journal's samples to the same policy and compare every decision, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pals.control.guard import Guard
from pals.core.errors import ConfigError
from pals.core.protocols import AnyController, WatchesProfile
from pals.runtime.tick import TickRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """How many decisions agree, and a line for each that does not."""

    total: int
    same: int
    differences: tuple[str, ...]


def replay(policy: AnyController, guard: Guard, records: Iterable[TickRecord]) -> ReplayResult:
    """Step `policy` through the recorded samples and compare its decisions, the guard's, and what it learnt of its profile.

    Raises:
        ConfigError: a record's values cannot be computed with.
    """
    state, watch = policy.initial(), policy if isinstance(policy, WatchesProfile) else None
    total = same = 0
    differences: list[str] = []
    for record in records:
        try:
            decision, state = policy.step(state, record.sample, record.budget, record.slo, record.sample.time_s)
            guarded = guard.check(decision, record.budget)
        except (ValueError, ArithmeticError) as e:  # finite, but absurd
            raise ConfigError(
                f"tick {record.index}: its values cannot be computed with ({e}); the {total} decisions before it were "
                f"compared, {same} are identical"
            ) from e
        total += 1
        news = watch.tell(state) if watch is not None else None
        learnt = (news.bias, news.drift) if news is not None else ({}, {})
        if (decision, guarded, learnt) == (record.decision, record.guarded, (record.correction, record.drift)):
            same += 1
        elif learnt != (record.correction, record.drift):
            differences.append(f"tick {record.index}: recorded correction {record.correction}, now {learnt[0]}")
        else:
            differences.append(f"tick {record.index}: recorded {record.guarded}, now {guarded}")
    return ReplayResult(total=total, same=same, differences=tuple(differences))
