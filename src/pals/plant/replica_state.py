"""All that a simulated replica remembers, as arrays of records: one layout for the compiled and the plain run."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.quantities import LATENCY_BOUNDS_S

Array = NDArray[Any]

PIPELINE = 2  # steps planned and not finished under async scheduling: one runs, one waits behind it
WHEEL = 4096  # slots of the calendar of last steps
RING = 100  # ticks of board power kept
DRAIN, TIME_SLICE, PREEMPT = 0, 1, 2  # as core.quantities.LOWERINGS
FREE, PREFILL, DECODE, HELD, ENDING, PREEMPTED, GONE = range(7)  # what a sequence's slot is
NOBODY = -1

STATE = np.dtype(
    [
        (name, "f8")
        for name in (
            "now_s", "end_s", "cost_s", "compute", "memory", "busy", "pace_mhz", "busy_until_s", "busy_since_s", "busy_s",
            "last_step_s", "last_update_s", "sum_compute", "sum_memory", "sum_busy", "sum_running",
        )
    ]
    + [
        (name, "i8")
        for name in (
            "build", "ticks", "depth", "due", "planned", "completed", "running", "stacked", "arrived", "admitted",
            "submitted", "decoding", "context", "queue_put", "queue_taken", "kv_blocks", "block", "batched", "launch",
            "limit", "lowering", "slicing", "turn", "partial", "head", "tail", "free_slot", "prefix_caching", "fixed_pace", "refresh",
            "arrived_prompt_tokens", "prefill_tokens", "decode_tokens", "output_tokens", "finished", "preemptions",
            "scheduled", "in_flight", "released", "bounded", "most_waiting", "left_waiting", "refused", "gaps",
        )
    ]
)  # fmt: skip
REQUEST = np.dtype(
    [(name, "f8") for name in ("arrival_s", "scheduled_s", "first_s", "last_s")]
    + [(name, "i4") for name in ("prompt", "output", "prefix", "preemptions", "refused")]
)
SLOT = np.dtype(
    [
        (name, "i8")
        for name in (
            "kind", "request", "next", "before", "next_ending", "before_ending", "next_first", "known", "computed",
            "joined", "yielded", "last", "turn", "freed_at", "kept_blocks",
        )
    ]
)  # fmt: skip
STEP = np.dtype(
    [
        (name, "i8")
        for name in ("prefill_tokens", "prefill_sequences", "decode_sequences", "context_tokens", "yields", "first")
    ]
    + [("attention_pairs", "f8"), ("pace_mhz", "f8")]
)
BOARD = np.dtype(
    [
        (name, "f8")
        for name in (
            "core_factor", "idle_factor", "counter_factor", "top_mhz", "floor_mhz", "clock_mhz", "filtered_w", "debt_j",
            "power_w", "temperature_c", "energy_j", "published_j", "limited", "limit_w", "lock_mhz", "acting_limit_w",
            "acting_lock_mhz", "acts_at_s", "external_w", "thermal", "ambient_c", "dip_until_s", "next_dip",
        )
    ]
)  # fmt: skip


class Memory(NamedTuple):
    """The arrays of one replica; `state` has one record, the others one for each of what their name says."""

    state: Array
    requests: Array
    slots: Array
    steps: Array  # planned and not finished, by step index
    stack: Array  # slots of preempted sequences, the next to resume on top
    wheel: Array  # first slot of those whose last step has this index, modulo WHEEL
    phases: Array  # decoding sequences by (computed tokens − step index) modulo the block size
    boards: Array
    dips: Array  # when current protection looks at each board, s, rising, shape (boards, …)
    ring: Array  # power of the last ticks, W, shape (boards, RING)
    ttft_counts: Array
    tpot_counts: Array
    bounds_s: Array
    steps_by_tokens: Array  # done since their routing was last looked at, by number of tokens


def new_memory(*, boards: int, block_size: int, max_num_seqs: int, max_tokens: int) -> Memory:
    """An empty replica at time 0."""
    slots = np.zeros(2 * max_num_seqs + 8, SLOT)
    slots["next"] = np.arange(1, len(slots) + 1)
    slots["next"][-1] = NOBODY
    state = np.zeros(1, STATE)
    for name in ("partial", "head", "tail"):
        state[name] = NOBODY
    state["busy_since_s"] = np.nan
    state["busy_until_s"] = -np.inf
    return Memory(
        state=state,
        requests=np.zeros(0, REQUEST),
        slots=slots,
        steps=np.zeros(4, STEP),
        stack=np.zeros(len(slots), np.int64),
        wheel=np.full(WHEEL, NOBODY, np.int64),
        phases=np.zeros(block_size, np.int64),
        boards=np.zeros(boards, BOARD),
        dips=np.zeros((boards, 0)),
        ring=np.zeros((boards, RING)),
        ttft_counts=np.zeros(len(LATENCY_BOUNDS_S) + 1, np.int64),
        tpot_counts=np.zeros(len(LATENCY_BOUNDS_S) + 1, np.int64),
        bounds_s=np.array(LATENCY_BOUNDS_S),
        steps_by_tokens=np.zeros(max_tokens + 1, np.int64),
    )
