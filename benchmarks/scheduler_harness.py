"""vLLM's own scheduler without an engine: fed requests and ready-made tokens, two steps deep as under async scheduling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 16


def engine_config(folder: Path, *, max_num_seqs: int) -> Any:
    """A real `VllmConfig` for the model in `folder`, async scheduling on."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(folder),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=4096,
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = True
    return config


def make_scheduler(kind: Callable[..., Any], config: Any, *, blocks: int = 40000) -> Any:
    """A scheduler of class `kind` over a KV cache of `blocks` blocks."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return kind(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=False,
    )


def request(rid: str, *, prompt: int, output: int) -> Any:
    """A request for exactly `output` tokens."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
    return Request(request_id=rid, prompt_token_ids=[7] * prompt, sampling_params=params, pooling_params=None)


class Driver:
    """Steps a scheduler with a pipeline two deep, and counts what each request was given."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.tokens: dict[str, int] = {}
        self.finished: set[str] = set()
        self.running_history: list[int] = []
        self._known: dict[str, int] = {}
        self._in_flight: deque[tuple[Any, Any]] = deque()

    def add(self, new: Any) -> None:
        """Hand a request to the scheduler."""
        self._known[new.request_id] = new.num_prompt_tokens
        self.scheduler.add_request(new)

    def step(self) -> None:
        """Schedule one step and, once two are in flight, take the older one's tokens."""
        output = self.scheduler.schedule()
        self._in_flight.append((output, self._run(output)))
        self.running_history.append(len(self.scheduler.running))
        if len(self._in_flight) == 2:
            self.land()

    def land(self) -> None:
        """Take the tokens of the oldest step in flight."""
        output, produced = self._in_flight.popleft()
        for outputs in self.scheduler.update_from_output(output, produced).values():
            for out in outputs.outputs:
                self.tokens[out.request_id] = self.tokens.get(out.request_id, 0) + len(out.new_token_ids)
                if out.finish_reason is not None:
                    self.finished.add(out.request_id)

    def drain(self, most: int = 20000) -> None:
        """Step until nothing is left."""
        for _ in range(most):
            if not self.scheduler.has_unfinished_requests():
                while self._in_flight:
                    self.land()
                return
            self.step()
        raise RuntimeError(f"{len(self.scheduler.running)} requests still run after {most} steps")

    def _run(self, output: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for rid in ids:
            yields = computed[rid] + output.num_scheduled_tokens[rid] >= self._known[rid]
            sampled.append([11] if yields else [])
            self._known[rid] += int(yields)
        return ModelRunnerOutput(
            req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=sampled
        )
