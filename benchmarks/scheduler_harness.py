"""vLLM's own scheduler without an engine: fed requests and ready-made tokens, two steps deep as under async scheduling."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 16


def engine_config(folder: Path, *, max_num_seqs: int, **engine: Any) -> Any:
    """A real `VllmConfig` for the model in `folder`, async scheduling on; `engine` are more of vLLM's options."""
    from vllm.engine.arg_utils import EngineArgs

    options: dict[str, Any] = {
        "max_num_batched_tokens": 8192,
        "max_model_len": 4096,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        **engine,
    }
    config = EngineArgs(model=str(folder), max_num_seqs=max_num_seqs, **options).create_engine_config()
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


def request(rid: str, *, prompt: int, output: int, **more: Any) -> Any:
    """A request for exactly `output` tokens; `more` are further arguments of vLLM's `Request`."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
    return Request(request_id=rid, prompt_token_ids=[7] * prompt, sampling_params=params, pooling_params=None, **more)


def block_hasher() -> Callable[[Any], Any]:
    """What vLLM's front end gives every request (`block_hasher=`) where prefix caching is on."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK, sha256)  # type: ignore[no-any-return]


def greedy(rid: str, nth: int) -> int:
    """The `nth` token of request `rid` (from 1): what it was asked alone decides, as under greedy decoding."""
    return 3 + zlib.crc32(f"{rid} {nth}".encode()) % 500


class Driver:
    """Steps a scheduler with a pipeline two deep, and keeps what each request was given; `run` executes a step."""

    def __init__(self, scheduler: Any, run: Callable[[Any], Any] | None = None) -> None:
        self.scheduler = scheduler
        self.outputs: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.running_history: list[int] = []
        self.plans: list[dict[str, int]] = []  # scheduled tokens by request, one step each
        self._run = run or self._greedy
        self._known: dict[str, int] = {}
        self._prompts: dict[str, int] = {}
        self._in_flight: deque[tuple[Any, Any]] = deque()

    def add(self, new: Any) -> None:
        """Hand a request to the scheduler."""
        self._known[new.request_id] = self._prompts[new.request_id] = new.num_prompt_tokens
        self.scheduler.add_request(new)

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens each request was given."""
        return {rid: len(given) for rid, given in self.outputs.items()}

    def step(self) -> None:
        """Schedule one step and, once two are in flight, take the older one's tokens."""
        output = self.scheduler.schedule()
        self._in_flight.append((output, self._run(output)))
        self.running_history.append(len(self.scheduler.running))
        self.plans.append(dict(output.num_scheduled_tokens))
        if len(self._in_flight) == 2:
            self.land()

    def land(self) -> None:
        """Take the tokens of the oldest step in flight."""
        output, produced = self._in_flight.popleft()
        for outputs in self.scheduler.update_from_output(output, produced).values():
            for out in outputs.outputs:
                self.outputs.setdefault(out.request_id, []).extend(out.new_token_ids)
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

    def _greedy(self, output: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for new in output.scheduled_new_reqs:  # model runner V2 takes resumed requests for new ones
            self._known[new.req_id] = len(getattr(new, "prefill_token_ids", None) or new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for rid, given in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            if rid in cached.resumed_req_ids:
                self._known[rid] = self._prompts[rid] + given
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for rid in ids:
            yields = computed[rid] + output.num_scheduled_tokens[rid] >= self._known[rid]
            sampled.append([greedy(rid, self._known[rid] - self._prompts[rid] + 1)] if yields else [])
            self._known[rid] += int(yields)
        return ModelRunnerOutput(
            req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=sampled
        )
