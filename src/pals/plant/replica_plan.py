"""What the next step of a simulated replica computes: vLLM V1's rules, first come first served, on counters.

Running sequences first (one token each, then the rest of a prompt begun), newest preempted when blocks run out; then the
queue, while token budget, active-sequence limit and KV blocks last. Plain scalar code, compiled by `plant/compiled.py`.
"""

from __future__ import annotations

from pals.plant.replica_batch import (
    append_running,
    blocks_of,
    expect_last,
    free_blocks,
    hold,
    join_batch,
    preempt,
    retire,
    take_slot,
)
from pals.plant.replica_state import ENDING, HELD, NOBODY, PREEMPT, PREFILL, TIME_SLICE, Memory


def plan_step(m: Memory) -> bool:
    """Plan the next step; False where there is nothing to compute."""
    s = m.state[0]
    step = s["planned"]
    retire(m, step)
    get_under_limit(m, step)
    r = m.steps[step % len(m.steps)]
    r["prefill_tokens"] = r["prefill_sequences"] = r["context_tokens"] = r["yields"] = 0
    r["first"], r["attention_pairs"] = NOBODY, 0.0
    preempted = make_room(m, step)
    continue_prefill(m)
    if preempted == 0 and s["slicing"] == 0:
        admit(m)
    s["left_waiting"] = 1 if s["stacked"] > 0 or s["admitted"] < s["arrived"] else 0
    r["decode_sequences"] = s["decoding"]
    r["context_tokens"] += s["context"]
    r["yields"] += s["decoding"]
    if r["decode_sequences"] + r["prefill_tokens"] == 0:
        return False
    s["context"] += s["decoding"]
    s["planned"] += 1
    s["scheduled"] = r["decode_sequences"] + r["prefill_sequences"]
    s["prefill_tokens"] += r["prefill_tokens"]
    s["decode_tokens"] += r["decode_sequences"]
    decode_next(m, step)
    return True


def decode_next(m: Memory, step: int) -> None:
    """Prompts that this step completes decode from the next one on."""
    i = m.steps[step % len(m.steps)]["first"]
    while i != NOBODY:
        q = m.slots[i]
        if q["yielded"] == m.requests[q["request"]]["output"]:
            q["kind"] = ENDING
            expect_last(m, i, step)
        else:
            join_batch(m, i, step + 1)
        i = q["next_first"]


def get_under_limit(m: Memory, step: int) -> None:
    """Preempt or take turns, where that is how the active-sequence limit is obeyed; draining needs nothing here."""
    s = m.state[0]
    if s["lowering"] == PREEMPT:
        while s["running"] > s["limit"]:
            preempt(m, s["tail"], step)
    if s["lowering"] == TIME_SLICE and s["running"] > s["limit"]:
        take_turns(m, step)
    elif s["slicing"] == 1:
        release_all(m, step)


def release_all(m: Memory, step: int) -> None:
    """Everybody runs again; turns are forgotten."""
    s = m.state[0]
    s["slicing"] = 0
    i = s["head"]
    while i != NOBODY:
        m.slots[i]["turn"] = 0
        if m.slots[i]["kind"] == HELD:
            join_batch(m, i, step)
        i = m.slots[i]["next"]


def take_turns(m: Memory, step: int) -> None:
    """Only `limit` of the running are planned: those whose last turn is longest ago, the older first."""
    s = m.state[0]
    s["slicing"] = 1
    s["turn"] += 1
    newest, ties = oldest_turns(m)
    i = s["head"]
    while i != NOBODY:
        q = m.slots[i]
        following = q["next"]
        if q["turn"] < newest or (q["turn"] == newest and ties > 0):
            if q["turn"] == newest:
                ties -= 1
            q["turn"] = s["turn"]
            if q["kind"] == HELD:
                join_batch(m, i, step)
        else:
            hold(m, i, step)
        i = following


def oldest_turns(m: Memory) -> tuple[int, int]:
    """The latest last turn that still gets one now, and how many of those that had it then do."""
    s = m.state[0]
    left, newest = s["limit"], -1
    while True:
        turn, count = s["turn"], 0
        i = s["head"]
        while i != NOBODY:
            last = m.slots[i]["turn"]
            if newest < last < turn:
                turn, count = last, 1
            elif last == turn:
                count += 1
            i = m.slots[i]["next"]
        newest = turn
        if count >= left:
            return newest, left
        left -= count


