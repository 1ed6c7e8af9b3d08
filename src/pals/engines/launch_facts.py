"""What of a vLLM configuration decides how fast it is: build, flags, model sizes; asked of the objects, never by version.

Nothing here may raise: an exception would cost the engine PALS. What cannot be read is None, or "unknown" among the flags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pals.core.architecture import ModelShape
from pals.core.fingerprint import raw_digest, shape_digest
from pals.core.quantities import flags_text

UNKNOWN = "unknown"


class LaunchFacts(NamedTuple):
    """As in `EngineInfo`."""

    build: str | None
    flags: str | None
    config_digest: str | None
    dtype: str | None
    shape: ModelShape | None
    step_tokens: int | None


def launch_facts(vllm_config: Any, *, async_scheduling: bool | None = None) -> LaunchFacts:
    """Read `vllm_config`; the scheduler knows best whether it schedules asynchronously."""
    sized = _or_none(lambda: _text_config(vllm_config.model_config))
    shape = None if sized is None else _or_none(lambda: ModelShape.from_config(sized))
    digest = (
        None if sized is None else _or_none(lambda: shape_digest(shape) if shape is not None else raw_digest(sized))
    )
    return LaunchFacts(
        build=_or_none(_build),
        flags=_or_none(lambda: flags_text(_flags(vllm_config, async_scheduling))),
        config_digest=digest,
        dtype=_or_none(lambda: str(vllm_config.model_config.dtype).removeprefix("torch.")),
        shape=shape,
        step_tokens=_or_none(lambda: int(vllm_config.scheduler_config.max_num_batched_tokens)),
    )


def _flags(config: Any, async_scheduling: bool | None) -> dict[str, object]:
    """Resolved settings by vLLM's own names."""
    asked: dict[str, Callable[[], object]] = {
        "async_scheduling": lambda: (
            bool(config.scheduler_config.async_scheduling) if async_scheduling is None else async_scheduling
        ),
        "attention_backend": lambda: _name(config.attention_config.backend) or "auto",
        "block_size": lambda: config.cache_config.block_size,
        "chunked_prefill": lambda: bool(config.scheduler_config.enable_chunked_prefill),
        "compilation_mode": lambda: _name(config.compilation_config.mode),
        "cudagraph_mode": lambda: _name(config.compilation_config.cudagraph_mode),
        "enforce_eager": lambda: bool(config.model_config.enforce_eager),
        "expert_parallel": lambda: bool(config.parallel_config.enable_expert_parallel),
        "kv_cache_dtype": lambda: config.cache_config.cache_dtype,
        "max_num_batched_tokens": lambda: int(config.scheduler_config.max_num_batched_tokens),
        "prefix_caching": lambda: bool(config.cache_config.enable_prefix_caching),
        "quantization": lambda: config.model_config.quantization or "none",
        "speculative": lambda: _speculative(config.speculative_config),
    }
    found = {name: _or_none(ask) for name, ask in asked.items()}
    return {name: UNKNOWN if value is None else value for name, value in found.items()}


def _speculative(config: Any) -> str:
    if config is None:
        return "none"
    return f"{config.method or 'draft'}:{config.num_speculative_tokens}"


def _name(value: Any) -> str:
    """An enumeration's member by its name."""
    return "" if value is None else str(getattr(value, "name", value))


def _text_config(model_config: Any) -> dict[str, Any]:
    """The language model's part of a Hugging Face config, with the weight format that stands beside it."""
    whole, text = model_config.hf_config, model_config.hf_text_config
    found: dict[str, Any] = dict(text.to_dict())
    weights = getattr(text, "quantization_config", None) or getattr(whole, "quantization_config", None)
    if weights:
        found["quantization_config"] = weights if isinstance(weights, dict) else weights.to_dict()
    return found


def _build() -> str:
    """The commit vLLM was built from; empty for a release that does not say."""
    from vllm import _version

    return str(getattr(_version, "__commit_id__", None) or "")


def _or_none(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:  # noqa: BLE001 - foreign objects of any release; unknown is an answer
        return None
