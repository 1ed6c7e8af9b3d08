"""Counts, inside vLLM's workers, how many tokens chose each expert: wraps the worker's step and its MoE layers; nothing when off.

`install` wraps the worker's step and, once its device is there, the constructor of its MoE layers, whose routers then tell their choices
to an `ExpertCounter`. The totals are copied to the host without waiting, at most twice a second. Nothing here raises inside a step: it
counts no more instead.
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

from pals.engines.expert_counter import ExpertCounter, listen, rows_under_data_parallelism, whole
from pals.runtime.channel import run_dir
from pals.runtime.expert_channel import ExpertChannel, ExpertFacts

log = logging.getLogger("vllm.pals")
PUBLISH_EVERY_S = 0.5
#: Where releases keep the class of their MoE layers.
_RUNNERS = (
    "vllm.model_executor.layers.fused_moe.runner.moe_runner",
    "vllm.model_executor.layers.fused_moe.layer",
)
_building: WorkerExperts | None = None  # whose model this process is building: constructors are given nothing else


def why_not(parallel: Any, rank: int, *, may_sleep: bool = False) -> str | None:
    """Why this worker does not count; None where it does."""
    if may_sleep:
        return "sleep mode may discard the memory that holds the counts"
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
        if row == len(counter.now) or _index(runner.layer_name) >= len(counter.now):
            return  # a draft model's, numbered on from the target's, which runs outside the target's step
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


def _index(layer_name: str) -> int:
    """The number in a name such as model.layers.3.mlp.experts; 0 where it has none."""
    return next((int(part) for part in layer_name.split(".") if part.isdigit()), 0)


def _most_tokens(config: Any) -> int:
    """Rows of its own that a worker can have in a forward pass at most, padding included."""
    compiled = config.compilation_config
    sizes = [*(getattr(compiled, "cudagraph_capture_sizes", None) or [])]
    ranks = config.parallel_config.tensor_parallel_size  # some compiled passes pad to a multiple of them
    return -(-int(max(config.scheduler_config.max_num_batched_tokens, *sizes, 1)) // ranks) * ranks


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
    may_sleep = getattr(config.model_config, "enable_sleep_mode", False)
    if reason := why_not(config.parallel_config, rank, may_sleep=may_sleep):
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
