"""What watts are worth: a policy is asked at most once a second, also through the watch around it, and its claim says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pals.control.guard import Guard
from pals.control.static import StaticPolicy
from pals.control.watched import Watched
from pals.core.protocols import WorthOfWatts
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample
from pals.runtime.agent import Session
from pals.runtime.group import EngineGroup
from pals.runtime.channel import EngineChannel, find_engines
from pals.runtime.tick import Rig
from tests.linear_model import LinearModel
from tests.worlds import Board, Clock, Engine, engine_info


@dataclass
class Valuing:
    """Wants the most; its state is the number of ticks, and each watt is worth as much."""

    asked_at: list[int] = field(default_factory=list)

    def initial(self) -> int:
        return 0

    def step(
        self, state: int, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float
    ) -> tuple[Decision, int]:
        return Decision(point=OperatingPoint(power_limit_w=400.0), reason="test"), state + 1

    def worth(self, state: int) -> tuple[tuple[float, float], ...]:
        self.asked_at.append(state)
        return ((200.0, 0.0), (800.0, 600.0 * state))

    def needed_w(self, state: int) -> float | None:
        return 300.0 + state
