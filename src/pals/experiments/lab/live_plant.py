"""Real vLLM on emulated boards as the lab sees a simulated replica: its closed loop, meter and answers work on either.

Adapters only: lengths come from the supply that a replica would be given, in its order, and energy is the boards' integral.
"""

from __future__ import annotations

import numpy as np

from pals.core.quantities import EngineSample
from pals.engines.openai_client import RequestResult, RequestSpec, token_ids
from pals.experiments.virtual_run import LiveNode
from pals.plant.replica import SentRequests
from pals.plant.workload import Workload

NOT_YET = float("nan")


class LivePlant:
    """What closed loop, meter and answers ask of `pals.plant.replica.Replica`, on a node that runs."""

    def __init__(self, live: LiveNode, *, seed: int) -> None:
        """`seed` draws the prompts' tokens, which decide no time."""
        self._live, self._prompts = live, np.random.default_rng(seed)
        self._supply: list[RequestSpec] = []  # the next one last
        self._wanted = self._in_flight = 0
        self._arrival_s, self._first_s, self._last_s = list[float](), list[float](), list[float]()
        self._asked = list[int]()

    @property
    def now_s(self) -> float:
        """Virtual time."""
        return self._live.clock.now_s()

    @property
    def sent_count(self) -> int:
        """Requests sent so far."""
        return len(self._asked)

    @property
    def unsent_count(self) -> int:
        """Requests of the supply that are still to be sent."""
        return len(self._supply)

    def keep_in_flight(self, n: int, supply: Workload | None = None) -> None:
        """As `Replica.keep_in_flight`."""
        if supply is not None:
            sizes = zip(supply.prompt_tokens.tolist(), supply.output_tokens.tolist(), strict=True)
            self._supply = [RequestSpec(at_s=0.0, prompt_tokens=p, output_tokens=o) for p, o in sizes][::-1]
        self._wanted = n
        self._fill()

    def counters(self) -> EngineSample:
        """What the scheduler counted so far."""
        return self._live.channel.read()

    def energy_j(self) -> float:
        """All boards, exact, whatever their meters say."""
        bank, now_s = self._live.bank, self.now_s
        return sum(bank.energy_integral_j(b.info.index, now_s) for b in self._live.nvml.boards)

    def sent(self, first: int = 0) -> SentRequests:
        """As `Replica.sent`."""
        return SentRequests(
            arrival_s=np.array(self._arrival_s[first:]), first_token_s=np.array(self._first_s[first:]),
            last_token_s=np.array(self._last_s[first:]), output_tokens=np.array(self._asked[first:], np.int32),
        )  # fmt: skip

    def _fill(self) -> None:
        while self._in_flight < self._wanted and self._supply:
            self._send(self._supply.pop())

    def _send(self, spec: RequestSpec) -> None:
        number = self.sent_count
        self._in_flight += 1
        self._asked.append(spec.output_tokens)
        self._arrival_s.append(self.now_s)
        self._first_s.append(NOT_YET)
        self._last_s.append(NOT_YET)

        def first(at_s: float) -> None:
            self._first_s[number] = at_s

        def finished(result: RequestResult) -> None:
            self._in_flight -= 1
            if result.error is None and result.last_token_s is not None:
                self._last_s[number] = result.last_token_s
            self._fill()

        self._live.engine.send(spec, token_ids(spec.prompt_tokens, self._prompts), finished, on_first=first)
