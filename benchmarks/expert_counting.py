"""What counting experts costs: µs per layer call on one core, share of the CPU engine's throughput, and that off nothing is there.

The engine is vLLM's CPU build with a random model of two layers that compute next to nothing, so its share is far above a real model's. One
engine answers the same prompts in turn with and without counting, so that noise hits both alike.
Command: `.venv-cpu/bin/python -m benchmarks.expert_counting`. Target: at most 30 µs per layer call at 256 tokens x 8.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

TARGET_US = 30.0
TOKENS, TOP_K, EXPERTS, LAYERS = 256, 8, 128, 48  # the MoE of Qwen3-30B-A3B
STEPS, WARM_UP = 400, 20
PAIRS = 200  # of batches, with and without

os.environ |= {
    "PALS_EXPERTS": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def op_cost_us() -> tuple[list[float], list[float]]:
    """Microseconds of a layer's call, mean of a step, and of a step's own part for all layers; one of each per step."""
    import torch

    from pals.engines.expert_counter import ExpertCounter, whole

    torch.set_num_threads(1)
    counter = ExpertCounter(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, most_tokens=TOKENS, device="cpu")
    calls = [counter.capture(layer, whole) for layer in range(LAYERS)]
    chosen = [torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices.to(torch.int32) for _ in range(LAYERS)]
    layer_us, step_us = list[float](), list[float]()
    for _ in range(STEPS):
        began = time.perf_counter()
        counter.begin(TOKENS)
        begun = time.perf_counter()
        with torch.inference_mode():
            for call, ids in zip(calls, chosen, strict=True):
                call(ids)
        called = time.perf_counter()
        counter.end(TOKENS)
        ended = time.perf_counter()
        layer_us.append(1e6 * (called - begun) / LAYERS)
        step_us.append(1e6 * (begun - began + ended - called))
    if int(counter.sums[:, :EXPERTS].sum()) != STEPS * LAYERS * TOKENS * TOP_K:
        raise RuntimeError("the op lost choices: what was timed is not counting")
    return layer_us[WARM_UP:], step_us[WARM_UP:]


def what_is_there_when_off(llm: Any) -> list[str]:
    """Traces of counting in an engine that nobody asked to count; empty: none."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.worker.worker_base import WorkerWrapperBase as Wrapper

    there = [name for name in sys.modules if name.startswith("pals.engines.expert_count")]
    methods = (Wrapper.init_device, Wrapper.execute_model, Wrapper.shutdown, MoERunner.__init__)
    there += [f.__qualname__ for f in methods if not f.__module__.startswith("vllm.")]
    runners = [m for m in llm.llm_engine.model_executor.driver_worker.get_model().modules() if isinstance(m, MoERunner)]
    if not runners:
        raise RuntimeError("the model has no layer whose router could be looked at; nothing was checked")
    return there + [r.layer_name for r in runners if r.router.capture_fn is not None]


def throughput_shares(llm: Any) -> tuple[list[float], float]:
    """Of each pair of batches the share of time that counting took, and the output tokens/s without."""
    from tests.cpu_engine.drive import OUTPUT_TOKENS, PROMPTS, answer

    worker = llm.llm_engine.model_executor.driver_worker
    experts = worker._pals_experts
    captures = [runner.router.capture_fn for runner in experts.layers]
    shares, off_s = list[float](), list[float]()
    for pair in range(PAIRS + 2):
        took = dict[bool, float]()
        for on in (True, False) if pair % 2 else (False, True):
            for runner, capture in zip(experts.layers, captures, strict=True):
                runner.router.capture_fn = capture if on else None
            vars(worker).pop("_pals_experts", None)
            if on:
                worker._pals_experts = experts
            began = time.perf_counter()
            answer(llm)
            took[on] = time.perf_counter() - began
        shares.append(1.0 - took[False] / took[True])
        off_s.append(took[False])
    return shares[2:], len(PROMPTS) * OUTPUT_TOKENS / median(off_s[2:])


def engines(folder: Path) -> tuple[list[str], list[float], float]:
    """What is there when off, and `throughput_shares` with counting on; one engine after the other."""
    from tests.cpu_engine import tiny_models
    from tests.cpu_engine.drive import engine, stop

    from pals.engines import vllm_plugin

    model = tiny_models.make("qwen3-moe", folder)
    llm = engine(model, eager=True)
    there = what_is_there_when_off(llm)
    stop(llm)
    os.environ["PALS_EXPERTS"] = "1"
    vllm_plugin.register()
    llm = engine(model, eager=True)
    shares, tokens_per_s = throughput_shares(llm)
    stop(llm)
    return there, shares, tokens_per_s


def main() -> int:
    """Measure and print; 1 where the target is missed or off is not off."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PALS_RUN_DIR": folder, "VLLM_CACHE_ROOT": f"{folder}/cache"}
        there, shares, tokens_per_s = engines(Path(folder))
    layer_us, step_us = op_cost_us()
    middle = median(layer_us)
    low, _, high = quantiles(layer_us, n=4)
    verdict = "pass" if middle <= TARGET_US else "FAIL"
    print(f"counting experts (host CPU, one core; {TOKENS} tokens x {TOP_K} of {EXPERTS} experts, {LAYERS} layers)")
    print(f"per layer call   {middle:6.1f} µs (p25..p75 {low:.1f}..{high:.1f}), target {TARGET_US:.0f} {verdict}")
    print(f"per step besides {median(step_us):6.1f} µs, for all layers together")
    low, _, high = quantiles(shares, n=4)
    print(
        f"share of throughput, CPU engine, tiny model: {median(shares):.1%} (p25..p75 {low:.1%}..{high:.1%}) "
        f"of {tokens_per_s:.0f} output tokens/s"
    )
    print(f"when off: {'nothing installed, pass' if not there else 'FAIL, found ' + ', '.join(there)}")
    return int(middle > TARGET_US or bool(there))


if __name__ == "__main__":
    sys.exit(main())
