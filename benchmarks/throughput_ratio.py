"""Engine throughput with the plugin over without it: an emulated device with zero step time, so the host is all there is.

One in-process engine works through one queue; the plugin's link is taken off and put back every `BLOCK` steps, so that
each pair lies within a second and a busy machine slows both alike. vLLM's own work is the same in both.
Command: `python -m benchmarks.throughput_ratio [pairs]`. Target: median ratio at least 0.99.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.update(
    PALS_EMU="1", PALS_EMU_STEP_S="0", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1",
)  # fmt: skip
TARGET, BATCH, OUTPUT, BLOCK, PAIRS = 0.99, 128, 200, 150, 60


def make_engine(folder: Path) -> Any:
    """An engine with a full batch and a long queue, in one process."""
    from vllm import LLM

    llm = LLM(model=str(folder), max_num_seqs=BATCH, max_model_len=2048, enable_prefix_caching=False)
    return llm.llm_engine


def feed(engine: Any, sequence: int) -> int:
    """Keep the queue from running dry; return the next request's number."""
    from vllm import SamplingParams

    while engine.get_num_unfinished_requests() < 2 * BATCH:
        sampling = SamplingParams(max_tokens=OUTPUT // 2 + sequence % OUTPUT, ignore_eos=True, detokenize=False)
        engine.add_request(str(sequence), {"prompt_token_ids": [11 + sequence % 97] * 16}, sampling)
        sequence += 1
    return sequence


def block_rate(engine: Any, sequence: int) -> tuple[float, int]:
    """Steps per second over one block (every step yields a full batch of tokens), and the next request's number."""
    began = time.perf_counter()
    for _ in range(BLOCK):
        sequence = feed(engine, sequence)
        engine.step()
    return BLOCK / (time.perf_counter() - began), sequence


def main() -> int:
    """Measure and print; 1 where the target is missed."""
    from pals.engines.model_zoo import local_folder

    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["PALS_RUN_DIR"] = scratch
        engine = make_engine(local_folder("OLMoE-1B-7B", Path(scratch) / "models"))
        scheduler = engine.engine_core.engine_core.scheduler
        link, ratios, sequence = scheduler._pals, [], 0
        for i in range(pairs + 4):
            rates = {}
            for on in (True, False) if i % 2 else (False, True):
                scheduler._pals = link if on else None
                rates[on], sequence = block_rate(engine, sequence)
            if i >= 4:  # the first pairs fill the batch
                ratios.append(rates[True] / rates[False])
        scheduler._pals = link
    low, middle, high = quantiles(ratios, n=4)
    verdict = "pass" if middle >= TARGET else "FAIL"
    print(
        f"throughput with the plugin over without, step time 0, batch {BATCH} (emulated device), {pairs} pairs of {BLOCK} steps:\n"
        f"median ratio {median(ratios):.4f} (p25..p75 {low:.4f}..{high:.4f}), target {TARGET}: {verdict}"
    )
    return int(middle < TARGET)


if __name__ == "__main__":
    sys.exit(main())
