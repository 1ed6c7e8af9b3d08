"""Admission control: the bound reaches the API server, expires with its setpoint, and whoever is let in is not touched."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.admission import queue_full
from pals.core.quantities import Decision, EngineInfo, EngineSample, OperatingPoint
from pals.engines.admission import Admission, admission_of, own_engine
from pals.engines.admission_middleware import GENERATING, AdmissionMiddleware
from pals.runtime.channel import GAUGES, AgentChannel, EngineChannel, Setpoint
from pals.runtime.group import EngineGroup
from tests.test_tick import go, rig
from tests.worlds import Board, Clock, Engine, engine_info, engine_sample

Reply = list[dict[str, Any]]


@given(st.integers(0, 500), st.integers(0, 500), st.integers(-500, 500), st.booleans())
def test_whoever_is_let_in_finds_a_place_or_may_wait(most: int, waiting: int, places: int, left: bool) -> None:
    full = queue_full(most, waiting, places, left)

    assert full == (waiting + 1 > most + (max(0, places) if not left else 0))


def channels(
    folder: Path, *, ranks: int = 1, launch: int = 64
) -> tuple[list[EngineChannel], list[AgentChannel], Clock]:
    """Engines of this process and the agent's ends, on one clock."""
    clock = Clock()
    info = engine_info(os.getpid(), launch=launch)
    made = [EngineChannel(folder, info, name=f"vllm-{i}") for i in range(ranks)]
    return made, [AgentChannel(m.path, clock.now_s) for m in made], clock


def tell(engine: EngineChannel, **gauges: float) -> None:
    """Publish a step; what is not given is 0."""
    engine.publish([float({"active_limit": 64, "launch_limit": 64, **gauges}.get(name, 0.0)) for name in GAUGES])


def test_the_bound_arrives_with_the_setpoint_and_expires_with_it(tmp_path: Path) -> None:
    (engine,), (agent,), clock = channels(tmp_path)
    agent.apply(8, lease_s=3.0, most_waiting=0)
    assert engine.setpoint(clock.now) == Setpoint(8, "drain", 0)
    assert EngineGroup([agent]).setpoint(clock.now) == Setpoint(8, "drain", 0)
    assert EngineGroup([agent]).setpoint(clock.now + 3.0) is None

    agent.apply(8, lease_s=3.0)
    assert engine.setpoint(clock.now) == Setpoint(8, "drain", None)
    agent.apply(8, lease_s=3.0, most_waiting=7)
    agent.release()
    assert engine.setpoint(clock.now) is None
    with pytest.raises(ValueError, match="cannot wait"):
        agent.apply(8, lease_s=3.0, most_waiting=-1)


def test_an_agent_that_knows_no_bound_leaves_none_in_force(tmp_path: Path) -> None:
    (engine,), (agent,), clock = channels(tmp_path)
    agent.apply(8, lease_s=3.0, most_waiting=2)  # and is gone; another, older one writes four doubles from here on
    content = bytearray(engine.path.read_bytes())
    struct.pack_into("<4d", content, 8192 + 8, 16.0, clock.now + 60.0, clock.now + 2.0, 0.0)
    with engine.path.open("r+b") as file:
        file.write(content)

    assert engine.setpoint(clock.now + 2.5) == Setpoint(16, "drain", 2)
    assert engine.setpoint(clock.now + 3.0) == Setpoint(16, "drain", None)


def test_refusals_of_several_api_servers_add_up_and_make_the_capability(tmp_path: Path) -> None:
    _, (agent,), clock = channels(tmp_path)
    assert "refuse" not in agent.info.capabilities
    first = admission_of(EngineGroup([agent]), clock.now_s)
    second = subprocess.run(
        [
            sys.executable, "-c",
            "import sys; from pathlib import Path; from pals.runtime.channel import AgentChannel\n"
            "agent = AgentChannel(Path(sys.argv[1])); counter = agent.refusals.claim(agent.path)\n"
            "for _ in range(5): counter.add()",
            str(agent.path),
        ],
        check=True,
    )  # fmt: skip
    assert second.returncode == 0
    agent.apply(64, lease_s=3.0, most_waiting=0)
    asked = [first.ask() for _ in range(38)]  # all 64 places are free, half of them for each server

    assert [v.retry_after_s is None for v in asked] == [True] * 32 + [False] * 6
    assert agent.read().refused_requests == 5 + 6
    assert agent.info.capabilities["refuse"]
    assert EngineGroup([agent]).read().refused_requests == 11


