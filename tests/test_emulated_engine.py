"""A real vLLM server on emulated boards, through `pals serve`: API, streaming, metrics, bad days, orderly end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from pals.core.quantities import EngineSample
from pals.engines.openai_client import RequestResult, RequestSpec, replay
from pals.runtime.channel import find_engines
from pals.runtime.journal import read_journal
from pals.runtime.processes import process_alive

pytest.importorskip("vllm")
MODEL = "allenai/OLMoE-1B-7B-0924"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Server:
    """A running `pals serve`."""

    process: subprocess.Popen[bytes]
    port: int
    metrics_port: int
    folder: Path
    environ: dict[str, str]
    log_path: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for(self, words: str, timeout_s: float = 120.0) -> None:
        end_s = time.monotonic() + timeout_s
        while words not in self.log():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end_s, self.log()
            time.sleep(0.1)

    def pals(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pals.cli", *args], capture_output=True, text=True, env=self.environ, timeout=60
        )


def start(
    folder: Path, *extra: str, model: str = MODEL, boards: str = "2xa100-sxm4-80gb", **more_environ: str
) -> Server:
    folder.mkdir(exist_ok=True)
    port, metrics_port = free_port(), free_port()
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PALS_")}
    environ |= {
        "PALS_RUN_DIR": str(folder),
        "XDG_CACHE_HOME": str(folder.parent / "cache"),
        "COLUMNS": "140",
    } | more_environ
    log_path = folder / f"serve-{port}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "pals.cli", "serve", model, "--emulate", boards, "--port", str(port),
                "--metrics-port", str(metrics_port), "--max-num-seqs", "32", "--journal", str(folder / "j.jsonl"), *extra,
            ],
            stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True,
        )  # fmt: skip
    return Server(process, port, metrics_port, folder, environ, log_path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests below; its policy holds 8 active sequences at 250 W."""
    made = start(tmp_path_factory.mktemp("serve") / "run", "--power-limit-w", "250", "--active-sequences", "8")
    try:
        made.wait_for("policy static")
        yield made
    finally:
        made.process.send_signal(signal.SIGTERM)
        made.process.wait(timeout=90)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_it_says_that_boards_are_emulated_in_one_line(server: Server) -> None:
    assert server.log().count("EMULATED") == 1


def test_the_model_is_listed_and_stock_metrics_are_there(server: Server) -> None:
    assert [m["id"] for m in json.loads(get(f"{server.url}/v1/models"))["data"]] == [MODEL]
    stock = get(f"{server.url}/metrics")
    assert "vllm:num_requests_running" in stock
    assert "pals_" not in stock


def test_streams_deliver_exactly_the_tokens_asked_for_under_the_lowered_limit(server: Server) -> None:
    specs = [RequestSpec(at_s=0.01 * i, prompt_tokens=50 + i, output_tokens=20 + i % 5) for i in range(60)]

    results = asyncio.run(replay(specs, base_url=server.url, model=MODEL, seed=1))

    assert [r.error for r in results] == [None] * 60
    assert [r.output_tokens for r in results] == [s.output_tokens for s in specs]
    assert all(r.ttft_s is not None and r.tpot_s is not None and r.tpot_s > 0 for r in results)
    records = list(read_journal(server.folder / "j.jsonl")[1])
    busiest = [r.sample.engine.running for r in records if r.sample.engine is not None]
    assert max(busiest, default=0) <= 8


def test_the_openai_client_chats_and_gets_canned_prose(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=60, extra_body={"ignore_eos": True}
    )

    assert answer.usage.completion_tokens == 60
    prose = (files("pals.engines") / "canned_text.txt").read_text()
    assert " ".join(answer.choices[0].message.content.split()[1:-1]) in " ".join((2 * prose).split())
    client.close()


