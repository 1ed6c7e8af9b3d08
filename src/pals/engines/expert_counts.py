"""Counts, inside vLLM's workers, how many tokens chose each expert: one custom op a layer, one sum a step, nothing when off.

`install` wraps the worker's step and, once its device is there, the constructor of its MoE layers, whose routers then tell their choices
to a custom op that adds them to a preallocated row. A step begins by clearing the rows and marking the rows of real tokens, and ends by
adding to the totals; so warm-up, profiling and dummy batches, which pass outside a step, and the padding of CUDA graphs count nothing.
The totals are copied to the host without waiting, at most twice a second. Nothing here raises inside a step: it counts no more instead.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pals.runtime.channel import run_dir
from pals.runtime.expert_channel import ExpertChannel, ExpertFacts

log = logging.getLogger("vllm.pals")
Capture = Callable[[torch.Tensor], None]  # what a router calls with the experts that each token chose
PUBLISH_EVERY_S = 0.5
#: Where releases keep the class of their MoE layers.
_RUNNERS = (
    "vllm.model_executor.layers.fused_moe.runner.moe_runner",
    "vllm.model_executor.layers.fused_moe.layer",
)
_building: WorkerExperts | None = None  # whose model this process is building: constructors are given nothing else


def count_experts(row: torch.Tensor, real: torch.Tensor, chosen: torch.Tensor) -> None:
    """Add `chosen`, shape (tokens, top_k), to `row`; `real` is 1 for each choice of a real token and 0 for padding.

    `row` is a power of two long and longer than there are experts, so that an id that names none (-1: no expert, above: a shared one)
    falls behind them instead of out of bounds, which on a GPU would end the process.
    """
    index = chosen.reshape(-1).to(torch.int64) & (row.numel() - 1)
    if index.numel() <= real.numel():
        row.scatter_add_(0, index, real[: index.numel()])


def _traced(row: torch.Tensor, real: torch.Tensor, chosen: torch.Tensor) -> None:
    """What a compiler sees of it."""


# Not `torch.library.custom_op`, which adds 10 µs of Python to each call, as much as the rest of it.
_ops = torch.library.Library("pals", "FRAGMENT")
_ops.define("count_experts(Tensor(a!) row, Tensor real, Tensor chosen) -> ()")
_ops.impl("count_experts", count_experts, "CompositeExplicitAutograd")
torch.library.register_fake("pals::count_experts", _traced, lib=_ops)


class ExpertCounter:
    """The tensors of one worker; all memory is taken here."""

    def __init__(self, *, layers: int, experts: int, top_k: int, most_tokens: int, device: torch.device | str) -> None:
        self.experts, self.top_k, self.steps, self.tokens = experts, top_k, 0, 0
        self.now = torch.zeros((layers, 1 << experts.bit_length()), dtype=torch.int32, device=device)
        self.real = torch.zeros(most_tokens * top_k, dtype=torch.int32, device=device)
        #: A row a layer: tokens that chose each expert, and last the experts touched, summed over steps.
        self.sums = torch.zeros((layers, experts + 1), dtype=torch.int64, device=device)
        self._marked = 0

    @torch.inference_mode()
    def begin(self, tokens: int) -> None:
        """A step with `tokens` real tokens begins."""
        self.now.zero_()
        choices = min(tokens * self.top_k, self.real.numel())
        if choices > self._marked:
            self.real[self._marked : choices].fill_(1)
        elif choices < self._marked:
            self.real[choices : self._marked].zero_()
        self._marked = choices

    @torch.inference_mode()
    def end(self, tokens: int) -> None:
        """The step's forward pass is under way or done: whatever the device does next comes after it."""
        seen = self.now[:, : self.experts]
        self.sums[:, : self.experts] += seen
        self.sums[:, self.experts] += (seen > 0).sum(1)
        self.steps += 1
        self.tokens += tokens

    def capture(self, layer: int, local_rows: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Any], None]:
        """What layer `layer`'s router is to call with its choices."""
        row, real, top_k = self.now[layer], self.real, self.top_k

        def count(chosen: torch.Tensor) -> None:
            mine = local_rows(chosen)
            if mine is not None:  # some kernels append a column for each shared expert
                torch.ops.pals.count_experts(row, real, mine[:, :top_k])

        return count


def listen(router: Any, count: Capture) -> None:
    """Have `router` call `count` with each choice, beside whatever else captures now or later."""
    set_capture_fn = router.set_capture_fn

    def set_both(other: Capture | None) -> None:
        set_capture_fn(count if other is None else both(count, other))

    set_both(getattr(router, "capture_fn", None))
    router.set_capture_fn = set_both


def both(count: Capture, other: Capture) -> Capture:
    """One capture function that calls the two."""

    def capture(chosen: torch.Tensor) -> None:
        count(chosen)
        other(chosen)

    return capture


def whole(chosen: torch.Tensor) -> torch.Tensor:
    """Every row is this worker's."""
    return chosen


