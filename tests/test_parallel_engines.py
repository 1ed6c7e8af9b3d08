"""Real vLLM servers on emulated boards, in parallel: tensor, pipeline, data and expert parallelism; two engines on a node."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pals.engines.openai_client import RequestSpec, replay
from pals.runtime.channel import find_engines
from pals.runtime.journal import read_journal
from tests.test_emulated_engine import Server, get, start

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
DENSE, MIXTURE = "meta-llama/Llama-3.1-8B", "allenai/OLMoE-1B-7B-0924"


def ask(server: Server, model: str, requests: int) -> None:
    """Send requests, and expect exactly their tokens."""
    specs = [RequestSpec(at_s=0.0, prompt_tokens=30 + i, output_tokens=60 + i % 9) for i in range(requests)]
    results = asyncio.run(replay(specs, base_url=server.url, model=model, seed=4))
    assert [r.error for r in results] == [None] * requests
    assert [r.output_tokens for r in results] == [s.output_tokens for s in specs]


def end(server: Server) -> int:
    """Ask the server to stop; its exit code."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    return server.process.wait(timeout=120)


@pytest.mark.parametrize(
    ("model", "options", "known_as", "ranks"),
    [
        (MIXTURE, ["-tp", "8"], "tp8 pp1 dp1 ep0", 1),
        (DENSE, ["-tp", "4", "-pp", "2"], "tp4 pp2 dp1 ep0", 1),
        (DENSE, ["-tp", "4", "-dp", "2", "--api-server-count", "1"], "tp4 pp1 dp2 ep0", 2),
        (
            MIXTURE,
            ["-tp", "4", "-dp", "2", "--enable-expert-parallel", "--api-server-count", "1"],
            "tp4 pp1 dp2 ep1",
            2,
        ),
    ],
    ids=["tp8", "tp4-pp2", "dp2-dense", "dp2-experts"],
)
def test_it_serves_exactly_and_one_decision_holds_on_all_ranks_and_boards(
    tmp_path: Path, model: str, options: list[str], known_as: str, ranks: int
) -> None:
    made = start(
        tmp_path / "run", *options, "--power-limit-w", "300", "--active-sequences", "9", model=model,
        boards="8xh100-sxm5-80gb",
    )  # fmt: skip
    try:
        made.wait_for("policy static", timeout_s=240.0)
        ask(made, model, 60)
        channels = find_engines(made.folder)
        assert len(channels) == ranks
        samples = [c.read() for c in channels]
        assert all(s.output_tokens > 0 for s in samples), "every rank had work"
        assert sum(s.active_limit for s in samples) == 9
    finally:
        code = end(made)
    assert code == 0, made.log()
    header, records = read_journal(made.folder / "j.jsonl")
    seen = list(records)
    assert header.engine.parallelism == known_as
    assert header.engine.boards == tuple(range(8))
    assert {r.enforced_limits_w for r in seen} == {(300.0,) * 8}
    assert max(r.sample.engine.running for r in seen if r.sample.engine is not None) <= 9
    assert "boards put back as found: 700 W, 700 W" in made.log()


def test_two_engines_on_one_bank_share_an_agent_a_budget_and_outlive_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one = start(folder, "-tp", "2", "--no-agent", model=MIXTURE, boards="4xh100-sxm5-80gb")
    two: Server | None = None
    agent: subprocess.Popen[str] | None = None
    try:
        one.wait_for("EMULATED")
        two = start(folder, "--boards", "2,3", "--no-agent", model=DENSE, boards="4xh100-sxm5-80gb")
        one.wait_for("serving")
        agent = subprocess.Popen(
            [sys.executable, "-m", "pals.cli", "agent", "--budget-w", "1600", "--metrics-port", str(one.metrics_port)],
            stderr=subprocess.PIPE, text=True, env=one.environ,
        )  # fmt: skip
        two.wait_for("serving")
        wait_until(lambda: DENSE in metrics(one))

        ask(one, MIXTURE, 20)
        ask(two, DENSE, 20)
        told = one.pals("status").stdout
        assert "budget 1600 W shared by 2 engines" in told
        assert f"{MIXTURE}: policy static" in told
        assert f"{DENSE}: policy static" in told
        limits = [line for line in metrics(one).splitlines() if line.startswith("pals_power_limit_enforced_watts")]
        assert sorted(line.split('board="')[1][0] for line in limits) == ["0", "1", "2", "3"]
        assert sum(float(line.rsplit(" ", 1)[1]) for line in limits) <= 0.98 * 1600

        dead = next(e for e in find_engines(folder) if e.info.model == MIXTURE)
        os.kill(dead.info.pid, signal.SIGKILL)
        assert one.process.wait(timeout=120) == 3
        wait_until(lambda: f'pals_budget_watts{{engine="{DENSE}"}} 1600.0' in metrics(one))
        ask(two, DENSE, 20)

        assert end(two) == 0
        assert agent.wait(timeout=60) == 3
        assert agent.stderr is not None
        said = agent.stderr.read()
        assert "1 more are steered on" in said
        assert said.count("boards put back as found: 700 W, 700 W") == 2
    finally:
        if agent is not None:
            agent.kill()
            agent.wait()
            if agent.stderr is not None:
                agent.stderr.close()
        for server in (one, two):
            if server is not None:
                end(server)
    assert not (folder / "emulated-boards.bank").exists()


def metrics(server: Server) -> str:
    """The agent's metrics; empty while nobody answers."""
    try:
        return get(f"http://127.0.0.1:{server.metrics_port}/metrics")
    except OSError:
        return ""


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait until `holds` says so."""
    end_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.1)
