"""An out-of-tree vLLM platform without a device: answers vLLM's questions from the emulated boards, runs no kernel."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from pals.engines.emulated_device import open_bank

EXECUTOR = "pals.engines.emulated_executor.EmulatedExecutor"


def _silence_accelerator() -> None:
    """vLLM empties accelerator caches on every platform but CPU; without an accelerator torch would raise."""
    if not torch.accelerator.is_available():
        for name in ("empty_cache", "empty_host_cache", "synchronize"):
            if hasattr(torch.accelerator, name):
                setattr(torch.accelerator, name, lambda *args, **kwargs: None)


def refusal() -> type[Exception]:
    """What vLLM takes for a request's own fault."""
    try:
        from vllm.exceptions import VLLMValidationError
    except ImportError:
        return ValueError
    return VLLMValidationError


def _know_deepseek_moe() -> None:
    """The first DeepSeek-MoE: vLLM has the model, transformers reads its config only with code from the hub."""
    from transformers import AutoConfig, PretrainedConfig

    class DeepseekConfig(PretrainedConfig):
        model_type = "deepseek"

    with contextlib.suppress(ValueError):  # a transformers that knows it by itself
        AutoConfig.register("deepseek", DeepseekConfig)


_silence_accelerator()
_know_deepseek_moe()


class EmulatedPlatform(Platform):
    """See the module."""

    _enum = PlatformEnum.OOT
    device_name = "emulated"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    ray_device_key = "CPU"
    device_control_env_var = "CUDA_VISIBLE_DEVICES"  # the emulated boards are chosen as real ones are
    supported_quantization: list[str] = []  # noqa: RUF012 - vLLM's class declares it so; empty means all

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return str(open_bank().spec.nvml_name)

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        return f"emulated-{device_id}"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return int(open_bank().spec.memory_gb * 1e9)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> Any:
        return DeviceCapability(*open_bank().spec.capability)

    @classmethod
    def device_count(cls) -> int:
        visible = os.environ.get(cls.device_control_env_var, "")
        return len(visible.split(",")) if visible else int(open_bank().count)

    @classmethod
    def supports_fp8(cls) -> bool:
        return True

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def inference_mode(cls) -> Any:
        return torch.no_grad()

    @classmethod
    def set_device(cls, device: Any) -> None:
        return None

    @classmethod
    def check_if_supports_dtype(cls, dtype: Any) -> None:
        return None

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def import_kernels(cls) -> None:
        return None

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> None:
        return None

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any, *args: Any) -> None:
        """Refuse log-probabilities of prompt tokens, and of tokens named beforehand: no model computes them here.

        Raises:
            VLLMValidationError: what vLLM answers with status 400; `ValueError` in a release without it.
        """
        for name in ("prompt_logprobs", "prompt_logprob_token_ids", "logprob_token_ids"):
            if getattr(params, name, None) is not None:
                raise refusal()(
                    f"{name} is not there on emulated boards: no model weighs tokens. Ask without it (echo with logprobs "
                    "asks for it too); logprobs of output tokens are there, each with probability one"
                )

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Route execution to the emulated executor; no compilation, no graphs."""
        from vllm.config import CompilationMode, CUDAGraphMode

        parallel, cache, compilation = (
            vllm_config.parallel_config,
            vllm_config.cache_config,
            vllm_config.compilation_config,
        )
        if parallel.distributed_executor_backend in (None, "uni", "mp"):
            parallel.distributed_executor_backend = EXECUTOR
        if parallel.worker_cls == "auto":
            parallel.worker_cls = "pals.engines.emulated_executor.RankStub"
        if cache is not None and getattr(cache, "block_size", None) is None:
            cache.block_size = 16
        compilation.mode = CompilationMode.NONE
        compilation.cudagraph_mode = CUDAGraphMode.NONE
