"""Sequences entering and leaving the decode batch of a simulated replica, in O(1): counters advance, sequences do not.

A decoding sequence that joined at step index k with c computed tokens has c + (j − k) at step j; so the batch's context
is a sum that grows by its size each step, blocks are due where (c − k + j) is a multiple of the block size, and its last
step is known when it joins. Plain scalar code: `plant/compiled.py` compiles these very lines.
"""

from __future__ import annotations

from pals.plant.replica_state import (
    DECODE,
    ENDING,
    FREE,
    GONE,
    HELD,
    NOBODY,
    PREEMPTED,
    PREFILL,
    WHEEL,
    Memory,
)


def free_blocks(m: Memory) -> int:
    """KV blocks nobody holds."""
    s = m.state[0]
    return s["queue_put"] - s["queue_taken"]  # type: ignore[no-any-return]


def blocks_of(m: Memory, tokens: int) -> int:
    """Blocks that hold so many tokens."""
    block = m.state[0]["block"]
    return (tokens + block - 1) // block  # type: ignore[no-any-return]


def take_slot(m: Memory, request: int) -> int:
    """A slot for a request that is admitted for the first time."""
    s = m.state[0]
    i = s["free_slot"]
    q = m.slots[i]
    s["free_slot"] = q["next"]
    q["kind"] = PREFILL
    q["request"] = request
    q["known"] = m.requests[request]["prompt"]
    q["computed"] = 0
    q["yielded"] = 0
    q["turn"] = 0
    q["kept_blocks"] = 0
    return i  # type: ignore[no-any-return]


def drop_slot(m: Memory, i: int) -> None:
    """The slot's request has its last token."""
    s = m.state[0]
    m.slots[i]["kind"] = FREE
    m.slots[i]["next"] = s["free_slot"]
    s["free_slot"] = i


def append_running(m: Memory, i: int) -> None:
    """The newest of the running."""
    s = m.state[0]
    q = m.slots[i]
    q["before"] = s["tail"]
    q["next"] = NOBODY
    if s["tail"] == NOBODY:
        s["head"] = i
    else:
        m.slots[s["tail"]]["next"] = i
    s["tail"] = i
    s["running"] += 1


def remove_running(m: Memory, i: int) -> None:
    """No longer among the running."""
    s = m.state[0]
    q = m.slots[i]
    if q["before"] == NOBODY:
        s["head"] = q["next"]
    else:
        m.slots[q["before"]]["next"] = q["next"]
    if q["next"] == NOBODY:
        s["tail"] = q["before"]
    else:
        m.slots[q["next"]]["before"] = q["before"]
    s["running"] -= 1


def expect_last(m: Memory, i: int, step: int) -> None:
    """Note in the calendar that the sequence gets its last token from this step."""
    q = m.slots[i]
    q["last"] = step
    at = step % WHEEL
    first = m.wheel[at]
    q["next_ending"] = first
    q["before_ending"] = NOBODY
    if first != NOBODY:
        m.slots[first]["before_ending"] = i
    m.wheel[at] = i


def forget_last(m: Memory, i: int) -> None:
    """Take the sequence out of the calendar."""
    q = m.slots[i]
    if q["before_ending"] == NOBODY:
        m.wheel[q["last"] % WHEEL] = q["next_ending"]
    else:
        m.slots[q["before_ending"]]["next_ending"] = q["next_ending"]
    if q["next_ending"] != NOBODY:
        m.slots[q["next_ending"]]["before_ending"] = q["before_ending"]


def join_batch(m: Memory, i: int, step: int) -> None:
    """The sequence decodes one token in every step from this one on."""
    s = m.state[0]
    q = m.slots[i]
    q["kind"] = DECODE
    q["joined"] = step
    s["decoding"] += 1
    s["context"] += q["computed"]
    m.phases[(q["computed"] - step) % s["block"]] += 1
    expect_last(m, i, step + m.requests[q["request"]]["output"] - q["yielded"] - 1)


def leave_batch(m: Memory, i: int, step: int) -> None:
    """The sequence decodes no more from this step on; its own counts are brought up to date."""
    s = m.state[0]
    q = m.slots[i]
    m.phases[(q["computed"] - q["joined"]) % s["block"]] -= 1
    q["yielded"] += step - q["joined"]
    q["computed"] += step - q["joined"]
    s["decoding"] -= 1
    s["context"] -= q["computed"]


def retire(m: Memory, step: int) -> None:
    """Who gets the last token from the step before is not planned again, though it still runs."""
    i = m.wheel[(step - 1) % WHEEL]
    while i != NOBODY:
        q = m.slots[i]
        if q["last"] == step - 1 and q["kind"] == DECODE:
            leave_batch(m, i, step)
            q["kind"] = ENDING
        i = q["next_ending"]


def hold(m: Memory, i: int, step: int) -> None:
    """No turn in this step: keeps its place and its blocks."""
    if m.slots[i]["kind"] == DECODE:
        leave_batch(m, i, step)
        forget_last(m, i)
        m.slots[i]["kind"] = HELD


def preempt(m: Memory, i: int, step: int) -> None:
    """Back to the front of the queue, blocks freed; a sequence whose last token is in flight just loses its place."""
    s = m.state[0]
    q = m.slots[i]
    if q["kind"] == DECODE:
        leave_batch(m, i, step)
        forget_last(m, i)
    if s["partial"] == i:
        s["partial"] = NOBODY
    request = m.requests[q["request"]]
    remove_running(m, i)
    s["preemptions"] += 1
    request["preemptions"] += 1
    s["queue_put"] += blocks_of(m, q["computed"])
    if q["kind"] == ENDING:
        q["kind"] = GONE
        return
    q["freed_at"] = s["queue_put"]
    q["kept_blocks"] = q["computed"] // s["block"]
    q["known"] = request["prompt"] + q["yielded"]
    q["computed"] = 0
    q["kind"] = PREEMPTED
    m.stack[s["stacked"]] = i
    s["stacked"] += 1