def has_turn(m: Memory, i: int) -> bool:
    """Whether the sequence may be planned in this step."""
    s = m.state[0]
    return s["slicing"] == 0 or m.slots[i]["turn"] == s["turn"]  # type: ignore[no-any-return]


def chunk_of(m: Memory) -> int:
    """Tokens of the begun prompt that this step computes."""
    s = m.state[0]
    i = s["partial"]
    if i == NOBODY or not has_turn(m, i):
        return 0
    return min(m.slots[i]["known"] - m.slots[i]["computed"], s["batched"] - s["decoding"])  # type: ignore[no-any-return]


def make_room(m: Memory, step: int) -> int:
    """Take the blocks the running need in this step, preempting the newest while there are too few; return how many."""
    s = m.state[0]
    preempted = 0
    while True:
        needed = m.phases[-step % s["block"]]
        chunk = chunk_of(m)
        if chunk > 0:
            done = m.slots[s["partial"]]["computed"]
            needed += blocks_of(m, done + chunk) - blocks_of(m, done)
        if needed <= free_blocks(m):
            s["queue_taken"] += needed
            return preempted
        i = s["tail"]
        while not has_turn(m, i):
            i = m.slots[i]["before"]
        preempt(m, i, step)
        preempted += 1


def continue_prefill(m: Memory) -> None:
    """The next chunk of the begun prompt; its blocks are taken already."""
    s = m.state[0]
    i, chunk = s["partial"], chunk_of(m)
    if chunk > 0:
        s["partial"] = NOBODY
        compute_prefill(m, i, chunk)


def compute_prefill(m: Memory, i: int, chunk: int) -> None:
    """Add a chunk of a prompt to the step."""
    s = m.state[0]
    q, r = m.slots[i], m.steps[s["planned"] % len(m.steps)]
    done = q["computed"]
    r["prefill_tokens"] += chunk
    r["prefill_sequences"] += 1
    r["context_tokens"] += done
    r["attention_pairs"] += 0.5 * chunk * chunk + float(chunk) * done
    q["computed"] = done + chunk
    if q["computed"] < q["known"]:
        s["partial"] = i
        return
    q["yielded"] += 1
    q["next_first"] = r["first"]
    r["first"] = i
    r["yields"] += 1


def admit(m: Memory) -> None:
    """Let the queue in, in order, while budget, limit and blocks last."""
    s = m.state[0]
    r = m.steps[s["planned"] % len(m.steps)]
    budget = s["batched"] - s["decoding"] - r["prefill_tokens"]
    while budget > 0 and s["running"] < s["limit"] and (s["stacked"] > 0 or s["admitted"] < s["arrived"]):
        resumed = s["stacked"] > 0
        i = m.stack[s["stacked"] - 1] if resumed else NOBODY
        request = m.slots[i]["request"] if resumed else s["admitted"]
        known = m.slots[i]["known"] if resumed else m.requests[request]["prompt"]
        if blocks_of(m, known) > free_blocks(m):
            return
        cached = cached_tokens(m, i, request, known)
        if resumed:
            s["stacked"] -= 1
        else:
            pass_over_refused(m)
            i = take_slot(m, request)
            m.requests[request]["scheduled_s"] = s["now_s"]
        chunk = min(known - cached, budget)
        budget -= chunk
        m.slots[i]["kind"] = PREFILL
        m.slots[i]["computed"] = cached
        s["queue_taken"] += blocks_of(m, cached + chunk)
        append_running(m, i)
        compute_prefill(m, i, chunk)


def pass_over_refused(m: Memory) -> None:
    """The first of the queue leaves it, and with it the refused behind it: the first is never one of these."""
    s = m.state[0]
    s["admitted"] += 1
    while s["gaps"] > 0 and m.requests[s["admitted"]]["refused"] == 1:
        s["admitted"] += 1
        s["gaps"] -= 1


def cached_tokens(m: Memory, i: int, request: int, known: int) -> int:
    """Leading tokens found in the prefix cache, whole blocks, never all of them.

    A preempted sequence finds its own blocks as far as they were not handed out since: freed blocks queue up, the first
    of a sequence last, and are handed out from the front.
    """
    s = m.state[0]
    if s["prefix_caching"] == 0:
        return 0
    block = s["block"]
    cached = m.requests[request]["prefix"] // block
    if i != NOBODY:
        own = min(m.slots[i]["kept_blocks"], m.slots[i]["freed_at"] - s["queue_taken"])
        cached = max(cached, own)
    return min(cached, (known - 1) // block) * block  # type: ignore[no-any-return]