def test_ranks_share_the_bound_and_count_a_refusal_once(tmp_path: Path) -> None:
    engines, agents, clock = channels(tmp_path, ranks=3)
    group = EngineGroup(agents)
    admission = admission_of(group, clock.now_s)
    group.apply(96, lease_s=3.0, most_waiting=10)
    for engine in engines:
        tell(engine, time_s=clock.now, running=32, waiting=3, active_limit=32)

    assert group.setpoint(clock.now) == Setpoint(96, "drain", 10)
    assert [admission.ask().retry_after_s for _ in range(3)] == [None, 1, 1]
    assert group.read().refused_requests == 2
    assert group.info.capabilities["refuse"]
    agents[1].release()
    assert group.setpoint(clock.now) is None
    assert admission.ask().retry_after_s is None


@dataclass
class Queue:
    """An engine's queue as an API server sees it, and the counter of refusals."""

    most: int | None = 2
    sample: EngineSample = field(default_factory=lambda: engine_sample(100.0))
    refused: int = 0
    api_servers: int = 1

    def setpoint(self, now_s: float) -> Setpoint | None:
        return Setpoint(64, "drain", self.most)

    def last(self) -> EngineSample:
        return self.sample

    def add(self) -> None:
        self.refused += 1

    def now(self, **changes: Any) -> None:
        self.sample = replace(self.sample, **changes)


def judge(queue: Queue, clock: Clock) -> Admission:
    return Admission(queue, queue, clock.now_s)


def test_those_let_in_count_until_the_engine_tells_of_them() -> None:
    queue, clock = Queue(), Clock()
    queue.now(running=64)
    admission = judge(queue, clock)

    assert [admission.ask().ticket for _ in range(4)] == [1, 2, None, None]
    queue.now(waiting=2, arrived_requests=2)
    assert admission.ask().ticket is None  # both wait in the engine: no place more, none less
    queue.now(waiting=0, running=64, arrived_requests=2)
    assert [admission.ask().ticket for _ in range(3)] == [3, 4, None]
    admission.failed(3)  # a bad request: answered before it reached the engine
    assert admission.ask().ticket == 5
    clock.now += 2.5  # and one that got lost
    queue.now(time_s=clock.now)
    assert [admission.ask().ticket for _ in range(3)] == [6, 7, None]


def test_an_answered_request_takes_no_other_ones_arrival() -> None:
    queue, clock = Queue(most=2), Clock()
    queue.now(running=64)
    admission = judge(queue, clock)
    assert [admission.ask().ticket for _ in range(3)] == [1, 2, None]

    queue.now(arrived_requests=1)  # the second, answered at once; the first is still on the way
    assert [admission.ask().ticket for _ in range(2)] == [3, None]


def test_an_arrival_put_down_to_a_request_that_then_fails_was_anothers() -> None:
    queue, clock = Queue(most=2), Clock()
    queue.now(running=64)
    admission = judge(queue, clock)
    assert [admission.ask().ticket for _ in range(3)] == [1, 2, None]
    queue.now(waiting=1, arrived_requests=1)  # the second
    assert admission.ask().ticket is None

    admission.failed(1)
    assert [admission.ask().ticket for _ in range(2)] == [3, None]
    queue.now(waiting=2, arrived_requests=2)
    assert admission.ask().ticket is None


def test_those_let_in_before_there_was_a_bound_count_too() -> None:
    queue, clock = Queue(most=None), Clock()
    queue.now(running=64, arrived_requests=1000)
    admission = judge(queue, clock)
    assert all(admission.ask().retry_after_s is None for _ in range(3))

    queue.most = 4
    assert [admission.ask().ticket is not None for _ in range(2)] == [True, False]
    queue.now(waiting=3, arrived_requests=1003)  # theirs, not that of the one let in under the bound
    assert admission.ask().ticket is None


