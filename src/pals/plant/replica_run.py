"""The event loop of a simulated replica: steps, arrivals and 10 ms board ticks in one order of time.

Under async scheduling one step runs while the next waits planned behind it, so a request that arrives is planned when a
step ends and runs when the next one does. Plain scalar code, compiled by `plant/compiled.py`.
"""

from __future__ import annotations

import math

import numpy as np

from pals.core.admission import queue_full
from pals.plant.governor import TICK_S, Firmware
from pals.plant.llm_step import StepTables, step_cost
from pals.plant.replica_batch import blocks_of, drop_slot, forget_last, leave_batch, remove_running
from pals.plant.replica_plan import plan_step
from pals.plant.replica_power import booked_pace_mhz, pace_mhz, settled, sleep_through, tick_boards, wake
from pals.plant.replica_state import DECODE, GONE, NOBODY, WHEEL, Memory
from pals.plant.silicon import Silicon

STUCK_PLANS = 1000  # plans in a row that compute nothing although somebody waits


def advance(m: Memory, t: StepTables, k: Silicon, g: Firmware, until_s: float) -> bool:
    """Go on to `until_s`; False where the replica is stuck with work it cannot plan."""
    s = m.state[0]
    empty = 0
    while True:
        if s["due"] == 1:
            plan_ahead(m, t, g)
        if s["planned"] > s["completed"]:
            empty = 0
            run_until(m, t, k, g, until_s)
            if s["now_s"] >= s["end_s"]:
                finish_step(m)
                s["due"] = 1
                if s["planned"] > s["completed"]:
                    start_step(m, t, g)
        elif s["running"] + s["stacked"] + s["arrived"] - s["admitted"] > 0:
            empty += 1
            s["due"] = 1
            if empty > STUCK_PLANS:
                return False
        else:
            wait_until(m, k, g, next_arrival(m, until_s))
            s["due"] = 1
            accept(m)
            if s["arrived"] > s["admitted"]:
                continue
        if s["now_s"] >= until_s:
            return True


def next_arrival(m: Memory, until_s: float) -> float:
    """When the next request arrives, at most `until_s`."""
    s = m.state[0]
    if s["arrived"] == s["submitted"]:
        return until_s
    return min(until_s, max(s["now_s"], m.requests[s["arrived"]]["arrival_s"]))  # type: ignore[no-any-return]


def accept(m: Memory) -> None:
    """Put what has arrived by now into the queue, or refuse it."""
    s = m.state[0]
    while s["arrived"] < s["submitted"] and m.requests[s["arrived"]]["arrival_s"] <= s["now_s"]:
        if s["bounded"] == 1 and s["in_flight"] == 0 and full(m):
            refuse(m)
            continue
        if math.isnan(s["busy_since_s"]):
            s["busy_since_s"] = m.requests[s["arrived"]]["arrival_s"]
        s["arrived_prompt_tokens"] += m.requests[s["arrived"]]["prompt"]
        s["arrived"] += 1


def full(m: Memory) -> bool:
    """Whether the next request would wait beyond those that may."""
    s = m.state[0]
    waiting = s["stacked"] + s["arrived"] - s["admitted"] - s["gaps"]
    return queue_full(s["most_waiting"], waiting, s["limit"] - s["running"], s["left_waiting"] == 1)


def refuse(m: Memory) -> None:
    """The request that arrives now never runs; the queue passes over it."""
    s = m.state[0]
    m.requests[s["arrived"]]["refused"] = 1
    s["refused"] += 1
    if s["admitted"] == s["arrived"]:
        s["admitted"] += 1
    else:
        s["gaps"] += 1
    s["arrived"] += 1


def plan_ahead(m: Memory, t: StepTables, g: Firmware) -> None:
    """Plan steps until the pipeline is full or nothing can be planned; start one where the boards stand idle."""
    s = m.state[0]
    s["due"] = 0
    accept(m)
    while s["planned"] - s["completed"] < s["depth"]:
        idle = s["planned"] == s["completed"]
        step = s["planned"]
        if not plan_step(m):
            return
        if s["fixed_pace"] == 1:
            m.steps[step % len(m.steps)]["pace_mhz"] = booked_pace_mhz(m, idle)
        if idle:
            start_step(m, t, g)


def start_step(m: Memory, t: StepTables, g: Firmware) -> None:
    """The boards begin the oldest planned step."""
    s = m.state[0]
    wake(m, g)
    if s["fixed_pace"] == 1:
        s["pace_mhz"] = m.steps[s["completed"] % len(m.steps)]["pace_mhz"]
    else:
        s["pace_mhz"] = pace_mhz(m)
    price_step(m, t)
    s["end_s"] = s["now_s"] + s["cost_s"]


