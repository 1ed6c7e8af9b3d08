"""Engine throughput with the plugin over without it, emulated device with zero step time, paired runs in turn.

Each run is a process of its own with vLLM's in-process engine: the host is all there is to measure.
Command: `python -m benchmarks.throughput_ratio [pairs]`. Target: median ratio at least 0.99.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TARGET, REQUESTS, OUTPUT = 0.99, 4096, 200


def one_run(folder: Path) -> float:
    """Output tokens per second of one process's engine."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=str(folder), max_num_seqs=128, max_model_len=2048, enable_prefix_caching=False)
    sampling = SamplingParams(max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [11 + i % 97] * 16} for i in range(REQUESTS)]
    engine.generate(prompts[:64], sampling, use_tqdm=False)
    began = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    return REQUESTS * OUTPUT / (time.perf_counter() - began)


def run_apart(folder: Path, run_dir: str, *, plugin: bool) -> float:
    """`one_run` in a process of its own."""
    environ = {
        **os.environ, "PALS_EMU": "1", "PALS_EMU_STEP_S": "0", "PALS_PLUGIN": "1" if plugin else "0",
        "PALS_RUN_DIR": run_dir, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.throughput_ratio", "--one", str(folder)],
        env=environ, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"a run failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Measure and print; 1 where the target is missed."""
    from pals.engines.model_zoo import local_folder

    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = local_folder("OLMoE-1B-7B", Path(scratch) / "models")
        print(f"throughput with and without the plugin, step time 0, {REQUESTS} × {OUTPUT} tokens (emulated device)")
        for i in range(pairs):
            rates = {on: run_apart(folder, scratch, plugin=on) for on in ((True, False) if i % 2 else (False, True))}
            ratios.append(rates[True] / rates[False])
            print(
                f"pair {i + 1}: on {rates[True]:.0f} tokens/s, off {rates[False]:.0f} tokens/s, ratio {ratios[-1]:.4f}"
            )
    middle = median(ratios)
    verdict = "pass" if middle >= TARGET else "FAIL"
    print(f"median ratio {middle:.4f} (spread {min(ratios):.4f}..{max(ratios):.4f}), target {TARGET}: {verdict}")
    return int(middle < TARGET)


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(one_run(Path(sys.argv[2]))))
    else:
        sys.exit(main())