def rows_of_rank(chosen: torch.Tensor, tokens_of_ranks: list[int], rank: int) -> torch.Tensor | None:
    """This data-parallel rank's rows: all, or its part where all ranks' tokens were gathered before routing; None: neither."""
    if len(chosen) == sum(tokens_of_ranks):
        start = sum(tokens_of_ranks[:rank])
        return chosen[start : start + tokens_of_ranks[rank]]
    return chosen if len(chosen) == tokens_of_ranks[rank] else None


def rows_under_data_parallelism(rank: int) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """`rows_of_rank` with what vLLM's forward context says; asked on the host, so a captured graph keeps the answer of its size."""
    from vllm.forward_context import get_forward_context

    def mine(chosen: torch.Tensor) -> torch.Tensor | None:
        facts = get_forward_context().dp_metadata
        return chosen if facts is None else rows_of_rank(chosen, facts.num_tokens_across_dp_cpu.tolist(), rank)

    return mine


def why_not(parallel: Any, rank: int) -> str | None:
    """Why this worker does not count; None where it does."""
    if getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False):
        return "steps are cut in micro-batches, whose real tokens are not told"
    cut = getattr(parallel, "prefill_context_parallel_size", 1) > 1
    if cut or getattr(parallel, "use_sequence_parallel_moe", False):
        return "the tokens of a sequence are spread over ranks before routing"
    if rank % parallel.tensor_parallel_size and not parallel.enable_expert_parallel:
        return "rank 0 of its tensor-parallel group sees the same tokens"
    return None


