"""Real vLLM in this process on a virtual clock: its scheduler steps as fast as the host can, and no time passes but a step's.

A request arrives at its time, also in the middle of a step, and reaches the scheduler before the next one, as through
the API server's queue. Answers carry virtual times.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from pals.core.errors import ConfigError, EngineGoneError
from pals.core.load import Latencies, Mix
from pals.engines.admission import LET_IN, Admission, admission_of
from pals.engines.emulated_world import EmulatedWorld
from pals.engines.load_book import LoadBook, Order
from pals.engines.openai_client import RequestResult, RequestSpec, prompt
from pals.plant.boards import BoardBank
from pals.runtime.channel import find_engines
from pals.runtime.clock import VirtualClock
from pals.runtime.group import EngineGroup

STUCK_STEPS = 10_000  # steps without a token or a moment passing
Finished = Callable[[RequestResult], None]


def _nothing(at_s: float) -> None:
    """Nobody asks for the first token's time."""


class _Open(NamedTuple):
    """A request that is not yet answered, and who is told of it."""

    result: RequestResult
    finished: Finished
    on_first: Callable[[float], None]


class VirtualEngine:
    """One engine, all its ranks; a context manager that ends it."""

    def __init__(self, model: Path, options: Sequence[str], *, clock: VirtualClock, bank: BoardBank) -> None:
        """Start vLLM; `options` are those of `vllm serve` that concern the engine.

        Raises:
            ConfigError: an option vLLM refuses, or one that cannot work in one process.
        """
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor.abstract import Executor

        self.clock = clock
        args = engine_args(model, options, EmulatedWorld(clock=clock, bank=bank))
        try:
            config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)  # the server's defaults
            self._llm = LLMEngine(
                config, executor_class=Executor.get_class(config), log_stats=False, multiprocess_mode=False
            )
        except ValueError as e:
            raise ConfigError(f"vLLM does not start: {e}. Nothing was run") from e
        self._core = self._llm.engine_core.engine_core
        self._arrived: dict[str, tuple[_Open, list[int]]] = {}
        self._open: dict[str, _Open] = {}
        self._sent = 0
        self._admission: Admission | None = None  # no channel, no bound

    def channel(self, folder: Path) -> EngineGroup:
        """The agent's end of the plugin's channel in `folder`; its bound on the queue is kept from now on.

        Raises:
            EngineGoneError: the plugin was not loaded.
        """
        mine = [e for e in find_engines(folder, self.clock.now_s) if e.info.pid == os.getpid()]
        if not mine:
            raise EngineGoneError(
                f"vLLM runs without the PALS plugin: no channel appeared in {folder}. Is VLLM_PLUGINS set without 'pals', "
                "or PALS_PLUGIN=0? Nothing was run"
            )
        group = EngineGroup(mine[-1:])  # the newest: an earlier engine of this process may have died in its start
        self._admission = admission_of(group, self.clock.now_s)
        return group

    @property
    def context_tokens(self) -> int:
        """The longest request that the engine takes, prompt and output."""
        return int(self._llm.model_config.max_model_len)

    def send(
        self, spec: RequestSpec, ids: list[int], finished: Finished, *, on_first: Callable[[float], None] = _nothing
    ) -> str:
        """A request of exactly the tokens asked for arrives now; return its name.

        `finished` gets what came of it, `on_first` the time of its first token when it comes.
        """
        name, self._sent = f"virtual-{self._sent}", self._sent + 1
        self._arrived[name] = (_Open(RequestResult(spec=spec, sent_s=self.clock.now_s()), finished, on_first), ids)
        return name

    def abort(self, name: str) -> None:
        """Take a request back; nobody is told."""
        if self._arrived.pop(name, None) is None and self._open.pop(name, None) is not None:
            self._llm.abort_request([name])

    def serve(self, *, until_s: float, done: Callable[[], bool]) -> None:
        """Step until the clock has reached `until_s` or `done`, which is asked between steps; idle time is jumped over.

        Raises:
            EngineGoneError: the engine steps on the spot.
        """
        idle_steps = 0
        while self.clock.now_s() < until_s and not done():
            self._accept()
            if not self._busy():
                self.clock.wait_until(min(until_s, self.clock.next_due_s()))
                continue
            before_s = self.clock.now_s()
            outputs = self._llm.step()
            for output in outputs:
                self._note(output)
            idle_steps = 0 if outputs or self.clock.now_s() > before_s else idle_steps + 1
            if idle_steps > STUCK_STEPS:
                raise EngineGoneError(
                    f"vLLM schedules nothing although {len(self._open)} requests are unfinished; the run is stopped at "
                    f"{before_s:.3f} s of virtual time"
                )

    def close(self) -> None:
        """End the engine; its channel is removed."""
        self._llm.engine_core.shutdown()

    def __enter__(self) -> VirtualEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _busy(self) -> bool:
        """Whether a step would do something, be it to tell the scheduler what has finished."""
        return bool(
            self._llm.has_unfinished_requests()
            or self._core.scheduler.has_requests()
            or getattr(self._core, "batch_queue", None)
        )

    def _accept(self) -> None:
        """Hand vLLM what arrived since the last step; what it refuses is a result too."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMError
        from vllm.sampling_params import RequestOutputKind

        arrived, self._arrived = self._arrived, {}
        for name, (request, ids) in arrived.items():
            verdict = LET_IN if self._admission is None else self._admission.ask()
            if verdict.retry_after_s is not None:
                request.finished(_with(request.result, error="HTTP 503: as many requests wait as may"))
                continue
            params = SamplingParams(
                max_tokens=request.result.spec.output_tokens, ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            try:
                self._llm.add_request(name, {"prompt_token_ids": ids}, params)
            except (ValueError, VLLMError) as e:
                if self._admission is not None and verdict.ticket is not None:
                    self._admission.failed(verdict.ticket)
                request.finished(_with(request.result, error=f"{type(e).__name__}: {e}"))
                continue
            self._open[name] = request

    def _note(self, output: Any) -> None:
        """Take a request's new tokens."""
        request = self._open.get(output.request_id)
        if request is None:
            return  # taken back
        result = request.result
        new = sum(len(o.token_ids) for o in output.outputs)
        now_s = self.clock.now_s()
        if new:
            if result.first_token_s is None:
                request.on_first(now_s)
            first_s = now_s if result.first_token_s is None else result.first_token_s
            result = _with(result, first_s=first_s, last_s=now_s, tokens=result.output_tokens + new)
        self._open[output.request_id] = request._replace(result=result)
        if output.finished:
            del self._open[output.request_id]
            request.finished(result)


