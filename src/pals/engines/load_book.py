"""What a closed loop sends next, and what came of it; the live and the virtual loop keep one each. Pure: times are arguments.

Lengths follow the mix's uniform law evenly (the low-discrepancy sequence R2 from a random start), so that a few requests
already have its means. Prompts are random, behind a common beginning where the mix says that a prefix cache holds one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pals.core.load import Latencies, Mix
from pals.engines.openai_client import RequestResult, RequestSpec, token_ids

STRIDES = (0.7548776662466927, 0.5698402909980532)  # 1/g and 1/g², where g³ = g + 1
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0


class Order(NamedTuple):
    """One request to send: its sizes and its tokens."""

    number: int
    spec: RequestSpec
    ids: list[int]


class LoadBook:
    """Keeps count of the requests in flight and of what they saw."""

    def __init__(self, *, seed: int, prompts: np.random.Generator) -> None:
        """`seed` is of the lengths; `prompts` draws the tokens."""
        self._start, self._prompts = tuple(np.random.default_rng(seed).random(2)), prompts
        self._drawn = self._wanted = 0
        self._open: dict[int, bool] = {}  # number, and whether it still waits for its first token; oldest first
        self._mix: Mix | None = None
        self._cached: list[int] = []
        self._in_a_row = 0
        self._forget()
        self.resume_s = float("-inf")  # nothing is sent before: failures make it wait
        self.last_error: str | None = None  # of the newest request that failed

    @property
    def in_flight(self) -> int:
        """Requests sent and not ended."""
        return len(self._open)

    def set_load(self, mix: Mix, in_flight: int) -> list[int]:
        """From now on requests of `mix`, `in_flight` at a time; another mix forgets the old one's figures and ends a pause.

        Returns:
            Numbers of requests to take back: all of another mix, which would be measured in the new one's place, and of
            those above `in_flight` the newest that wait for their first token; the others end by themselves.
        """
        self._wanted, back = in_flight, list[int]()
        if mix != self._mix:
            back, self._mix = list(self._open), mix
            self._cached = token_ids(round(mix.cached_tokens), self._prompts)
            self._in_a_row, self.resume_s = 0, float("-inf")
            self._forget()
        else:
            newest_first = [n for n in reversed(self._open) if self._open[n]]
            back = newest_first[: max(0, self.in_flight - in_flight)]
        for n in back:
            del self._open[n]
        return back

    def lacking(self, now_s: float) -> int:
        """How many requests are to be sent now."""
        return 0 if now_s < self.resume_s else max(0, self._wanted - self.in_flight)

    def order(self) -> Order:
        """The next request; it is in flight from now on.

        Raises:
            ValueError: no load was set.
        """
        if self._mix is None:
            raise ValueError("no load is set, so there is nothing to send")
        shares = [(s + self._drawn * stride) % 1.0 for s, stride in zip(self._start, STRIDES, strict=True)]
        self._drawn += 1
        means = (self._mix.prompt_tokens, self._mix.output_tokens)
        fresh, output = (
            max(1, round(mean * (1.0 + self._mix.spread * (2.0 * share - 1.0))))
            for mean, share in zip(means, shares, strict=True)
        )
        spec = RequestSpec(at_s=0.0, prompt_tokens=len(self._cached) + fresh, output_tokens=output)
        self._open[self._drawn] = True
        return Order(self._drawn, spec, self._cached + token_ids(fresh, self._prompts))

    def first_token(self, order: Order, *, at_s: float, ttft_s: float) -> None:
        """Its first token came."""
        if order.number in self._open:
            self._open[order.number] = False
            self._ttfts.append((at_s, ttft_s))

    def ended(self, order: Order, result: RequestResult, *, at_s: float) -> None:
        """It is no longer in flight. Failures, one after the other, pause the sending for longer and longer."""
        if self._open.pop(order.number, None) is None:
            return  # taken back before
        if result.error is not None:
            self.last_error = result.error
            self._failures.append(at_s)
            self._in_a_row += 1
            self.resume_s = at_s + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._in_a_row - 1, 10))
            return
        self._in_a_row = 0
        if result.tpot_s is not None:
            self._tpots.append((at_s, result.tpot_s))

    def latencies(self, since_s: float) -> Latencies:
        """What requests sent under the present mix saw since then."""
        return Latencies(
            ttft_s=tuple(v for at_s, v in self._ttfts if at_s >= since_s),
            tpot_s=tuple(v for at_s, v in self._tpots if at_s >= since_s),
            failed=sum(at_s >= since_s for at_s in self._failures),
        )

    def _forget(self) -> None:
        self._ttfts: list[tuple[float, float]] = []
        self._tpots: list[tuple[float, float]] = []
        self._failures: list[float] = []