class BoundedEngine:
    """An API server in front of an engine: who is on the way arrives late and in any order, and steps tell of it."""

    def __init__(self, most: int, places: int) -> None:
        self.queue, self.places = Queue(most=most), places
        self.most, self.arrived, self.finished = most, 0, 0
        self.on_the_way: list[int] = []
        self.waiting: list[int] = []
        self.running: list[int] = []
        self.admission = judge(self.queue, Clock())
        self.tell()

    def tell(self) -> None:
        """Publish, as the plugin does after a step: those that finished have left, nobody has taken their places."""
        self.queue.now(
            running=64 - self.places + len(self.running), waiting=len(self.waiting), arrived_requests=self.arrived
        )

    def ask(self, more: int) -> None:
        for _ in range(1 + more):
            verdict = self.admission.ask()
            if verdict.retry_after_s is None:
                assert verdict.ticket is not None
                self.on_the_way.append(verdict.ticket)
        assert len(self.on_the_way) + len(self.waiting) + len(self.running) <= self.most + self.places

    def arrive(self, which: int) -> None:
        if self.on_the_way:
            self.waiting.append(self.on_the_way.pop(which % len(self.on_the_way)))
            self.arrived += 1

    def turn_down(self, which: int) -> None:
        if self.on_the_way:
            self.admission.failed(self.on_the_way.pop(which % len(self.on_the_way)))

    def step(self, finishing: int) -> None:
        while self.waiting and len(self.running) < self.places:
            self.running.append(self.waiting.pop(0))
        del self.running[: finishing % (self.places + 1)]  # answered; nothing is said to the judge
        self.tell()
        assert len(self.waiting) <= self.most

    def settled(self) -> None:
        """Nobody is on the way and all is told: exactly as many more are let in as may be."""
        while self.on_the_way:
            self.arrive(0)
        self.step(0)
        let_in = 0
        while self.admission.ask().retry_after_s is None:
            let_in += 1
        assert let_in == self.most - len(self.waiting) + self.places - len(self.running)


@given(
    st.integers(0, 6),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["ask", "ask", "arrive", "turn_down", "step"]), st.integers(0, 5)), max_size=60),
)
def test_whatever_the_order_no_more_wait_than_may_and_none_too_few(
    most: int, places: int, events: list[tuple[str, int]]
) -> None:
    engine = BoundedEngine(most, places)
    for event, number in events:
        getattr(engine, event)(number)
    engine.settled()


def in_the_middle_of_a_write(path: Path, offset: int) -> None:
    """What a reader finds when the writer of a block has lost its processor: an odd number, and values of both."""
    with path.open("r+b") as file:
        file.seek(offset)
        number = struct.unpack("<Q", file.read(8))[0]
        file.seek(offset)
        file.write(struct.pack("<Qd", number + 1, 0.0))


@pytest.mark.parametrize("offset", [4096, 8192, 8704])
def test_a_writer_stopped_in_the_middle_lets_nobody_in_that_may_not(tmp_path: Path, offset: int) -> None:
    (engine,), (agent,), clock = channels(tmp_path)
    admission = admission_of(EngineGroup([agent]), clock.now_s)
    agent.apply(64, lease_s=3.0, most_waiting=1)
    tell(engine, time_s=clock.now, running=64, waiting=1, arrived_requests=65)
    assert engine.setpoint(clock.now) == Setpoint(64, "drain", 1)
    assert admission.ask().retry_after_s is not None

    in_the_middle_of_a_write(agent.path, offset)

    assert admission.ask().retry_after_s is not None
    assert engine.setpoint(clock.now) == Setpoint(64, "drain", 1)
    assert engine.setpoint(clock.now + 3.0) is None


def test_of_two_api_servers_each_takes_the_other_to_let_in_as_many() -> None:
    queue, clock = Queue(most=8, api_servers=2), Clock()
    queue.now(running=64)
    both = [judge(queue, clock) for _ in range(2)]

    assert [sum(a.ask().ticket is not None for _ in range(9)) for a in both] == [4, 4]
    queue.now(waiting=5, arrived_requests=5)
    assert [sum(a.ask().ticket is not None for _ in range(9)) for a in both] == [0, 0]  # 5 wait, 3 are on the way
    queue.now(waiting=0, arrived_requests=8)
    assert [sum(a.ask().ticket is not None for _ in range(9)) for a in both] == [4, 4]


