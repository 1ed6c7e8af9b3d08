"""What a simulation leaves behind: requests and ticks as Parquet, and the columns of the figure read back from them.

Ticks are written as they come, so that memory does not grow with them and a run that is stopped has left what it saw.
Columns and units: docs/simulate.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals.experiments.outcome import Answers
from pals.plant.columnar import ParquetWriter, row_count, row_groups
from pals.plant.workload import Workload
from pals.runtime.tick import TickRecord
from pals.views.figure import RunSeries

FloatArray = NDArray[np.float64]
TICKS_A_GROUP = 7200  # an hour at the default period
FIGURE_POINTS = 1200
SMOOTHED_S = 2.0  # throughput of a figure is a mean over at least so long

REQUEST_COLUMNS = {
    "policy": "string",
    "request": "int64",
    "arrival_s": "float64",
    "prompt_tokens": "int32",
    "output_tokens": "int32",
    "prefix_tokens": "int32",
    "scheduled_s": "float64",
    "first_token_s": "float64",
    "last_token_s": "float64",
    "ttft_s": "float64",
    "tpot_s": "float64",
    "preemptions": "int32",
    "refused": "bool_",
}
TICK_COLUMNS = {
    "policy": "string",
    "time_s": "float64",
    "power_w": "float32",
    "energy_j": "float64",
    "budget_w": "float32",
    "limit_w": "float32",
    "sm_clock_mhz": "float32",
    "temperature_c": "float32",
    "active_limit": "int32",
    "running": "int32",
    "waiting": "int32",
    "output_tokens": "int64",
    "prefill_tokens": "int64",
    "preemptions": "int32",
    "kv_usage": "float32",
    "over_budget_s": "float32",
    "reason": "string",
    "notes": "string",
}
FIGURE_COLUMNS = (
    "time_s", "power_w", "limit_w", "budget_w", "active_limit", "running", "waiting", "output_tokens"
)  # fmt: skip


class TickFile:
    """The ticks of one policy, a row each; a group of them is written at a time."""

    def __init__(self, path: Path, policy: str) -> None:
        self._writer = ParquetWriter(path, TICK_COLUMNS, {})
        self._policy = policy
        self._rows = list[tuple[Any, ...]]()
        self._before = (0, 0, 0)
        self.noted = 0  # ticks with notes
        self.first_note: str | None = None

    def take(self, record: TickRecord) -> None:
        """Append one record."""
        if record.notes:
            self.noted += 1
            self.first_note = self.first_note or f"{record.sample.time_s:g} s: {record.notes[0]}"
        sample, engine = record.sample, record.sample.engine
        boards = sample.boards
        if engine is None or not boards:
            return
        counted = (engine.output_tokens, engine.prefill_tokens, engine.preemptions)
        output, prefill, preempted = (now - before for now, before in zip(counted, self._before, strict=True))
        self._before = counted
        self._rows.append((
            self._policy, sample.time_s, sample.power_w, sum(b.energy_j or 0.0 for b in boards), record.budget.power_w,
            sum(record.enforced_limits_w), sum(b.sm_clock_mhz for b in boards) / len(boards),
            max(b.temperature_c or 0.0 for b in boards), engine.active_limit, engine.running, engine.waiting, output, prefill,
            preempted, engine.kv_usage, record.over_budget_s, record.guarded.reason,
            "; ".join(record.notes) or None,
        ))  # fmt: skip
        if len(self._rows) == TICKS_A_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left and finish the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write(dict(zip(TICK_COLUMNS, map(list, zip(*self._rows, strict=True)), strict=True)))
            self._rows.clear()


def request_rows(policy: str, workload: Workload, answers: Answers, more: Mapping[str, Any]) -> dict[str, Any]:
    """The requests of one policy as columns; `more` holds those that only the simulator knows."""
    n = len(answers.sent_s)
    return {
        "policy": [policy] * n,
        "request": np.arange(n),
        "arrival_s": answers.sent_s,
        "prompt_tokens": workload.prompt_tokens[:n],
        "output_tokens": workload.output_tokens[:n],
        "prefix_tokens": workload.prefix_tokens[:n],
        "first_token_s": answers.first_token_s,
        "last_token_s": answers.last_token_s,
        "ttft_s": answers.ttft_s,
        "tpot_s": answers.tpot_s,
        **more,
    }


def merge_ticks(parts: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> None:
    """One file of all policies' ticks; the parts are removed."""
    writer = ParquetWriter(path, TICK_COLUMNS, metadata)
    for part in parts:
        writer.append_file(part)
    writer.close()
    for part in parts:
        part.unlink()


def series_of_ticks(path: Path, name: str, *, target_tokens_s: float | None) -> RunSeries:
    """A policy's ticks as about `FIGURE_POINTS` points of a figure: means of power and load, the last of what was set.

    Raises:
        ValueError: the file holds no tick.
    """
    width = max(1, row_count(path) // FIGURE_POINTS)
    bins = [_binned(group, width) for group in row_groups(path, FIGURE_COLUMNS)]
    if not bins:
        raise ValueError(f"{path} holds no tick")
    joined = {key: np.concatenate([b[key] for b in bins]) for key in bins[0]}
    return RunSeries(
        name=name,
        time_s=joined["time_s"].tolist(),
        power_w=_filled(joined["power_w"]).tolist(),
        limit_w=joined["limit_w"].tolist(),
        budget_w=[None if np.isnan(w) else float(w) for w in joined["budget_w"]],
        active_limit=joined["active_limit"].tolist(),
        running=joined["running"].tolist(),
        waiting=joined["waiting"].tolist(),
        tokens_per_s=_rates(joined["time_s"], joined["output_tokens"]).tolist(),
        target_tokens_per_s=target_tokens_s,
    )


def _binned(group: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Every `width` ticks of a group as one."""
    starts = np.arange(0, len(group["time_s"]), width)
    ends = np.append(starts[1:], len(group["time_s"])) - 1
    counts = ends - starts + 1
    means = {k: np.add.reduceat(group[k].astype(float), starts) / counts for k in ("power_w", "running", "waiting")}
    last = {k: group[k][ends] for k in ("time_s", "limit_w", "budget_w", "active_limit")}
    return {**means, **last, "output_tokens": np.add.reduceat(group["output_tokens"], starts)}


def _filled(values: FloatArray) -> FloatArray:
    """Unknown values by those beside them."""
    known = ~np.isnan(values)
    at = np.arange(len(values))
    return np.interp(at, at[known], values[known]) if known.any() else np.zeros(len(values))


def _rates(time_s: FloatArray, tokens: NDArray[np.int64]) -> FloatArray:
    """Tokens per second, a mean over at least `SMOOTHED_S` before each time."""
    total, since = np.cumsum(tokens), np.searchsorted(time_s, time_s - SMOOTHED_S, side="right") - 1
    since = np.minimum(np.maximum(since, 0), np.maximum(np.arange(len(time_s)) - 1, 0))
    span_s = time_s - time_s[since]
    return np.where(span_s > 0, (total - total[since]) / np.where(span_s > 0, span_s, 1.0), 0.0)