def ask(server: Server, **body: object) -> dict[str, Any]:
    """A completion's answer; raises `HTTPError` where the server refuses."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps({"model": MODEL, "prompt": "x", **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return dict(json.load(answer))


def test_logprobs_of_outputs_are_there_and_those_of_prompts_are_refused_with_400(server: Server) -> None:
    choices = ask(server, max_tokens=4, logprobs=2, n=2)["choices"]
    assert [c["logprobs"]["token_logprobs"] for c in choices] == [[0.0] * 4] * 2

    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, max_tokens=4, logprobs=1, echo=True)
    assert refused.value.code == 400
    assert "not there on emulated boards" in refused.value.read().decode()


def test_output_tokens_are_those_that_vllm_counts(server: Server) -> None:
    for n in range(8):
        ask(server, prompt=f"end {n}", max_tokens=400)  # most end at EOS
    pattern = r"^(?:vllm:generation|pals_output)_tokens_total\{.*\} (\S+)$"

    def counted(url: str) -> float:
        return float(re.findall(pattern, get(url), re.MULTILINE)[0])

    end_s = time.monotonic() + 10  # the agent's figure is of its last tick
    while counted(f"{server.url}/metrics") != counted(f"http://127.0.0.1:{server.metrics_port}/metrics"):
        assert time.monotonic() < end_s
        time.sleep(0.1)


def test_a_json_schema_is_obeyed(server: Server) -> None:
    choice = {"choice": ["watt", "joule"]}

    assert ask(server, max_tokens=200, structured_outputs=choice)["choices"][0]["text"] in ("watt", "joule")


def test_the_agents_metrics_and_status_tell_what_is_in_force(server: Server) -> None:
    metrics = get(f"http://127.0.0.1:{server.metrics_port}/metrics")
    assert f'pals_power_limit_enforced_watts{{board="1",engine="{MODEL}"}} 250.0' in metrics
    assert f'pals_active_sequence_limit{{engine="{MODEL}"}} 8.0' in metrics

    told = server.pals("status").stdout
    assert "8 of 32" in told
    assert "250 W" in told
    assert "Boards (emulated)" in told


def test_tools_that_know_nothing_of_pals_see_the_boards_and_who_uses_them(server: Server) -> None:
    pytest.importorskip("gpustat")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    told = server.pals("emulate", "nvml", "--", sys.executable, "-m", "gpustat", "--json")

    boards = json.loads(told.stdout)["gpus"]
    assert [b["enforced.power.limit"] for b in boards] == [250, 250]
    pid = find_engines(server.folder)[0].info.pid
    assert [[p["pid"] for p in b["processes"]] for b in boards] == [[pid], [pid]]


def test_a_second_agent_and_a_second_server_are_refused(server: Server) -> None:
    agent = server.pals("agent", "--metrics-port", "0")
    assert agent.returncode == 2
    assert "another PALS agent" in agent.stderr

    taken = server.pals("serve", MODEL, "--emulate", "h100-sxm5-80gb", "--port", str(server.port))
    assert taken.returncode == 2
    assert f"API port {server.port}" in taken.stderr

    steered = ["serve", MODEL, "--emulate", "h100-sxm5-80gb", "--port", str(free_port()), "--metrics-port", "0"]
    second = server.pals(*steered)
    assert second.returncode == 2
    assert "or serve with --no-agent" in second.stderr
    other = server.pals(*steered, "--no-agent")
    assert other.returncode == 2
    assert "another emulated server" in other.stderr


def test_ctrl_c_answers_what_was_accepted_and_leaves_nothing_behind(tmp_path: Path) -> None:
    made = start(tmp_path / "run", "--power-limit-w", "200")
    made.wait_for("policy static")
    time.sleep(1.2)
    engine = find_engines(made.folder)[0]
    pids = [engine.info.pid, made.process.pid]

    async def load() -> list[str | None]:
        specs = [RequestSpec(at_s=0.0, prompt_tokens=20, output_tokens=400) for _ in range(8)]
        task = asyncio.create_task(replay(specs, base_url=made.url, model=MODEL, seed=2))
        await asyncio.sleep(1.5)
        os.kill(made.process.pid, signal.SIGINT)
        return [r.error for r in await task]

    errors = asyncio.run(load())
    code = made.process.wait(timeout=90)

    assert errors == [None] * 8
    assert code == 0
    assert "boards put back as found: 400 W, 400 W" in made.log()
    assert [p for p in pids if process_alive(p)] == []
    assert sorted(p.suffix for p in made.folder.iterdir()) == [".jsonl", ".log", ".log"]


@pytest.mark.slow
@pytest.mark.usefixtures("hangups_arrive")
def test_data_parallel_ranks_drain_too_and_a_failed_agent_leaves_the_server_serving(tmp_path: Path) -> None:
    with socket.socket() as taken:
        made = start(tmp_path / "run", "--data_parallel_size", "2", "--drain-s", "40")
        made.wait_for("starting vLLM")  # the ports were free when it looked
        taken.bind(("127.0.0.1", made.metrics_port))
        taken.listen()
        made.wait_for("vLLM serves on without it")

    async def load() -> list[str | None]:
        specs = [RequestSpec(at_s=0.0, prompt_tokens=20, output_tokens=400) for _ in range(8)]
        task = asyncio.create_task(replay(specs, base_url=made.url, model=MODEL, seed=2))
        while sum(c.read().running for c in find_engines(made.folder)) < 8:
            await asyncio.sleep(0.05)
        os.kill(made.process.pid, signal.SIGHUP)
        await asyncio.sleep(0.2)
        os.kill(made.process.pid, signal.SIGINT)
        return [r.error for r in await task]

    assert asyncio.run(load()) == [None] * 8
    assert made.process.wait(timeout=90) == 1, "because the agent had failed"
    assert "the agent failed: metrics port" in made.log()
    assert "8 requests accepted, answered first for up to 40 s" in made.log()
    assert "stopping goes on in order" in made.log()
    assert "not fully answered" not in made.log()
    assert sorted(p.suffix for p in made.folder.iterdir()) == [".log", ".log"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server without an agent, 64 sequences wide, whose device writes down every step."""
    folder = tmp_path_factory.mktemp("bare")
    made = start(folder / "run", "--no-agent", "--max-num-seqs", "64", PALS_EMU_TRACE=str(folder / "trace.jsonl"))
    try:
        made.wait_for("serving")
        yield made
    finally:
        made.process.send_signal(signal.SIGTERM)
        made.process.wait(timeout=90)


