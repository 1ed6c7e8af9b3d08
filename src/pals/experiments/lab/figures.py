"""What one run came to: figures of its measured span from the plant's own energy and the requests' own times, never from meters.

Definitions: docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pals.core.quantities import Checked, Slo
from pals.experiments.outcome import Answers, FloatArray
from pals.models.node_power import OFFSET_W, SLOPE, share_of_nodes

WINDOW_S = 1.0  # over which power is held against the budget
Quantiles = tuple[float, float, float]  # p50, p95, p99


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures(Checked):
    """Of the measured span; None: nothing to tell it from."""

    requests: int  # that arrived in it, those refused included
    answered: int
    refused: int
    good_requests: int  # answered inside every latency target
    output_tokens: int  # of all requests
    span_s: float
    gpu_energy_j: float
    node_energy_j: float
    ttft_s: Quantiles | None
    tpot_s: Quantiles | None
    ttft_missed: float | None  # share of requests; None: no target
    tpot_missed: float | None
    throughput_missed: float  # share of control periods below the target while requests waited
    over_budget_s: float
    over_budget_share: float  # of windows of `WINDOW_S`
    most_over_w: float  # the worst window's excess
    changes_per_min: float  # of the operating point asked for
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.span_s

    @property
    def tokens_per_j_gpu(self) -> float:
        """Output tokens per joule of all boards."""
        return self.output_tokens / self.gpu_energy_j

    @property
    def tokens_per_j_node(self) -> float:
        """The same by estimated node energy."""
        return self.output_tokens / self.node_energy_j

    @property
    def mean_power_w(self) -> float:
        """Of all boards."""
        return self.gpu_energy_j / self.span_s

    @property
    def goodput_per_s(self) -> float:
        """Requests per second that were answered inside every latency target."""
        return self.good_requests / self.span_s

    def to_row(self) -> dict[str, Any]:
        """Plain values for JSON, derived ones included."""
        derived = ("tokens_per_s", "tokens_per_j_gpu", "tokens_per_j_node", "mean_power_w", "goodput_per_s")
        plain = asdict(self) | {name: getattr(self, name) for name in derived}
        for name in ("ttft", "tpot"):
            values = plain.pop(f"{name}_s") or (None, None, None)
            plain |= {f"{name}_{q}_s": v for q, v in zip(("p50", "p95", "p99"), values, strict=True)}
        return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What was noted in the measured span, tick by tick; arrays of one shape (ticks,)."""

    time_s: Sequence[float]
    energy_j: Sequence[float]  # all boards, of the plant
    budget_w: Sequence[float | None]  # in force from this tick on
    output_tokens: int
    refused: int
    judged_periods: int  # in which throughput was held against its target
    missed_periods: int
    changes: int
    reasons: Mapping[str, int]

    @property
    def span_s(self) -> float:
        """From the first tick to the last."""
        return self.time_s[-1] - self.time_s[0]


def figures_of(answers: Answers, ledger: Ledger, slo: Slo, *, boards: int) -> Figures:
    """The figures of one run.

    Args:
        answers: of the requests that arrived in the span and were not refused.
        ledger: of the same span, at least two ticks.
        slo: latency targets; where there are two of a kind, the tighter one counts.
        boards: of the engine.
    """
    gpu_j = ledger.energy_j[-1] - ledger.energy_j[0]
    ttft, tpot, refused = answers.ttft_s, answers.tpot_s, ledger.refused
    late, slow = (_tighter(slo.ttft_p95_s, slo.ttft_p99_s), _tighter(slo.tpot_p95_s, slo.tpot_p99_s))
    waited = np.where(np.isnan(ttft), ledger.time_s[-1] - answers.sent_s, ttft)  # so far, where no token came
    over_w = windows_over_w(ledger)
    good = answers.answered
    if late is not None:
        good = good & (ttft <= late)
    if slow is not None:
        good = good & ~(tpot > slow)
    return Figures(
        requests=len(answers.sent_s) + refused,
        answered=int(answers.answered.sum()),
        refused=refused,
        good_requests=int(good.sum()),
        output_tokens=ledger.output_tokens,
        span_s=ledger.span_s,
        gpu_energy_j=gpu_j,
        node_energy_j=node_energy_j(gpu_j, ledger.span_s, boards),
        ttft_s=quantiles_of(ttft),
        tpot_s=quantiles_of(tpot),
        ttft_missed=missed_share(waited, late, also=refused),
        tpot_missed=missed_share(tpot, slow),
        throughput_missed=ledger.missed_periods / ledger.judged_periods if ledger.judged_periods else 0.0,
        over_budget_s=WINDOW_S * sum(w > 0 for w in over_w),
        over_budget_share=sum(w > 0 for w in over_w) / len(over_w) if over_w else 0.0,
        most_over_w=max([0.0, *over_w]),
        changes_per_min=60.0 * ledger.changes / ledger.span_s,
        reasons=dict(sorted(ledger.reasons.items())),
    )


def node_energy_j(gpu_energy_j: float, span_s: float, boards: int) -> float:
    """Energy of the share of nodes that these boards are, by the line of `pals.models.node_power`."""
    return SLOPE * gpu_energy_j + OFFSET_W * share_of_nodes(boards) * span_s


def missed_share(values_s: FloatArray, target_s: float | None, *, also: int = 0) -> float | None:
    """Share above the target; `also` so many further ones missed it. None: no target; unknown values do not count."""
    if target_s is None:
        return None
    known = values_s[~np.isnan(values_s)]
    count = len(known) + also
    return (int((known > target_s).sum()) + also) / count if count else 0.0


def windows_over_w(ledger: Ledger) -> list[float]:
    """Watts above the budget of each window of `WINDOW_S`, at or below 0 where it was kept; the highest budget in the window counts."""
    over, first = list[float](), 0
    for i, time_s in enumerate(ledger.time_s):
        if time_s - ledger.time_s[first] < WINDOW_S - 1e-9:
            continue
        allowed = ledger.budget_w[first:i]
        known = [w for w in allowed if w is not None]
        mean_w = (ledger.energy_j[i] - ledger.energy_j[first]) / (time_s - ledger.time_s[first])
        over.append(mean_w - max(known) if len(known) == len(allowed) else 0.0)
        first = i
    return over


def quantiles_of(values_s: FloatArray) -> Quantiles | None:
    """p50, p95 and p99 of the known ones; None: there is none."""
    known = values_s[~np.isnan(values_s)]
    if not len(known):
        return None
    p50, p95, p99 = (float(v) for v in np.percentile(known, [50, 95, 99]))
    return (p50, p95, p99)


def _tighter(*targets_s: float | None) -> float | None:
    return min((t for t in targets_s if t is not None), default=None)
