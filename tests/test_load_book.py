"""What a closed loop sends and remembers: lengths of the mix's law, a count that never exceeds what is asked, growing pauses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.core.load import Mix
from pals.engines.load_book import LONGEST_PAUSE_S, LoadBook, Order
from pals.engines.openai_client import RequestResult

MIXES = st.builds(
    Mix,
    name=st.just("any"),
    prompt_tokens=st.floats(1.0, 4000.0),
    output_tokens=st.floats(1.0, 1000.0),
    spread=st.floats(0.0, 0.99),
    cached_tokens=st.floats(0.0, 200.0),
)
MIX = Mix(name="m", prompt_tokens=100, output_tokens=20)
OTHER = Mix(name="other", prompt_tokens=10, output_tokens=10)


def answer(order: Order, *, at_s: float, error: str | None = None) -> RequestResult:
    if error is not None:
        return RequestResult(spec=order.spec, sent_s=0.0, error=error)
    return RequestResult(
        spec=order.spec, sent_s=0.0, first_token_s=at_s - 1.0, last_token_s=at_s, output_tokens=order.spec.output_tokens
    )


@given(mix=MIXES, seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_lengths_follow_the_mixs_law_and_soon_have_its_means(mix: Mix, seed: int) -> None:
    book = LoadBook(seed=seed, prompts=np.random.default_rng(seed))
    book.set_load(mix, 1)
    orders = [book.order() for _ in range(64)]
    cached = round(mix.cached_tokens)

    for mean, lengths in (
        (mix.prompt_tokens, [o.spec.prompt_tokens - cached for o in orders]),
        (mix.output_tokens, [o.spec.output_tokens for o in orders]),
    ):
        low, high = max(1, round(mean * (1 - mix.spread))), round(mean * (1 + mix.spread))
        assert low <= min(lengths)
        assert max(lengths) <= high
        discrepancy = 0.06  # of 64 points of such a sequence; times the width it bounds the mean's error (Koksma), and they are rounded
        assert np.mean(lengths) == pytest.approx(mean, abs=discrepancy * 2.0 * mix.spread * mean + 0.5)
    assert all(len(o.ids) == o.spec.prompt_tokens for o in orders)
    assert all(o.ids[:cached] == orders[0].ids[:cached] for o in orders)


MOVES = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from(["nothing", "first", "end", "fail"]), st.booleans()), max_size=40
)


@given(MOVES)
@settings(deadline=None)
def test_it_never_sends_more_than_asked_for_and_keeps_what_runs(moves: list[tuple[int, str, bool]]) -> None:
    book, now_s = LoadBook(seed=1, prompts=np.random.default_rng(1)), 0.0
    waiting: dict[int, Order] = {}
    running: dict[int, Order] = {}
    mix = MIX
    for wanted, event, other in moves:
        now_s += 10.0  # longer than any pause
        changed, mix = other != (mix is OTHER), OTHER if other else MIX
        back = book.set_load(mix, wanted)
        if changed:
            assert sorted(back) == sorted([*waiting, *running])
            waiting.clear()
            running.clear()
        else:
            for number in back:
                del waiting[number]  # only what waits
        assert book.in_flight <= max(wanted, len(running))
        for _ in range(book.lacking(now_s)):
            order = book.order()
            waiting[order.number] = order
        assert len(waiting) + len(running) == book.in_flight
        if event == "first" and waiting:
            order = waiting.pop(min(waiting))
            running[order.number] = order
            book.first_token(order, at_s=now_s, ttft_s=1.0)
        elif event in ("end", "fail") and (waiting or running):
            order = running.popitem()[1] if running else waiting.popitem()[1]
            book.ended(order, answer(order, at_s=now_s, error="503" if event == "fail" else None), at_s=now_s)
        assert book.in_flight == len(waiting) + len(running)


def test_another_mix_takes_all_back_and_a_smaller_load_the_newest_that_wait() -> None:
    book = LoadBook(seed=1, prompts=np.random.default_rng(1))
    book.set_load(MIX, 5)
    orders = [book.order() for _ in range(5)]
    book.first_token(orders[0], at_s=1.0, ttft_s=0.1)

    assert book.set_load(MIX, 3) == [orders[4].number, orders[3].number]
    assert book.set_load(MIX, 0) == [orders[2].number, orders[1].number]
    assert book.in_flight == 1  # it runs, and ends by itself
    assert book.set_load(OTHER, 5) == [orders[0].number]
    book.ended(orders[4], answer(orders[4], at_s=2.0), at_s=2.0)  # it ended all the same: nobody counts it
    assert (book.in_flight, book.lacking(2.0), book.latencies(0.0).tpot_s) == (0, 5, ())


def test_one_seed_gives_one_load() -> None:
    def sent(seed: int) -> list[Order]:
        book = LoadBook(seed=seed, prompts=np.random.default_rng(seed))
        book.set_load(MIX, 1)
        return [book.order() for _ in range(5)]

    assert sent(1) == sent(1) != sent(2)


def test_failures_pause_longer_and_longer_until_one_succeeds() -> None:
    book, now_s, pauses_s = LoadBook(seed=1, prompts=np.random.default_rng(1)), 0.0, []
    book.set_load(MIX, 1)
    for _ in range(9):
        order = book.order()
        book.ended(order, answer(order, at_s=now_s, error="refused"), at_s=now_s)
        assert book.lacking(now_s) == 0
        pauses_s.append(book.resume_s - now_s)
        now_s = book.resume_s
        assert book.lacking(now_s) == 1

    assert pauses_s == sorted(pauses_s)
    assert pauses_s[-1] == pytest.approx(LONGEST_PAUSE_S)
    order = book.order()
    book.ended(order, answer(order, at_s=now_s), at_s=now_s)
    order = book.order()
    book.ended(order, answer(order, at_s=now_s, error="refused"), at_s=now_s)
    assert book.resume_s - now_s == pytest.approx(pauses_s[0])
    assert book.last_error == "refused"


def test_another_mix_ends_a_pause_and_forgets_what_was_seen() -> None:
    book = LoadBook(seed=1, prompts=np.random.default_rng(1))
    book.set_load(MIX, 2)
    first, second = book.order(), book.order()
    for order in (first, second):
        book.first_token(order, at_s=1.0, ttft_s=0.5)
    book.ended(first, answer(first, at_s=2.0, error="refused"), at_s=2.0)

    book.set_load(MIX, 3)
    assert book.lacking(2.0) == 0  # or a sweep that asks for the same load again and again would make a storm
    assert book.lacking(book.resume_s) == 2
    assert (book.latencies(0.0).ttft_s, book.latencies(0.0).failed) == ((0.5, 0.5), 1)
    assert (book.latencies(1.5).ttft_s, book.latencies(1.5).failed) == ((), 1)

    book.set_load(OTHER, 2)
    assert book.lacking(2.0) == 2
    book.ended(second, answer(second, at_s=3.0), at_s=3.0)  # sent under the old mix: no figure of the new one
    assert (book.latencies(0.0).tpot_s, book.latencies(0.0).failed) == ((), 0)