@pytest.mark.parametrize(("lowering", "hold_s"), [("drain", 4.0), ("time-slice", 1.5), ("preempt", 1.5)])
def test_active_sequences_move_64_8_64_under_live_load_and_nothing_is_lost(
    bare: Server, lowering: str, hold_s: float
) -> None:
    engine = find_engines(bare.folder)[0]
    before = engine.read()

    async def hold(limit: int, seconds: float) -> EngineSample:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            engine.apply(limit, lease_s=2.0, lowering=lowering)
            await asyncio.sleep(0.1)
        return engine.read()

    async def load() -> tuple[float, float]:
        specs = [RequestSpec(at_s=0.0, prompt_tokens=30, output_tokens=300 + i % 9) for i in range(150)]
        task = asyncio.create_task(replay(specs, base_url=bare.url, model=MODEL, seed=3))
        assert (await hold(64, 1.5)).running > 32
        lowered_s = time.monotonic()
        low = await hold(8, hold_s)
        assert (low.lowering, low.active_limit) == (lowering, 8)
        assert low.scheduled is not None
        assert low.scheduled <= 8
        assert (low.running <= 8) == (lowering != "time-slice")
        raised_s = time.monotonic()
        assert (await hold(64, 1.0)).running > 32
        results = await task
        assert [r.error for r in results] == [None] * len(specs)
        assert [r.output_tokens for r in results] == [s.output_tokens for s in specs]
        return lowered_s, raised_s

    lowered_s, raised_s = asyncio.run(load())

    trace = [json.loads(line) for line in (bare.folder.parent / "trace.jsonl").read_text().splitlines()]
    low = [row["requests"] for row in trace if lowered_s < row["start_s"] and row["end_s"] < raised_s]
    assert low[-1] <= 8
    if lowering != "drain":  # two steps may be in flight, one being planned, when the setpoint arrives
        assert max(low[4:]) <= 8
    preempted = engine.read().preemptions - before.preemptions
    assert (preempted > 0) == (lowering == "preempt")


