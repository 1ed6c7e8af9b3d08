"""The emulated device of one data-parallel rank: books steps on a time line and says which tokens come out of them.

A step starts when the device is free and ends when the plant says; the future of step n waits until its end. Ends are
chained, so late wake-ups of the host do not add up, and the host's own work hides behind the step as on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pals.engines.emulated_routing import EmulatedRouting
from pals.plant.boards import BoardBank
from pals.plant.llm_step import StepBatch, StepModel
from pals.plant.routing_schedule import RoutingSchedule
from pals.plant.specs import parse_boards

DEFAULT_BOARDS = "h100-sxm5-80gb"
MEDIAN_TOKENS, SPREAD = 180.0, 0.7  # log-normal output lengths where the client lets the model end


def open_bank() -> BoardBank:
    """The boards that PALS_EMU_BOARDS names now (a bank file), or one default board of this process alone."""
    return _bank_at(os.environ.get("PALS_EMU_BOARDS") or None)


@cache
def _bank_at(path: str | None) -> BoardBank:
    if path is not None:
        return BoardBank.open(Path(path))
    spec, count = parse_boards(DEFAULT_BOARDS)
    with tempfile.TemporaryDirectory(prefix="pals-emu-") as folder:  # what is mapped outlives its name
        return BoardBank.create(Path(folder) / "boards.bank", spec, count)


@dataclass(slots=True)
class _Request:
    """A request the device knows."""

    prompt_len: int
    known: int  # tokens known so far: prompt and sampled
    target: int | None  # ends with EOS as its n-th token; None: the client decides
    offset: int  # where in the canned text it starts
    logprobs: bool  # of the tokens sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class BookedStep:
    """A step on the time line."""

    start_s: float
    end_s: float
    req_ids: list[str]
    sampled: list[list[int]]
    logprobs: bool = False  # whether one of the requests asks for them


class EmulatedDevice:
    """See the module. `boards` are the indices of this rank's boards in the bank; `routing` None does not drift and counts nothing."""

    def __init__(
        self,
        model: StepModel,
        bank: BoardBank,
        boards: tuple[int, ...],
        *,
        routing: EmulatedRouting | None = None,
        canned: list[int],
        eos: int | None,
        environ: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bank, self._boards, self._clock = bank, boards, clock
        self._routing = routing or EmulatedRouting(model, RoutingSchedule())
        self._canned, self._eos = canned, eos
        self._requests: dict[str, _Request] = {}
        fixed = environ.get("PALS_EMU_STEP_S")
        self._fixed_s = float(fixed) if fixed else None
        self.trace = DeviceTrace(environ.get("PALS_EMU_TRACE"))
        self.free_at_s = 0.0

    def launch(self, output: Any) -> BookedStep:
        """Book one scheduler output; return when it ends and what it yields."""
        for rid in output.finished_req_ids:
            self._requests.pop(rid, None)
        req_ids, sampled, batch = self._read(output)
        start_s, end_s = self._book(batch) if batch.tokens else (self._clock(), self._clock())
        if batch.tokens:
            self.trace.add(start_s, end_s, batch, len(req_ids))
            self._routing.count(batch.tokens, self._clock())
        logprobs = any(self._requests[rid].logprobs for rid in req_ids)
        return BookedStep(start_s=start_s, end_s=end_s, req_ids=req_ids, sampled=sampled, logprobs=logprobs)

    def dummy_step(self) -> float:
        """Book what an idle rank of a data-parallel MoE runs along with; return its end."""
        return self._book(StepBatch(decode_sequences=1))[1]

    def _book(self, batch: StepBatch) -> tuple[float, float]:
        now_s = self._clock()
        start_s = max(now_s, self.free_at_s)
        if self._fixed_s is not None:
            self.free_at_s = start_s + self._fixed_s
            return start_s, self.free_at_s
        cost = self._routing.at(start_s).step(batch, self._bank.pace_mhz(self._boards, now_s))
        self.free_at_s = start_s + cost.seconds
        self._bank.book(self._boards, start_s, self.free_at_s, cost.load, now_s)
        return start_s, self.free_at_s

    def _read(self, output: Any) -> tuple[list[str], list[list[int]], StepBatch]:
        """Which requests yield a token, and what the step computes."""
        req_ids: list[str] = []
        sampled: list[list[int]] = []
        prefill = prompts = decode = context = 0
        pairs = 0.0
        computed = self._computed(output)
        for rid, scheduled in output.num_scheduled_tokens.items():
            request, done = self._requests[rid], computed[rid]
            yields = done + scheduled >= request.known
            if scheduled == 1 and done >= request.prompt_len:
                decode += 1
                context += done
            else:
                prefill += scheduled
                prompts += 1
                context += done
                pairs += scheduled * scheduled / 2 + float(scheduled) * done
            req_ids.append(rid)
            sampled.append([self._token(request)] if yields else [])
            if yields:
                request.known += 1
        batch = StepBatch(
            prefill_tokens=prefill,
            prefill_sequences=prompts,
            decode_sequences=decode,
            context_tokens=context,
            attention_pairs=pairs,
        )
        return req_ids, sampled, batch

    def _computed(self, output: Any) -> dict[str, int]:
        """Tokens already computed, by request; learns new and resumed requests on the way."""
        computed = {}
        for new in output.scheduled_new_reqs:
            tokens = getattr(new, "prefill_token_ids", None) or new.prompt_token_ids or []
            self._requests[new.req_id] = self._new(new, len(new.prompt_token_ids or tokens), len(tokens))
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, rid in enumerate(cached.req_ids):
            computed[rid] = cached.num_computed_tokens[i]
            if rid in cached.resumed_req_ids:
                request = self._requests[rid]
                request.known = request.prompt_len + cached.num_output_tokens[i]
        return computed

    def _new(self, new: Any, prompt_len: int, known: int) -> _Request:
        digest = hashlib.blake2b(new.req_id.encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(digest))
        sampling = new.sampling_params
        free = sampling is not None and not getattr(sampling, "ignore_eos", False) and self._eos is not None
        length = max(1, round(MEDIAN_TOKENS * float(np.exp(SPREAD * rng.standard_normal()))))
        least = int(getattr(sampling, "min_tokens", 0) or 0) + 1
        offset = int(rng.integers(0, len(self._canned)))
        return _Request(
            prompt_len=prompt_len,
            known=known,
            target=max(length, least) if free else None,
            offset=offset,
            logprobs=getattr(sampling, "logprobs", None) is not None,
        )

    def _token(self, request: _Request) -> int:
        nth = request.known - request.prompt_len + 1
        if request.target is not None and nth >= request.target and self._eos is not None:
            return self._eos
        return self._canned[(request.offset + nth) % len(self._canned)]


class DeviceTrace:
    """Steps as JSON lines where a path is given, and the share of time the device waited while it had work."""

    def __init__(self, path: str | None) -> None:
        self._file = open(path, "w") if path else None  # noqa: SIM115 - open for the life of the engine
        self._last_end_s: float | None = None

    def add(self, start_s: float, end_s: float, batch: StepBatch, requests: int) -> None:
        """Write one step of so many requests; `gap_s` is how long the device stood idle before it."""
        if self._file is None:
            return
        gap_s = max(0.0, start_s - self._last_end_s) if self._last_end_s is not None else 0.0
        self._last_end_s = end_s
        row = {
            "start_s": start_s,
            "end_s": end_s,
            "gap_s": gap_s,
            "decode": batch.decode_sequences,
            "prefill": batch.prefill_tokens,
            "requests": requests,
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