def _with(
    result: RequestResult,
    *,
    first_s: float | None = None,
    last_s: float | None = None,
    tokens: int = 0,
    error: str | None = None,
) -> RequestResult:
    return RequestResult(
        spec=result.spec, sent_s=result.sent_s, first_token_s=first_s, last_token_s=last_s, output_tokens=tokens,
        error=error,
    )  # fmt: skip


def engine_args(model: Path, options: Sequence[str], world: EmulatedWorld) -> Any:
    """vLLM's own engine arguments, parsed by its own parser, with the world in them.

    Raises:
        ConfigError: an option vLLM does not know or take; data-parallel ranks, which need a process each; another
            `additional_config`.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"neither PALS nor vLLM's engine takes this: {message}. Nothing was started")

    parser = EngineArgs.add_cli_args(Parser())
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", str(model), *options]))
    if args.data_parallel_size > 1:
        raise ConfigError(
            "data-parallel ranks need a process each and virtual time has one: leave --data-parallel-size out, or use "
            "`pals serve --emulate`. Nothing was started"
        )
    if args.additional_config:
        raise ConfigError("--additional-config carries the virtual world here; leave it out. Nothing was started")
    args.additional_config = world
    args.disable_log_stats = True
    return args


class VirtualTrace:
    """An open-loop load: every request of a trace at its time, whether or not earlier ones are answered."""

    def __init__(self, engine: VirtualEngine, specs: Sequence[RequestSpec], *, seed: int, start_s: float) -> None:
        rng = np.random.default_rng(seed)
        self._results: list[RequestResult | None] = [None] * len(specs)
        self._missing = len(specs)
        for i, spec in enumerate(specs):
            engine.clock.call_at(start_s + spec.at_s, self._arrival(engine, i, spec, prompt(spec, rng)))

    @property
    def answered(self) -> bool:
        """Whether every request has its result."""
        return self._missing == 0

    @property
    def results(self) -> list[RequestResult]:
        """What came of the requests so far, in the load's order."""
        return [r for r in self._results if r is not None]

    def _arrival(self, engine: VirtualEngine, i: int, spec: RequestSpec, ids: list[int]) -> Callable[[], None]:
        def finished(result: RequestResult) -> None:
            self._results[i] = result
            self._missing -= 1

        def arrive() -> None:
            engine.send(spec, ids, finished)

        return arrive


class VirtualClosedLoop:
    """Keeps requests of one mix in flight; a `LoadDriver` for sweeps."""

    def __init__(self, engine: VirtualEngine, *, seed: int) -> None:
        self._engine, self._book = engine, LoadBook(seed=seed, prompts=np.random.default_rng(seed))
        self._sent: dict[int, str] = {}  # the engine's name of each request in flight, by the order's number

    def set_load(self, mix: Mix, in_flight: int) -> None:
        """From now on send requests of `mix`, `in_flight` at a time; another mix's are aborted."""
        for number in self._book.set_load(mix, in_flight):
            self._engine.abort(self._sent.pop(number))
        self._fill()

    def latencies(self, since_s: float) -> Latencies:
        """Of requests sent under the present mix, since this virtual time."""
        return self._book.latencies(since_s)

    @property
    def last_error(self) -> str | None:
        """What vLLM said to the newest request that it refused; None: it took all."""
        return self._book.last_error

    def _fill(self) -> None:
        for _ in range(self._book.lacking(self._engine.clock.now_s())):
            self._send(self._book.order())

    def _send(self, order: Order) -> None:
        sent_s = self._engine.clock.now_s()

        def first(at_s: float) -> None:
            self._book.first_token(order, at_s=at_s, ttft_s=at_s - sent_s)

        def finished(result: RequestResult) -> None:
            del self._sent[order.number]
            self._book.ended(order, result, at_s=self._engine.clock.now_s())
            if result.error is not None:
                self._engine.clock.call_at(self._book.resume_s, self._fill)
            self._fill()

        self._sent[order.number] = self._engine.send(order.spec, order.ids, finished, on_first=first)
