"""Microseconds the plugin adds to one schedule() + update_from_output() of vLLM's async scheduler.

One scheduler steps in turn with and without PALS, so that noise hits both alike; the figure is the difference of the
medians, the range that of neighbouring steps.
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


def timed_steps(driver: Driver, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step with and without PALS, on one scheduler whose link is taken off every other step."""
    link, took = driver.scheduler._pals, ([], [])  # type: tuple[object, tuple[list[float], list[float]]]
    gc.collect()
    gc.disable()  # a collection in one of the two would drown what is measured
    for i in range(steps):
        driver.scheduler._pals = link if i % 2 else None
        began = time.perf_counter()
        driver.step()
        took[i % 2].append(time.perf_counter() - began)
    gc.enable()
    driver.scheduler._pals = link
    return took[1], took[0]


def fill(kind: Any, config: Any, running: int) -> Driver:
    """A driver with `running` long requests in decode."""
    driver = Driver(make_scheduler(kind, config, blocks=200000))
    for i in range(running):
        driver.add(request(f"r{i}", prompt=16, output=4000))
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
        print(f"{'running':>8} {'added µs':>10} {'p25..p75 µs':>16} {'target':>8}")
        for running in (8, 64, 256):
            composed = fill(compose(AsyncScheduler), config, running)
            on, off = timed_steps(composed, STEPS)
            extra_us = [1e6 * (a - b) for a, b in zip(on, off, strict=True)]
            low, _, high = quantiles(extra_us, n=4)
            middle = 1e6 * (median(on) - median(off))
            worst = max(worst, middle)
            verdict = "pass" if middle <= TARGET_US else "FAIL"
            print(f"{running:8d} {middle:10.1f} {f'{low:.1f}..{high:.1f}':>16} {TARGET_US:5.0f} {verdict}")
            composed.scheduler.shutdown()
    return int(worst > TARGET_US)


if __name__ == "__main__":
    sys.exit(main())