def test_requests_beyond_those_that_may_wait_get_503_and_the_others_all_their_tokens(bare: Server) -> None:
    engine = find_engines(bare.folder)[0]
    before = engine.read()
    assert engine.info.capabilities["refuse"]

    async def load() -> list[RequestResult]:
        specs = [RequestSpec(at_s=0.002 * i, prompt_tokens=30, output_tokens=60) for i in range(120)]
        task = asyncio.create_task(replay(specs, base_url=bare.url, model=MODEL, seed=4))
        while not task.done():
            engine.apply(8, lease_s=2.0, most_waiting=12)
            assert engine.read().waiting <= 12
            await asyncio.sleep(0.005)
        return await task

    engine.apply(8, lease_s=2.0, most_waiting=12)
    results = asyncio.run(load())
    refused = [r for r in results if r.refused]

    assert len(results) - len(refused) >= 8 + 12
    assert all(r.error is None and r.output_tokens == 60 for r in results if not r.refused)
    assert engine.read().refused_requests - before.refused_requests == len(refused) > 50
    assert engine.read().arrived_requests - before.arrived_requests == len(results) - len(refused)

    engine.apply(1, lease_s=2.0, most_waiting=0)
    tasks = [threading.Thread(target=ask, args=(bare,), kwargs={"max_tokens": 200, "ignore_eos": True})]
    tasks[0].start()
    while engine.read().running == 0:
        time.sleep(0.005)
    with pytest.raises(urllib.error.HTTPError) as told:
        ask(bare, max_tokens=2)
    assert (told.value.code, told.value.headers["Retry-After"]) == (503, "1")
    assert json.load(told.value)["error"]["code"] == 503
    assert get(f"{bare.url}/health") == ""
    engine.release()
    assert ask(bare, max_tokens=2)["choices"]
    tasks[0].join()


def test_a_json_schema_is_obeyed_in_time_slices_and_after_preemption(bare: Server) -> None:
    engine = find_engines(bare.folder)[0]
    before = engine.read().preemptions
    body = {"model": MODEL, "prompt": "x", "max_tokens": 150, "structured_outputs": {"regex": "(ab|cd){60}"}}

    def ask() -> str:
        request = urllib.request.Request(
            f"{bare.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    async def asked() -> list[str]:
        tasks = [asyncio.create_task(asyncio.to_thread(ask)) for _ in range(12)]
        while not all(t.done() for t in tasks):
            for limit, lowering in ((12, "drain"), (3, "time-slice"), (12, "drain"), (2, "preempt")):
                engine.apply(limit, lease_s=1.0, lowering=lowering)
                await asyncio.sleep(0.03)
        engine.release()
        return [await t for t in tasks]

    answers = asyncio.run(asked())

    assert all(re.fullmatch("(ab|cd){60}", text) for text in answers)
    assert engine.read().preemptions > before


def test_a_killed_engine_ends_the_agent_with_boards_restored_and_a_killed_parent_leaves_no_orphan(
    tmp_path: Path,
) -> None:
    made = start(tmp_path / "run", "--power-limit-w", "200")
    made.wait_for("policy static")
    time.sleep(0.7)
    os.kill(find_engines(made.folder)[0].info.pid, signal.SIGKILL)
    assert made.process.wait(timeout=60) == 3
    assert "boards put back as found" in made.log()
    assert "ended" in made.log()

    (made.folder / "j.jsonl").unlink()  # a journal is never written over
    made = start(tmp_path / "run", "--power-limit-w", "200", "--sm-clock-mhz", "1005")
    made.wait_for("policy static")
    time.sleep(0.7)
    engine_pid = find_engines(made.folder)[0].info.pid
    made.process.kill()
    made.process.wait()
    end_s = time.monotonic() + 30
    while process_alive(engine_pid) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert not process_alive(engine_pid)
    assert (made.folder / "limits-found.json").exists()
    mended = made.pals("restore")
    assert "back" in mended.stderr
    assert "clock locks are released" in mended.stderr
    assert not (made.folder / "limits-found.json").exists()