def price_step(m: Memory, t: StepTables) -> None:
    """Duration and load of the step that runs, at the present pace."""
    s = m.state[0]
    r = m.steps[s["completed"] % len(m.steps)]
    s["cost_s"], s["compute"], s["memory"], s["busy"] = step_cost(
        t, r["prefill_tokens"], r["prefill_sequences"], r["decode_sequences"], float(r["context_tokens"]),
        r["attention_pairs"], s["pace_mhz"],
    )  # fmt: skip


def run_until(m: Memory, t: StepTables, k: Silicon, g: Firmware, until_s: float) -> None:
    """The boards work on the step to its end or `until_s`; the rest of it takes longer where the clock falls."""
    s = m.state[0]
    while s["now_s"] < s["end_s"] and s["now_s"] < until_s:
        tick_s = (s["ticks"] + 1) * TICK_S
        stop_s = min(tick_s, s["end_s"], until_s)
        passed_s = stop_s - s["now_s"]
        s["sum_compute"] += s["compute"] * passed_s
        s["sum_memory"] += s["memory"] * passed_s
        s["sum_busy"] += s["busy"] * passed_s
        s["sum_running"] += passed_s
        s["now_s"] = stop_s
        if stop_s == tick_s:
            tick_boards(m, k, g)
            pace = pace_mhz(m)
            if pace != s["pace_mhz"] and stop_s < s["end_s"] and s["fixed_pace"] == 0:
                s["pace_mhz"] = pace
                before_s = s["cost_s"]
                price_step(m, t)
                s["end_s"] = stop_s + (s["end_s"] - stop_s) * s["cost_s"] / before_s


def wait_until(m: Memory, k: Silicon, g: Firmware, until_s: float) -> None:
    """Nothing runs until then."""
    s = m.state[0]
    while s["now_s"] < until_s:
        if settled(m, k, g):
            sleep_through(m, g, until_s)
        tick_s = (s["ticks"] + 1) * TICK_S
        s["now_s"] = min(tick_s, until_s)
        if s["now_s"] == tick_s:
            tick_boards(m, k, g)


def finish_step(m: Memory) -> None:
    """The oldest step is done: hand out its tokens, end what ends with it."""
    s = m.state[0]
    step, now_s = s["completed"], s["now_s"]
    r = m.steps[step % len(m.steps)]
    s["completed"] += 1
    m.steps_by_tokens[r["prefill_tokens"] + r["decode_sequences"]] += 1
    s["output_tokens"] += r["yields"]
    s["busy_until_s"] = s["last_update_s"] = now_s
    i = r["first"]
    while i != NOBODY:
        request = m.requests[m.slots[i]["request"]]
        if math.isnan(request["first_s"]):
            request["first_s"] = now_s
            m.ttft_counts[np.searchsorted(m.bounds_s, now_s - request["arrival_s"])] += 1
        i = m.slots[i]["next_first"]
    end_requests(m, step)
    s["last_step_s"] = now_s - s["busy_since_s"]
    s["busy_s"] += s["last_step_s"]
    s["busy_since_s"] = now_s
    if s["running"] + s["stacked"] + s["arrived"] - s["admitted"] == 0:
        s["busy_since_s"] = math.nan


def end_requests(m: Memory, step: int) -> None:
    """Free those whose last token came from this step."""
    i = m.wheel[step % WHEEL]
    while i != NOBODY:
        q = m.slots[i]
        following = q["next_ending"]
        if q["last"] == step:
            end_request(m, i)
        i = following


def end_request(m: Memory, i: int) -> None:
    """The request of this slot has all its tokens."""
    s = m.state[0]
    q = m.slots[i]
    request = m.requests[q["request"]]
    if q["kind"] == DECODE:  # without a step planned ahead nobody has retired it
        leave_batch(m, i, q["last"] + 1)
    request["last_s"] = s["now_s"]
    if request["output"] > 1:
        tpot_s = (request["last_s"] - request["first_s"]) / (request["output"] - 1)
        m.tpot_counts[np.searchsorted(m.bounds_s, tpot_s)] += 1
    if q["kind"] != GONE:
        s["queue_put"] += blocks_of(m, q["computed"])
        remove_running(m, i)
    s["finished"] += 1
    forget_last(m, i)
    drop_slot(m, i)
    release(m)


def release(m: Memory) -> None:
    """In a closed loop, let requests that have no time of arrival arrive now, up to so many in flight."""
    s = m.state[0]
    while s["released"] < s["submitted"] and s["released"] - s["finished"] - s["refused"] < s["in_flight"]:
        m.requests[s["released"]]["arrival_s"] = s["now_s"]
        s["released"] += 1
