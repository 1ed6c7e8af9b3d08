"""A worker that counts the routing of synthetic tokens in virtual time, read as the agent reads a real one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pals.core.experts import ExpertCounts, ExpertSummary
from pals.core.routing_reference import RoutingReference
from pals.runtime.expert_channel import ExpertChannel, ExpertFacts
from pals.runtime.routing_meter import RoutingMeter

PERIOD_S, STEPS = 0.5, 20  # of each period


class CountingWorker:
    """Publishes twice a second; `weights` of the experts, shape (layers, experts), may change at any time."""

    def __init__(
        self,
        folder: Path,
        weights: np.ndarray,
        *,
        top_k: int = 8,
        seed: int = 0,
        tokens: int = 800,
        engine_pid: int = 1,
        now_s: float = 0.0,
    ) -> None:
        self.weights, self.top_k, self.now_s, self.steps, self.tokens = weights, top_k, now_s, 0, 0
        self._each = tokens  # of a period
        self._rng = np.random.default_rng(seed)
        layers, experts = weights.shape
        self.names = tuple(f"layers.{i}.experts" for i in range(layers))
        self.sums = np.zeros((layers, experts + 1), np.int64)
        self._channel = ExpertChannel(folder, ExpertFacts(
            pid=os.getpid(), engine_pid=engine_pid, tensor_rank=0, data_rank=0, layers=self.names, experts=experts, top_k=top_k,
            ranks=1, placement="linear", bypassed=(),
        ))  # fmt: skip

    def work(self) -> None:
        """One period of steps."""
        self.now_s, self.steps, self.tokens = self.now_s + PERIOD_S, self.steps + STEPS, self.tokens + self._each
        for row, w in zip(self.sums, self.weights, strict=True):
            row[:-1] += self._rng.multinomial(self._each * self.top_k, w / w.sum())
            row[-1] += STEPS * 60
        self._channel.publish(time_s=self.now_s, steps=self.steps, tokens=self.tokens, sums=self.sums)

    @property
    def counts(self) -> ExpertCounts:
        """All so far."""
        return ExpertCounts.alike(
            time_s=self.now_s, span_s=self.now_s, steps=self.steps, tokens=self.tokens, layers=self.names, top_k=self.top_k,
            routed=self.sums[:, :-1].copy(), distinct=self.sums[:, -1].copy(),
        )  # fmt: skip


def gamma_weights(layers: int = 8, experts: int = 128, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.0, 1.0, (layers, experts)) + 1e-3


def half_the_popular_changed(weights: np.ndarray) -> np.ndarray:
    """Of the more popular half of the experts every second one changes places with an unpopular one."""
    changed = weights.copy()
    for row in changed:
        order = np.argsort(row)
        popular, unpopular = order[len(row) // 2 :][::2], order[: len(row) // 2][::2]
        row[popular], row[unpopular] = row[unpopular], row[popular]
    return changed


def profiled(worker: CountingWorker, seconds: float = 120.0) -> RoutingReference:
    """The reference that a sweep with this worker would store."""
    for _ in range(round(seconds / PERIOD_S)):
        worker.work()
    reference = RoutingReference.of(worker.counts)
    assert reference is not None
    return reference


def read_for(worker: CountingWorker, meter: RoutingMeter, seconds: float) -> ExpertSummary | None:
    """The last reading after so long."""
    told = None
    for _ in range(round(seconds / PERIOD_S)):
        worker.work()
        told = meter.read()
    return told
