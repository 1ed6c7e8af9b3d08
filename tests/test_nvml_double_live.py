"""A real `pals serve --emulate` seen through the C library: zeus and the journal measure the same joules."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pals.engines.openai_client import RequestSpec, replay
from pals.runtime.channel import find_engines
from pals.runtime.journal import read_journal
from tests.test_emulated_engine import MODEL, Server, start

pytest.importorskip("vllm")
pytest.importorskip("zeus.monitor")
WINDOW_S = 32.0
ZEUS = f"""
import json, sys, time
from zeus.monitor import ZeusMonitor
monitor = ZeusMonitor(cpu_indices=[])
began_s = time.monotonic()
monitor.begin_window("w", sync_execution=False)
time.sleep({WINDOW_S})
joules = list(monitor.end_window("w", sync_execution=False).gpu_energy.values())
print(json.dumps([began_s, time.monotonic(), joules]))
"""


def tool(server: Server, *command: str) -> list[str]:
    """Start of a command line that runs `command` on the server's boards."""
    return [sys.executable, "-m", "pals.cli", "emulate", "nvml", "--", *command]


@pytest.mark.slow
def test_zeus_and_the_journal_agree_on_the_energy_of_half_a_minute_under_load(tmp_path: Path) -> None:
    made = start(tmp_path / "run")
    try:
        made.wait_for("policy static")
        engine_pid = find_engines(made.folder)[0].info.pid

        async def load() -> tuple[bytes, dict[str, object]]:
            specs = [RequestSpec(at_s=0.2 * i, prompt_tokens=60, output_tokens=150) for i in range(210)]
            traffic = asyncio.create_task(replay(specs, base_url=made.url, model=MODEL, seed=4))
            await asyncio.sleep(2.0)
            zeus = await asyncio.create_subprocess_exec(
                *tool(made, sys.executable, "-c", ZEUS), stdout=subprocess.PIPE, env=made.environ
            )
            shown = await asyncio.to_thread(
                subprocess.run, tool(made, sys.executable, "-m", "gpustat", "--json"),
                env=made.environ, capture_output=True, check=True,
            )  # fmt: skip
            measured, _ = await zeus.communicate()
            assert [r.error for r in await traffic] == [None] * 210
            return measured, json.loads(shown.stdout)

        measured, shown = asyncio.run(load())
    finally:
        made.process.send_signal(signal.SIGTERM)
        made.process.wait(timeout=90)
    began_s, ended_s, joules = json.loads(measured)
    records = [r for r in read_journal(made.folder / "j.jsonl")[1] if len(r.sample.boards) == 2]
    for i, zeus_j in enumerate(joules):
        times_s = [r.sample.boards[i].time_s for r in records]
        counter_j = [r.sample.boards[i].energy_j or 0.0 for r in records]
        journal_j = float(np.diff(np.interp([began_s, ended_s], times_s, counter_j))[0])
        assert zeus_j == pytest.approx(journal_j, rel=0.02)
        assert zeus_j > 70.0 * WINDOW_S  # more than idle
    for board in shown["gpus"]:  # type: ignore[attr-defined]
        assert [p["pid"] for p in board["processes"]] == [engine_pid]
        assert board["memory.used"] > 0.8 * board["memory.total"]
