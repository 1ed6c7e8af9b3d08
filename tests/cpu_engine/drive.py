"""Runs a tiny model in vLLM's CPU build and prints, as one JSON line, what was counted and what is true; a process of its own each time.

python -m tests.cpu_engine.drive MODEL eager|compiled FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.cpu_engine import tiny_models

OUTPUT_TOKENS = 12
PROMPTS = [list(range(3 + i, 3 + i + length)) for i, length in enumerate((5, 17, 40, 64, 9, 3))]


def engine(model: Path, *, eager: bool) -> Any:
    """vLLM with the model."""
    from vllm import LLM

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


class Witness:
    """A second listener at a router, set as vLLM sets its own; counts on its own."""

    def __init__(self, experts: int) -> None:
        self.counts, self.distinct = np.zeros(experts, np.int64), 0

    def __call__(self, chosen: Any) -> None:
        """One call of the layer."""
        here = np.bincount(chosen.numpy().ravel(), minlength=len(self.counts))
        self.counts += here
        self.distinct += int((here > 0).sum())


def main(name: str, mode: str, folder: Path) -> None:
    """Count, compare, print."""
    llm = engine(tiny_models.make(name, folder), eager=mode == "eager")
    experts = llm.llm_engine.model_executor.driver_worker.__dict__.get("_pals_experts")
    result: dict[str, Any] = {"installed": experts is not None}
    if experts is not None:
        counter = experts.counter
        result |= {"before": int(counter.sums.sum()), "warm_up": int(counter.now.sum()), "layers": len(experts.layers)}
        witnesses = [Witness(counter.experts) for _ in experts.layers]
        if mode == "eager":  # traced code takes no Python beside it
            for runner, witness in zip(experts.layers, witnesses, strict=True):
                runner.router.set_capture_fn(witness)
    result["outputs"] = answer(llm)
    if experts is not None:
        rows = slice(len(experts.layers))
        result |= {
            "steps": counter.steps, "tokens": counter.tokens, "sums": counter.sums[rows].tolist(),
            "witnessed": [[*w.counts.tolist(), w.distinct] for w in witnesses],
        }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
