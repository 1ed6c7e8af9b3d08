"""The executor that vLLM drives instead of GPUs: one object answers for all ranks and hands out futures of booked steps."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from pals.core.architecture import ModelShape
from pals.engines.emulated_device import BookedStep, EmulatedDevice, open_bank
from pals.engines.emulated_routing import routing_of
from pals.engines.emulated_world import clock_of, world_of
from pals.engines.vllm_plugin import boards_of
from pals.plant.llm_step import StepModel
from pals.runtime.clock import Clock

CANNED_FILE = "canned_ids.json"
FALLBACK_IDS = list(range(100, 1100))


class StepFuture(Future):
    """Result of a booked step; `result` waits until the device is done with it."""

    def __init__(self, output: Any, end_s: float, clock: Clock) -> None:
        super().__init__()
        self._end_s, self._clock = end_s, clock
        self.set_result(output)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the step's end, then return its output."""
        self._clock.wait_until(self._end_s)
        return super().result(timeout)


def ready(value: Any) -> Future:
    """A future that is done."""
    future: Future = Future()
    future.set_result(value)
    return future


class RankStub:
    """Answers the worker calls that matter; unknown ones are answered with None."""

    def __init__(self, config: Any, device: EmulatedDevice, model: StepModel, clock: Clock) -> None:
        self._config, self._device, self._model, self._clock = config, device, model, clock

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """One full-attention layer of KV cache per model layer, of the model's own size."""
        config = self._config
        shape = self._model.shape
        pp = config.parallel_config.pipeline_parallel_size
        layers = max(1, shape.layers // pp)
        heads, head_size = kv_heads(config)
        spec = FullAttentionSpec(
            block_size=config.cache_config.block_size, num_kv_heads=heads, head_size=head_size, dtype=torch.bfloat16
        )
        return {f"model.layers.{i}.self_attn": spec for i in range(layers)}

    def determine_available_memory(self) -> int:
        """KV-cache bytes of one board."""
        return int(self._model.kv_capacity_bytes(self._config.cache_config.gpu_memory_utilization))

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["NHD", "HND"]

    def compile_or_warm_up_model(self) -> Any:
        from vllm.v1.worker.worker_base import CompilationTimes

        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def supports_draft_weight_updates(self) -> bool:
        return False

    def execute_dummy_batch(self) -> None:
        """An idle rank runs along, and takes the time."""
        self._clock.wait_until(self._device.dummy_step())


def kv_heads(config: Any) -> tuple[int, int]:
    """KV heads and head size of one board; a latent cache (MLA) is stored whole on each, as one head of half the bytes."""
    model, parallel = config.model_config, config.parallel_config
    if getattr(model, "use_mla", False):
        latent = model.hf_text_config.kv_lora_rank + model.hf_text_config.qk_rope_head_dim
        return 1, latent // 2  # key and value of a full-attention block together hold one latent
    return int(model.get_num_kv_heads(parallel)), int(model.get_head_size())


class EmulatedExecutor(Executor):
    """See the module."""

    supports_pp = True

    def _init_executor(self) -> None:
        config = self.vllm_config
        parallel, folder = config.parallel_config, Path(config.model_config.model)
        world = world_of(config)
        bank = world.bank if world is not None else open_bank()
        self._clock = clock_of(config)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        boards = boards_of(parallel, visible)
        if not boards or max(boards) >= bank.count:
            raise ValueError(
                f"{parallel.world_size} ranks × data-parallel {parallel.data_parallel_size} need boards "
                f"{boards or 'that are not there'}, but of {bank.count} emulated {visible or 'all'} are visible; emulate more "
                f"(--emulate Nx{bank.spec.name}) or choose others (--boards)"
            )
        self._model = StepModel(
            ModelShape.from_config(json.loads((folder / "config.json").read_text())),
            bank.spec,
            tensor_parallel=parallel.tensor_parallel_size,
            pipeline_parallel=parallel.pipeline_parallel_size,
            data_parallel=parallel.data_parallel_size,
            expert_parallel=bool(getattr(parallel, "enable_expert_parallel", False)),
            cuda_graphs=not config.model_config.enforce_eager,
        )
        canned = folder / CANNED_FILE
        eos = config.model_config.hf_text_config.eos_token_id
        self._routing = routing_of(config, self._model, os.environ)
        self._device = EmulatedDevice(
            self._model, bank, boards, routing=self._routing,
            canned=json.loads(canned.read_text()) if canned.exists() else FALLBACK_IDS,
            eos=eos[0] if isinstance(eos, list) else eos,
            environ=os.environ,
            clock=self._clock.now_s,
        )  # fmt: skip
        share = config.cache_config.gpu_memory_utilization  # weights and KV cache: what vLLM takes on a real board
        bank.register_process(os.getpid(), boards, round(share * bank.memory_bytes))
        self._rank = RankStub(config, self._device, self._model, self._clock)
        self._pending: BookedStep | None = None

    def collective_rpc(
        self, method: Any, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None,
        non_block: bool = False, **ignored: Any,
    ) -> Any:  # fmt: skip
        """Answer for every rank; what a stub does not know is answered with None."""
        name = method if isinstance(method, str) else getattr(method, "__name__", "")
        function = getattr(self._rank, name, None)
        answer = function(*args, **(kwargs or {})) if function is not None else None
        answers = [answer] * self.parallel_config.world_size
        return ready(answers) if non_block else answers

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Phase 1: book the step."""
        step = self._device.launch(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            output = model_output(step)
            return ready(output) if non_block else output
        self._pending = step
        return ready(None) if non_block else None

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """Phase 2: hand out the tokens, bent to the grammar where there is one."""
        step, self._pending = self._pending, None
        if step is None:
            return ready(None) if non_block else None
        if grammar_output is not None:
            obey_grammar(step, grammar_output)
        future = StepFuture(model_output(step), step.end_s, self._clock)
        return future if non_block else future.result()

    def check_health(self) -> None:
        return None

    @property
    def max_concurrent_batches(self) -> int:
        return 2 if self.scheduler_config.async_scheduling else 1

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    def shutdown(self) -> None:
        self._routing.close()


def model_output(step: BookedStep) -> Any:
    """The step as vLLM's scheduler takes it."""
    return ModelRunnerOutput(
        req_ids=step.req_ids,
        req_id_to_index={rid: i for i, rid in enumerate(step.req_ids)},
        sampled_token_ids=step.sampled,
        logprobs=certain(step) if step.logprobs else None,
    )


def certain(step: BookedStep) -> LogprobsLists:
    """Log-probabilities of the step's tokens: no model weighed others, so each had probability one and rank 1.

    One row a request, as vLLM slices them; where top log-probabilities are asked for, the token is the only one told.
    """
    ids = [tokens[:1] or [0] for tokens in step.sampled]
    return LogprobsLists(
        logprob_token_ids=np.array(ids, dtype=np.int32),
        logprobs=np.zeros((len(ids), 1), dtype=np.float32),
        sampled_token_ranks=np.ones(len(ids), dtype=np.int32),
    )


def obey_grammar(step: BookedStep, grammar: Any) -> None:
    """Replace tokens a grammar forbids by the last legal one.

    High ids are longer words of the tokenizer and EOS lies at the very top, so a structure closes early.
    """
    rows = np.asarray(grammar.grammar_bitmask)
    for i, rid in enumerate(grammar.structured_output_request_ids):
        at = step.req_ids.index(rid) if rid in step.req_ids else -1
        if at < 0 or not step.sampled[at] or i >= len(rows):
            continue
        token, row = step.sampled[at][0], rows[i].view(np.uint32)
        if not (int(row[token // 32]) >> (token % 32)) & 1:
            legal = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            if len(legal):
                step.sampled[at] = [int(legal[-1])]
