"""Microseconds the plugin adds to one schedule() + update_from_output(), paired with vLLM's plain scheduler.

Both schedulers take the same requests in one process and step in turn, so that noise hits both alike.
Command: `python -m benchmarks.plugin_overhead`. Target: at most 50 µs at 8, 64 and 256 running sequences.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.update(PALS_EMU="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")

from benchmarks.scheduler_harness import Driver, engine_config, make_scheduler, request

TARGET_US = 50.0
STEPS, WARM_UP = 3000, 100


def timed_steps(plain: Driver, composed: Driver, steps: int) -> list[float]:
    """Seconds the composed scheduler took beyond the plain one, step by step; the order alternates."""
    extra = []
    gc.collect()
    gc.disable()  # a collection in one of the two would drown what is measured
    for i in range(steps):
        took: dict[int, float] = {}
        for which in (plain, composed) if i % 2 else (composed, plain):
            began = time.perf_counter()
            which.step()
            took[id(which)] = time.perf_counter() - began
        extra.append(took[id(composed)] - took[id(plain)])
    gc.enable()
    return extra


def fill(kind: Any, config: Any, running: int) -> Driver:
    """A driver with `running` long requests in decode."""
    driver = Driver(make_scheduler(kind, config, blocks=200000))
    for i in range(running):
        driver.add(request(f"r{i}", prompt=16, output=3500))
    for _ in range(WARM_UP):
        driver.step()
    return driver


def main() -> int:
    """Measure and print; 1 where the target is missed."""
    from pals.engines.model_zoo import local_folder
    from pals.engines.vllm_plugin import compose

    with tempfile.TemporaryDirectory() as folder:
        os.environ["PALS_RUN_DIR"] = folder
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        config = engine_config(local_folder("OLMoE-1B-7B", Path(folder) / "models"), max_num_seqs=256)
        config.model_config.max_model_len = 4096
        worst = 0.0
        print("plugin overhead per schedule() + update_from_output(), paired (host CPU; no board involved)")
        print(f"{'running':>8} {'median µs':>10} {'p25..p75 µs':>16} {'target':>8}")
        for running in (8, 64, 256):
            plain, composed = fill(AsyncScheduler, config, running), fill(compose(AsyncScheduler), config, running)
            extra_us = [1e6 * s for s in timed_steps(plain, composed, STEPS)]
            low, _, high = quantiles(extra_us, n=4)
            middle = median(extra_us)
            worst = max(worst, middle)
            verdict = "pass" if middle <= TARGET_US else "FAIL"
            print(f"{running:8d} {middle:10.1f} {f'{low:.1f}..{high:.1f}':>16} {TARGET_US:5.0f} {verdict}")
            composed.scheduler.shutdown()
    return int(worst > TARGET_US)


if __name__ == "__main__":
    sys.exit(main())