def test_a_free_place_is_no_queue_unless_it_cannot_be_had() -> None:
    queue, clock = Queue(most=0), Clock()
    admission = judge(queue, clock)
    queue.now(running=62)
    assert [admission.ask().ticket is not None for _ in range(3)] == [True, True, False]

    queue.now(arrived_requests=2, waiting=1, last_step_s=0.02, oldest_waiting_s=1.0)  # KV blocks are lacking
    assert admission.ask().ticket is None
    queue.now(arrived_requests=2, waiting=1, last_step_s=0.02, oldest_waiting_s=0.03)
    assert admission.ask().ticket is not None


def test_an_engine_silent_for_long_has_no_queue() -> None:
    queue, clock = Queue(most=1), Clock()
    queue.now(running=64, waiting=9)  # then all were aborted, and no step told of it
    admission = judge(queue, clock)

    assert admission.ask().ticket is None
    clock.now += 5.1
    assert admission.ask().ticket is not None


def test_retry_after_is_the_time_the_queue_takes_at_the_present_pace() -> None:
    queue, clock = Queue(most=10), Clock()
    queue.now(running=64, waiting=10)
    admission = judge(queue, clock)
    told = []
    for _ in range(9):
        told.append(admission.ask().retry_after_s)
        clock.now += 2.0
        queue.now(time_s=clock.now, finished_requests=queue.sample.finished_requests + 1)
    assert told[0] == 1  # no pace is known
    assert told[-1] == 20  # ten wait, one ends every two seconds
    for _ in range(9):
        clock.now += 2.0
        queue.now(time_s=clock.now)
        told.append(admission.ask().retry_after_s)
    assert told[-1] == 60


async def app(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """Streams what it was sent in two parts."""
    body = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
    await send({"type": "http.response.body", "body": body["body"], "more_body": True})
    await send({"type": "http.response.body", "body": b"end"})


def post(served: Any, path: str = "/v1/completions", method: str = "POST", **more: Any) -> Reply:
    """What a client gets."""
    got: Reply = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"hello"}

    async def send(message: dict[str, Any]) -> None:
        got.append(message)

    asyncio.run(served({"type": "http", "path": path, "method": method, **more}, receive, send))
    return got


ANSWER = [
    {"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]},
    {"type": "http.response.body", "body": b"hello", "more_body": True},
    {"type": "http.response.body", "body": b"end"},
]


def full_server() -> tuple[AdmissionMiddleware, Queue]:
    queue, clock = Queue(most=0), Clock()
    queue.now(running=64)
    return AdmissionMiddleware(app, find=lambda: judge(queue, clock), now_s=clock.now_s), queue


def test_a_refused_request_gets_503_retry_after_and_an_openai_error() -> None:
    served, queue = full_server()

    start, body = post(served)

    assert start["status"] == 503
    headers = dict(start["headers"])
    assert int(headers[b"retry-after"]) >= 1
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == len(body["body"])
    error = json.loads(body["body"])["error"]
    assert (error["code"], error["type"], error["param"]) == (503, "Service Unavailable", None)
    assert queue.refused == 1
    assert post(served, "/below/v1/chat/completions", root_path="/below")[0]["status"] == 503


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("POST", "/tokenize"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/chat/completions/render"),
        ("OPTIONS", "/v1/chat/completions"),
        ("GET", "/v1/responses"),
    ],
)
def test_what_does_not_generate_is_never_refused(method: str, path: str) -> None:
    served, queue = full_server()

    assert post(served, path, method) == ANSWER
    assert queue.refused == 0


@pytest.mark.parametrize("path", sorted(GENERATING))
def test_what_generates_is_refused_when_full_and_untouched_otherwise(path: str) -> None:
    served, queue = full_server()
    assert post(served, path)[0]["status"] == 503
    queue.most = 1
    for n in range(3):  # each is answered before the next comes
        assert post(served, path) == ANSWER
        queue.now(arrived_requests=n + 1)
    queue.most = None
    assert post(served, path) == ANSWER


def test_an_app_that_fails_gives_its_place_back() -> None:
    queue, clock = Queue(most=1), Clock()
    queue.now(running=64)

    async def failing(*_: Any) -> None:
        raise RuntimeError("the app's own")

    served = AdmissionMiddleware(failing, find=lambda: judge(queue, clock), now_s=clock.now_s)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="the app's own"):
            post(served)
    assert queue.refused == 0