class WorkerExperts:
    """What one worker counts and publishes."""

    def __init__(
        self, config: Any, rank: int, *, folder: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._parallel, self._rank, self._clock = config, config.parallel_config, rank, clock
        self._folder = folder or run_dir(os.environ)
        self.counter: ExpertCounter | None = None
        self.layers: list[Any] = []
        self._channel: ExpertChannel | None = None
        self._host: torch.Tensor | None = None
        self._copied: Any = None  # the event behind the copy that is under way
        self._pending: tuple[float, int, int] | None = None  # time, steps and tokens of that copy
        self._next_s = 0.0

    def adopt(self, runner: Any) -> None:
        """Count the layer that vLLM has just made; one that cannot be counted stays at zero and so is told as unknown."""
        facts = runner.moe_config
        experts = getattr(facts, "num_logical_experts", facts.num_experts)
        if self.counter is None:
            self.counter = ExpertCounter(
                layers=self._config.model_config.get_total_num_hidden_layers(),
                experts=experts,
                top_k=facts.experts_per_token,
                most_tokens=_most_tokens(self._config),
                device=self._config.device_config.device,
            )
        counter, row = self.counter, len(self.layers)
        if row == len(counter.now):
            return  # a draft model's, which runs outside the target's step
        self.layers.append(runner)
        if (experts, facts.experts_per_token) == (counter.experts, counter.top_k):
            several = self._parallel.data_parallel_size > 1
            rows = rows_under_data_parallelism(self._parallel.data_parallel_rank) if several else whole
            listen(runner.router, counter.capture(row, rows))

    def begin(self, tokens: int) -> None:
        """A step of the scheduler's begins in this worker."""
        if self.counter is not None:
            self.counter.begin(tokens)

    def end(self, tokens: int) -> None:
        """Its work is on the way; publish what the last copy brought, and start another where it is time."""
        if self.counter is None:
            return
        self.counter.end(tokens)
        now_s = self._clock()
        if self._pending is None and now_s >= self._next_s:
            self._copy(self.counter, now_s)
        if self._pending is not None and (self._copied is None or self._copied.query()):
            self._publish()

    def close(self) -> None:
        """Count no more: remove the file."""
        self.counter = None
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.close()
            self._channel = None

    def _copy(self, counter: ExpertCounter, now_s: float) -> None:
        """Start copying the sums to the host, behind the step in the device's queue."""
        self._next_s = now_s + PUBLISH_EVERY_S
        on_device = counter.sums[: len(self.layers)]
        if self._host is None:
            self._host = torch.empty_like(on_device, device="cpu", pin_memory=on_device.device.type == "cuda")
            self._channel = ExpertChannel(self._folder, self._facts(counter))
        self._host.copy_(on_device, non_blocking=True)
        if on_device.device.type != "cpu":
            self._copied = torch.Event(on_device.device)
            self._copied.record()
        self._pending = (now_s, counter.steps, counter.tokens)

    def _publish(self) -> None:
        assert self._channel is not None
        assert self._host is not None
        assert self._pending is not None
        time_s, steps, tokens = self._pending
        self._channel.publish(time_s=time_s, steps=steps, tokens=tokens, sums=self._host.numpy())
        self._pending = None

    def _facts(self, counter: ExpertCounter) -> ExpertFacts:
        first, parallel = self.layers[0], self._parallel
        ranks = getattr(getattr(first.moe_config, "moe_parallel_config", None), "ep_size", 1)
        balanced = getattr(parallel, "enable_eplb", False)
        in_scheduler = parallel.distributed_executor_backend == "uni"
        return ExpertFacts(
            pid=os.getpid(),
            engine_pid=os.getpid() if in_scheduler else os.getppid(),
            tensor_rank=self._rank % parallel.tensor_parallel_size,
            data_rank=parallel.data_parallel_rank,
            layers=tuple(runner.layer_name for runner in self.layers),
            experts=counter.experts,
            top_k=counter.top_k,
            ranks=ranks,
            placement=None if balanced else getattr(first, "expert_placement_strategy", "linear"),
            bypassed=tuple(runner.layer_name for runner in self.layers if getattr(runner, "is_monolithic", False)),
        )


def _most_tokens(config: Any) -> int:
    """Rows that a forward pass can have at most, padding and all data-parallel ranks included."""
    compiled = config.compilation_config
    sizes = [*(getattr(compiled, "cudagraph_capture_sizes", None) or [])]
    return int(max(config.scheduler_config.max_num_batched_tokens, *sizes, 1))


def wanted(environ: Any) -> bool:
    """Whether `PALS_EXPERTS` asks for counts."""
    given = environ.get("PALS_EXPERTS", "0")
    if given not in ("0", "1"):
        log.warning("PALS: PALS_EXPERTS is %r, neither 0 nor 1; experts are not counted", given)
    return bool(given == "1")


def install() -> None:
    """Wrap the worker's step and its layers' constructor; idempotent, and said where this vLLM offers no place for it."""
    try:
        from vllm.v1.worker.worker_base import WorkerWrapperBase as Wrapper

        steps = (Wrapper.init_device, Wrapper.execute_model, Wrapper.shutdown)
    except (ImportError, AttributeError) as e:
        log.warning("PALS: this vLLM has no worker seam (%s); experts are not counted", e)
        return
    if not getattr(Wrapper, "counted_by_pals", False):
        Wrapper.counted_by_pals = True
        Wrapper.init_device, Wrapper.execute_model, Wrapper.shutdown = _wrapped(*steps)


def _wrapped(init_device: Any, execute_model: Any, shutdown: Any) -> tuple[Any, Any, Any]:
    """The three methods of vLLM's worker with the counting around them."""

    def init_device_and_prepare(self: Any) -> Any:
        result = init_device(self)
        with _failing_quietly(self):
            prepare(self)
        return result

    def execute_model_and_count(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        experts = self.__dict__.get("_pals_experts")
        tokens = getattr(scheduler_output, "total_num_scheduled_tokens", 0)
        if experts is None or tokens == 0:
            return execute_model(self, scheduler_output, *args, **kwargs)
        with _failing_quietly(self):
            experts.begin(tokens)
        result = execute_model(self, scheduler_output, *args, **kwargs)
        with _failing_quietly(self):
            if "_pals_experts" in self.__dict__:
                experts.end(tokens)
        return result

    def close_and_shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        experts = self.__dict__.pop("_pals_experts", None)
        if experts is not None:
            experts.close()
        return shutdown(self, *args, **kwargs)

    return init_device_and_prepare, execute_model_and_count, close_and_shutdown


@contextlib.contextmanager
def _failing_quietly(worker: Any) -> Any:
    """What goes wrong inside is logged once, and this worker counts no more: vLLM serves on."""
    try:
        yield
    except Exception as e:  # noqa: BLE001 - an exception here would end the engine and every request in it
        log.error("PALS: counting experts failed (%s: %s); the engine serves on without", type(e).__name__, e)
        experts = worker.__dict__.pop("_pals_experts", None)
        if experts is not None:
            experts.close()


def prepare(worker: Any) -> None:
    """Before the model is built: have its MoE layers tell this worker's counter, where this worker is to count."""
    global _building
    _building = None  # of an engine that this process had before
    config, rank = worker.vllm_config, worker.worker.rank
    if reason := why_not(config.parallel_config, rank):
        log.info("PALS: worker %d counts no experts: %s", rank, reason)
        return
    if not _wrap_runner():
        log.warning("PALS: this vLLM has no MoE layer with a router to listen to; experts are not counted")
        return
    if isinstance(config.additional_config, dict):  # part of the compiled code's cache key: counting is other code
        config.additional_config["pals_expert_counts"] = 1
    _building = worker._pals_experts = WorkerExperts(config, rank)


def _wrap_runner() -> bool:
    """Wrap the constructor of vLLM's MoE layer, once."""
    for name in _RUNNERS:
        with contextlib.suppress(ImportError):
            runner = getattr(importlib.import_module(name), "MoERunner", None)
            if runner is None:
                continue
            if not getattr(runner, "counted_by_pals", False):
                runner.counted_by_pals = True
                runner.__init__ = _adopted(runner.__init__)
            return True
    return False


def _adopted(init: Any) -> Any:
    """A constructor of MoE layers after which the layer is counted."""

    def init_and_adopt(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if _building is not None:
            try:
                _building.adopt(self)
            except Exception as e:  # noqa: BLE001 - a layer that is not counted must not keep the model from loading
                name = getattr(self, "layer_name", "a layer")
                log.warning("PALS: %s is not counted (%s: %s)", name, type(e).__name__, e)

    return init_and_adopt
