"""Runs tiny models in vLLM's CPU build and prints, as one JSON line, what was counted and what is true; a process of its own each time.

python -m tests.cpu_engine.drive eager|compiled|served FOLDER; "served" has the engine in a process of its own and reads what it
publishes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pals.runtime.channel import find_engines, run_dir
from pals.runtime.expert_channel import read_engine
from pals.runtime.routing_meter import RoutingMeter
from tests.cpu_engine import tiny_models

OUTPUT_TOKENS = 12
PROMPTS = [list(range(3 + i, 3 + i + length)) for i, length in enumerate((5, 17, 40, 64, 9, 3))]


def engine(model: Path, *, eager: bool) -> Any:
    """vLLM with the model."""
    from vllm import LLM, ModelRegistry

    for name in json.loads((model / "config.json").read_text())["architectures"]:
        # A class of one's own is looked at here; vLLM's, in a process of its own that imports vLLM anew, ten seconds a model.
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    return LLM(
        model=str(model), skip_tokenizer_init=True, enforce_eager=eager, max_model_len=512, max_num_batched_tokens=64,
        max_num_seqs=8, kv_cache_memory_bytes=1 << 25, enable_prefix_caching=False, disable_log_stats=True, seed=1,
    )  # fmt: skip


def answer(llm: Any) -> list[list[int]]:
    """The output tokens of all prompts; prefills are chunked and run beside decodes, so batches vary."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def stop(llm: Any) -> None:
    """End an engine that runs in this process, which may then have another."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


class Witness:
    """A second listener at a router, set as vLLM sets its own; counts on its own."""

    def __init__(self, experts: int) -> None:
        self.counts, self.distinct = np.zeros(experts, np.int64), 0

    def __call__(self, chosen: Any) -> None:
        """One call of the layer."""
        here = np.bincount(chosen.numpy().ravel(), minlength=len(self.counts))
        self.counts += here
        self.distinct += int((here > 0).sum())


def served(llm: Any, folder: Path) -> dict[str, Any]:
    """What an agent reads of a living engine, and what is left of it after the engine's end."""
    channels = find_engines(folder)
    meter = RoutingMeter.of_engine(folder, [c.info.pid for c in channels], window_s=0.1)
    summary, deadline_s = meter.read(), time.monotonic() + 60
    while (summary is None or summary.tokens == 0) and time.monotonic() < deadline_s:
        answer(llm)
        summary = meter.read()
    counts = read_engine(folder, [c.info.pid for c in channels])
    files = len(list(folder.glob("*.experts")))
    llm.llm_engine.engine_core.shutdown()
    return {
        "engines": len(channels), "files": files, "files_after": len(list(folder.glob("*.experts"))), "age_s": time.monotonic() - summary.time_s if summary else None,
        "unknown": dict(summary.unknown) if summary else None, "distinct": summary.distinct_per_step if summary else None,
        "tokens": counts.tokens if counts else 0, "chosen": counts.routed.sum(axis=1).tolist() if counts else [],
    }  # fmt: skip


def counted(llm: Any, *, witness: bool) -> dict[str, Any]:
    """What the worker in this process counted, and what is true; `witness` adds a listener of its own, which traced code cannot call."""
    worker = llm.llm_engine.model_executor.driver_worker
    experts = vars(worker).get("_pals_experts")
    result: dict[str, Any] = {
        "installed": experts is not None, "imported": "pals.engines.expert_counts" in sys.modules,
        "compiled_as": worker.vllm_config.compute_hash(),
    }  # fmt: skip
    if experts is None:
        return result | {"outputs": answer(llm)}
    counter = experts.counter
    result |= {"before": int(counter.sums.sum()), "warm_up": int(counter.now.sum()), "layers": len(experts.layers)}
    witnesses = [Witness(counter.experts) for _ in experts.layers]
    if witness:
        for runner, second in zip(experts.layers, witnesses, strict=True):
            runner.router.set_capture_fn(second)
    return result | {
        "outputs": answer(llm), "steps": counter.steps, "tokens": counter.tokens,
        "sums": counter.sums[: len(experts.layers)].tolist(),
        "witnessed": [[*w.counts.tolist(), w.distinct] for w in witnesses],
    }  # fmt: skip


def one_after_another(models: list[str], folder: Path, *, eager: bool) -> dict[str, Any]:
    """Each model's counts, from engines that follow each other in this process."""
    results = {}
    for name in models:
        began_s = time.monotonic()
        llm = engine(tiny_models.make(name, folder), eager=eager)
        results[name] = counted(llm, witness=eager)
        stop(llm)
        print(f"{name}: {time.monotonic() - began_s:.1f} s", file=sys.stderr)
    return results


def compiled(folder: Path) -> dict[str, Any]:
    """All models with counting, and before them, into the same cache of compiled code, one without."""
    from pals.engines import vllm_plugin

    off = one_after_another(["qwen3-moe"], folder, eager=False)
    os.environ["PALS_EXPERTS"] = "1"
    vllm_plugin.register()
    return one_after_another(list(tiny_models.SHAPES), folder, eager=False) | {"off": off["qwen3-moe"]}


def main(mode: str, folder: Path) -> None:
    """Count, compare, print."""
    if mode == "served":
        result = served(engine(tiny_models.make("qwen3-moe", folder), eager=True), run_dir(os.environ))
    elif mode == "compiled":
        result = compiled(folder)
    else:
        result = one_after_another(list(tiny_models.SHAPES), folder, eager=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
