"""What a run achieved: one `Outcome` from the client's results and the agent's journal; nothing is estimated by a model.

Energy is the difference of the boards' energy counters between the first request sent and the last token received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pals.core.quantities import Checked, Slo
from pals.engines.openai_client import RequestResult
from pals.plant.fleet import NODE_OFFSET_W, NODE_SLOPE
from pals.runtime.tick import TickRecord

FloatArray = NDArray[np.float64]
TokenArray = NDArray[np.int64] | NDArray[np.int32]


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
    refused: int = 0  # of the failed: answered 503, because too many waited


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What came of the requests of a run: arrays of shape (requests,), seconds; NaN where nothing came."""

    sent_s: FloatArray
    first_token_s: FloatArray
    last_token_s: FloatArray  # NaN: not answered
    output_tokens: TokenArray  # received
    asked_tokens: TokenArray
    refused: int = 0  # answered 503, because too many waited

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Which requests have their last token."""
        return ~np.isnan(self.last_token_s)

    @property
    def ttft_s(self) -> FloatArray:
        """Time to first token, shape (requests,)."""
        return self.first_token_s - self.sent_s

    @property
    def tpot_s(self) -> FloatArray:
        """Time per output token after the first, shape (requests,); NaN for fewer than two tokens."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1.0, np.nan)
        tpot_s: FloatArray = (self.last_token_s - self.first_token_s) / gaps
        return tpot_s

    @staticmethod
    def of(results: Sequence[RequestResult]) -> Answers:
        """Those of a client; a request that failed has no times."""

        def seconds(value: float | None, r: RequestResult) -> float:
            return float("nan") if value is None or r.error is not None or r.last_token_s is None else value

        return Answers(
            sent_s=np.array([r.sent_s for r in results]),
            first_token_s=np.array([seconds(r.first_token_s, r) for r in results]),
            last_token_s=np.array([seconds(r.last_token_s, r) for r in results]),
            output_tokens=np.array([r.output_tokens for r in results], np.int64),
            asked_tokens=np.array([r.spec.output_tokens for r in results], np.int64),
            refused=sum(r.refused for r in results),
        )


class PeriodTally:
    """Counts over a run's ticks as they come; keeps the first and the newest record of those from `start_s` on."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self.ticks = 0
        self.first: TickRecord | None = None
        self.last: TickRecord | None = None
        self.over_budget_s = 0.0
        self._judged = self._missed = 0

    def observe(self, record: TickRecord) -> None:
        """Take one record; those before the start do not count."""
        if record.sample.time_s < self._start_s:
            return
        if self.first is None:
            self.first = record
        self.last = record
        self.ticks += 1
        self.over_budget_s += record.over_budget_s
        if "throughput" in record.violations:
            self._judged += 1
            self._missed += record.violations["throughput"]

    @property
    def throughput_missed(self) -> float:
        """Share of periods below the target while requests waited."""
        return self._missed / self._judged if self._judged else 0.0

    def mean_power_w(self) -> float:
        """Of all boards between the first and the newest tick, from their counters.

        Raises:
            ValueError: fewer than two ticks, or a board's energy is unknown.
        """
        if self.first is None or self.last is None or self.ticks < 2:
            raise ValueError(f"the journal holds {self.ticks} ticks of the run; two are needed")
        return energy_between_j(self.first, self.last) / (self.last.sample.time_s - self.first.sample.time_s)


def outcome(name: str, results: Sequence[RequestResult], records: Sequence[TickRecord], slo: Slo) -> Outcome:
    """Put a run's figures together, from the client's results and the journal.

    Raises:
        ValueError: no request was answered, or the journal does not cover the run.
    """
    answers = Answers.of(results)
    if not answers.answered.any():
        errors = sorted({str(r.error) for r in results})
        raise ValueError(f"{name}: none of {len(results)} requests was answered ({'; '.join(errors[:3])})")
    end_s, tally = float(np.nanmax(answers.last_token_s)), PeriodTally(float(answers.sent_s.min()))
    for record in records:
        if record.sample.time_s <= end_s + 1.0:
            tally.observe(record)
    try:
        return outcome_of(name, answers, tally, slo, mean_power_w=tally.mean_power_w())
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e


def outcome_of(name: str, answers: Answers, tally: PeriodTally, slo: Slo, *, mean_power_w: float) -> Outcome:
    """The same from arrays and counts, and the mean power of all boards; at least one request was answered."""
    done = answers.answered
    span_s = float(np.nanmax(answers.last_token_s) - answers.sent_s.min())
    energy_j = mean_power_w * span_s
    tokens = int(answers.output_tokens[done].sum())
    ttft, tpot = answers.ttft_s[done], answers.tpot_s[done]
    ttft, tpot = ttft[~np.isnan(ttft)], tpot[~np.isnan(tpot)]
    return Outcome(
        name=name,
        requests=len(done),
        failed=int((~done).sum()),
        output_tokens=tokens,
        wrong_length=int((answers.output_tokens != answers.asked_tokens)[done].sum()),
        span_s=span_s,
        gpu_energy_j=energy_j,
        tokens_per_s=tokens / span_s,
        tokens_per_j_gpu=tokens / energy_j,
        tokens_per_j_node=tokens / (NODE_SLOPE * energy_j + NODE_OFFSET_W * span_s),
        mean_power_w=energy_j / span_s,
        ttft_s=_percentiles(ttft),
        tpot_s=_percentiles(tpot),
        ttft_missed=float(np.mean(ttft > slo.ttft_p95_s)) if slo.ttft_p95_s is not None and len(ttft) else 0.0,
        tpot_missed=float(np.mean(tpot > slo.tpot_p95_s)) if slo.tpot_p95_s is not None and len(tpot) else 0.0,
        throughput_missed=tally.throughput_missed,
        over_budget_s=tally.over_budget_s,
        refused=answers.refused,
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
