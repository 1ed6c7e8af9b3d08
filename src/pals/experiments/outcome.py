"""What a run achieved: one `Outcome` from the client's results and the agent's journal; nothing is estimated by a model.

Energy is the difference of the boards' energy counters between the first request sent and the last token received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pals.core.quantities import Checked, Slo
from pals.engines.openai_client import RequestResult
from pals.runtime.tick import TickRecord

NODE_SLOPE, NODE_OFFSET_W = 1.05, 345.0  # node power on the paper's 4×A100 nodes, arXiv:2605.21427


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Checked):
    """The figures of one run; latencies in seconds, of answered requests."""

    name: str
    requests: int
    failed: int
    output_tokens: int
    wrong_length: int  # answered with another number of tokens than asked for
    span_s: float
    gpu_energy_j: float
    tokens_per_s: float
    tokens_per_j_gpu: float
    tokens_per_j_node: float
    mean_power_w: float
    ttft_s: tuple[float, float, float]  # p50, p95, p99
    tpot_s: tuple[float, float, float]
    ttft_missed: float  # share of requests above the target
    tpot_missed: float
    throughput_missed: float  # share of control periods below the target while requests waited
    over_budget_s: float


def outcome(name: str, results: Sequence[RequestResult], records: Sequence[TickRecord], slo: Slo) -> Outcome:
    """Put a run's figures together.

    Raises:
        ValueError: no request was answered, or the journal does not cover the run.
    """
    answered = [r for r in results if r.error is None and r.last_token_s is not None]
    if not answered:
        errors = sorted({str(r.error) for r in results})
        raise ValueError(f"{name}: none of {len(results)} requests was answered ({'; '.join(errors[:3])})")
    start_s = min(r.sent_s for r in results)
    end_s = max(r.last_token_s or 0.0 for r in answered)
    during = [r for r in records if start_s <= r.sample.time_s <= end_s + 1.0]
    if len(during) < 2:
        raise ValueError(f"{name}: the journal holds {len(during)} ticks of the run; two are needed")
    span_s = end_s - start_s
    covered_s = during[-1].sample.time_s - during[0].sample.time_s
    energy_j = energy_between_j(during[0], during[-1]) * span_s / covered_s
    tokens = sum(r.output_tokens for r in answered)
    ttft = np.array([r.ttft_s for r in answered if r.ttft_s is not None])
    tpot = np.array([r.tpot_s for r in answered if r.tpot_s is not None])
    periods = [r.violations["throughput"] for r in during if "throughput" in r.violations]
    return Outcome(
        name=name,
        requests=len(results),
        failed=len(results) - len(answered),
        output_tokens=tokens,
        wrong_length=sum(r.output_tokens != r.spec.output_tokens for r in answered),
        span_s=span_s,
        gpu_energy_j=energy_j,
        tokens_per_s=tokens / span_s,
        tokens_per_j_gpu=tokens / energy_j,
        tokens_per_j_node=tokens / (NODE_SLOPE * energy_j + NODE_OFFSET_W * span_s),
        mean_power_w=energy_j / span_s,
        ttft_s=_percentiles(ttft),
        tpot_s=_percentiles(tpot),
        ttft_missed=float(np.mean(ttft > slo.ttft_p95_s)) if slo.ttft_p95_s is not None else 0.0,
        tpot_missed=float(np.mean(tpot > slo.tpot_p95_s)) if slo.tpot_p95_s is not None and len(tpot) else 0.0,
        throughput_missed=sum(periods) / len(periods) if periods else 0.0,
        over_budget_s=sum(r.over_budget_s for r in during),
    )


def energy_between_j(first: TickRecord, last: TickRecord) -> float:
    """Energy of all boards between two ticks, from their counters, J.

    Raises:
        ValueError: a board was not read at one of them, or has no counter.
    """
    total_j = 0.0
    if first.sample.absent or last.sample.absent:
        raise ValueError("a board could not be read at one end of the measured span: its energy is unknown")
    for a, b in zip(first.sample.boards, last.sample.boards, strict=True):
        if a.energy_j is None or b.energy_j is None:
            raise ValueError("a board has no energy counter: the energy of the measured span is unknown")
        total_j += b.energy_j - a.energy_j
    return total_j


def _percentiles(values: np.ndarray) -> tuple[float, float, float]:
    if len(values) == 0:
        return (0.0, 0.0, 0.0)
    p50, p95, p99 = (float(v) for v in np.percentile(values, [50, 95, 99]))
    return (p50, p95, p99)