def test_a_request_turned_down_gives_its_place_back_and_one_whose_client_left_keeps_it() -> None:
    queue, clock = Queue(most=1), Clock()
    queue.now(running=64)

    async def strict(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def left(*_: Any) -> None:
        raise asyncio.CancelledError  # it may be on its way to the engine

    judged = judge(queue, clock)
    served = AdmissionMiddleware(strict, find=lambda: judged, now_s=clock.now_s)
    assert [post(served)[0]["status"] for _ in range(3)] == [400] * 3
    with pytest.raises(asyncio.CancelledError):
        post(AdmissionMiddleware(left, find=lambda: judged, now_s=clock.now_s))
    assert post(served)[0]["status"] == 503


def test_without_a_channel_everybody_is_let_in_and_one_that_comes_later_is_found() -> None:
    queue, clock, found = Queue(most=0), Clock(), list[Admission]()
    queue.now(running=64)
    served = AdmissionMiddleware(app, find=lambda: found[0] if found else None, now_s=clock.now_s)
    assert post(served) == ANSWER

    found.append(judge(queue, clock))
    assert post(served) == ANSWER  # it looks once a second
    clock.now += 1.0
    assert post(served)[0]["status"] == 503


def test_whatever_fails_in_it_is_logged_once_and_requests_pass(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Queue):
        def last(self) -> EngineSample:
            raise OSError("the file is gone")

    def not_found() -> Admission | None:
        raise OSError("no folder")

    clock = Clock()
    for find in (lambda: judge(Broken(), clock), not_found):
        served = AdmissionMiddleware(app, find=find, now_s=clock.now_s)
        for _ in range(3):
            assert post(served) == ANSWER
            clock.now += 2.0
    assert [r.levelname for r in caplog.records] == ["ERROR"] * 2
    assert "requests are let in without it" in caplog.text


def test_an_api_server_finds_its_own_engine_and_no_other(tmp_path: Path) -> None:
    def engine_of(pid: int, name: str) -> None:
        EngineChannel(tmp_path, engine_info(pid), name=name)

    environ = {"PALS_RUN_DIR": str(tmp_path)}
    assert own_engine(environ) is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        engine_of(os.getppid(), "another")  # neither child nor sibling
        assert own_engine(environ) is None
        engine_of(child.pid, "child")
        found = own_engine(environ)
        assert found is not None
        assert found.pids == {child.pid}
        # seen from a sibling of the engine, as with several API servers
        told = subprocess.run(
            [
                sys.executable, "-c",
                "import os; from pals.engines.admission import own_engine; print(*own_engine(os.environ).pids)",
            ],
            env={**os.environ, **environ}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert told.stdout.split() == [str(child.pid)]
    finally:
        child.communicate(b"\n")


def bounded(most_waiting: int, clock: Clock, engine: Engine) -> list[Any]:
    r = rig(clock, [Board(clock)], engine)
    point = OperatingPoint(power_limit_w=300.0, active_sequences=8)

    class Bounds:
        def initial(self) -> None:
            return None

        def step(self, *_: Any) -> tuple[Decision, None]:
            return Decision(point=point, reason="admission", most_waiting=most_waiting), None

    r.controller = Bounds()
    return go(r, clock)


@dataclass
class RefusingEngine(Engine):
    @property
    def info(self) -> EngineInfo:
        return replace(engine_info(launch=self.launch), capabilities={"refuse": True})


def test_the_tick_passes_the_bound_on_and_says_once_where_nobody_refuses() -> None:
    clock = Clock(until_s=102.0)
    engine = Engine(clock)
    records = bounded(5, clock, engine)
    assert engine.most_waiting == 5
    assert [r.guarded.most_waiting for r in records] == [5] * len(records)
    assert [sum("admission control is not available" in n for n in r.notes) for r in records[:3]] == [1, 0, 0]

    clock = Clock(until_s=102.0)
    records = bounded(-3, clock, engine := RefusingEngine(clock))
    assert engine.most_waiting == 0
    assert records[-1].guarded.reason == "guard-waiting"
    assert not any("admission" in n for r in records for n in r.notes)
