"""What each way of lowering the batch costs, counted in steps of vLLM's own async scheduler: no clock, no board.

48 requests of 256 prompt and 150..432 output tokens run, 6 with prompts of 3,000 tokens have just been admitted; after 50
steps the limit falls from 64 to 8, and 400 steps later it is 64 again.
Command: `python -m benchmarks.lowering`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.scheduler_harness import Driver, engine_config, greedy, make_scheduler, request
from pals.core.quantities import LOWERINGS

LAUNCH, LIMIT, WARM_UP, LOW = 64, 8, 50, 400
SHORT = {f"r{i}": (256, 150 + 6 * i) for i in range(48)}
LONG = {f"long{i}": (3000, 20) for i in range(6)}
ROWS = (
    ("steps until at most 8 are scheduled", "bite"),
    ("requests in the first step after lowering", "first"),
    ("steps until at most 8 run", "drained"),
    ("requests sent back to the queue", "preempted"),
    ("prefill tokens beyond the prompts", "again"),
    ("longest wait between two tokens, steps", "gap"),
    ("steps to finish all", "steps"),
    ("requests with exactly their tokens", "whole"),
)


def measure(config: Any, lowering: str | None) -> dict[str, int]:
    """One run; `lowering` None leaves the limit alone."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from pals.engines.vllm_plugin import compose
    from pals.runtime.channel import AgentChannel

    driver = Driver(make_scheduler(compose(AsyncScheduler), config))
    agent = AgentChannel(driver.scheduler._pals.channel.path)
    for rid, (prompt, output) in SHORT.items():
        driver.add(request(rid, prompt=prompt, output=output))
    run(driver, WARM_UP - 1)
    for rid, (prompt, output) in LONG.items():
        driver.add(request(rid, prompt=prompt, output=output))
    run(driver, 1)
    if lowering is not None:
        agent.apply(LIMIT, lease_s=600.0, lowering=lowering)
    run(driver, LOW)
    agent.release()
    driver.drain()
    now = agent.read()
    driver.scheduler.shutdown()
    plans, running = driver.plans[WARM_UP:], driver.running_history[WARM_UP:]
    prompts = sum(prompt for prompt, _ in (SHORT | LONG).values())
    return {
        "bite": first_at_most(LIMIT, [len(p) for p in plans]),
        "first": len(plans[0]),
        "drained": first_at_most(LIMIT, running),
        "preempted": now.preemptions,
        "again": now.prefill_tokens - prompts,
        "gap": max(longest_gap(driver, rid) for rid in SHORT),
        "steps": max(i + 1 for i, plan in enumerate(driver.plans) if plan),
        "whole": sum(
            driver.outputs[rid] == [greedy(rid, n + 1) for n in range(output)]
            for rid, (_, output) in (SHORT | LONG).items()
        ),
    }


def run(driver: Driver, steps: int) -> None:
    """So many steps."""
    for _ in range(steps):
        driver.step()


def first_at_most(limit: int, counts: Sequence[int]) -> int:
    """After how many steps the count is at most `limit` for good while the limit is low; 1 is the very next step."""
    above = [i for i, count in enumerate(counts[:LOW]) if count > limit]
    return above[-1] + 2 if above else 1


def longest_gap(driver: Driver, rid: str) -> int:
    """Most steps between two scheduled tokens of a request in decode."""
    at = [i for i, plan in enumerate(driver.plans) if rid in plan]
    return max((b - a for a, b in pairwise(at)), default=0)


def cell(name: str, key: str, value: int) -> str:
    """One cell of the table."""
    if name == "undisturbed" and key in ("bite", "first", "drained"):
        return "–"
    return f"> {LOW}" if key in ("bite", "drained") and value > LOW else str(value)


def table(config: Any) -> tuple[str, bool]:
    """All runs as the Markdown table of docs/levers.md, and whether every request got exactly its tokens."""
    runs = {name or "undisturbed": measure(config, name) for name in (None, *LOWERINGS)}
    lines = [
        f"| limit {LAUNCH} → {LIMIT} → {LAUNCH}, {len(SHORT | LONG)} requests | " + " | ".join(runs) + " |",
        "| --- |" + " ---: |" * len(runs),
    ]
    for text, key in ROWS:
        lines.append(f"| {text} | " + " | ".join(cell(name, key, r[key]) for name, r in runs.items()) + " |")
    return "\n".join(lines), all(r["whole"] == len(SHORT | LONG) for r in runs.values())


def main() -> int:
    """Measure and print; 1 where a request did not get exactly its tokens."""
    from pals.engines.model_zoo import local_folder

    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(PALS_EMU="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", PALS_RUN_DIR=folder)
        config = engine_config(local_folder("OLMoE-1B-7B", Path(folder) / "models"), max_num_seqs=LAUNCH)
        text, whole = table(config)
    print(text)
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main())
