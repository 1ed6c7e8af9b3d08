"""Emulated boards that outlive every server, real vLLM under load on them, capd under a service manager, and a judge who looks on.

The judge trusts two things: the boards' own registers, and the leases that a living capd tells.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pals.cli.emulate_nvml import environment
from pals.engines.openai_client import RequestResult, RequestSpec, complete, open_session, token_ids
from pals.hardware.nvml_double.build import library
from pals.plant.boards import BoardBank
from pals.runtime.channel import find_engines
from pals.runtime.processes import process_alive
from tests.emulated_node import BOARDS, boards_in
from tests.service_manager import ServiceManager
from tests.test_emulated_engine import MODEL, Server, start

TTL_S = 1.0
LOOK_S = 0.04
ANSWER_S = 0.5  # a capd that does not answer for so long is taken for one that hangs
SAME_W = 1.0
ACTS_S = 0.5  # a limit acts so long after it was written, at most
CLOCK_STEP_MHZ = 15
CLIENTS = 12
GIVEN_UP = "the client gave up"


class Boards(NamedTuple):
    """What the boards' registers hold at one moment, of all boards."""

    limits_w: tuple[float, ...]
    locks_mhz: tuple[tuple[float, float], ...]
    energy_j: tuple[float, ...]  # as drawn, without the counter's error
    time_s: float  # of the energy


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The boards at one moment, and what capd told of their leases just then; None: it did not answer."""

    time_s: float
    boards: Boards
    starved_s: float  # the judge slept so much longer than it wanted: others had the machine
    leases: tuple[dict[str, Any] | None, ...] | None


@dataclass
class Node:
    """Boards and engine; the bank belongs to this process, so that it outlives every server."""

    folder: Path
    cache: str
    bank: BoardBank
    bank_path: Path
    server: Server | None = None
    load: Load | None = None
    starts_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unlocked = self._locks()[0]
        self.found_w = self.bank.reading(0, time.monotonic()).requested_limit_w

    def serve(self) -> None:
        """Start vLLM and its load, if they do not run."""
        if self.server is not None:
            return
        began_s = time.monotonic()
        self.server = start(self.folder, "--no-agent", boards=BOARDS, XDG_CACHE_HOME=self.cache)
        self.server.wait_for("serving")
        self.starts_s.append(time.monotonic() - began_s)
        self.load = Load(self.server.url)
        self.load.wait_answered(1)

    def pids(self) -> dict[str, int]:
        """Process ids of the engine core and of vLLM's API server."""
        core = find_engines(self.folder)[0].info.pid
        return {"engine": core, "api": os.getsid(core)}

    def gone(self, *, in_order: bool) -> tuple[list[RequestResult], str]:
        """The server ended, or is stopped in order now; the load's results once nothing of it is left, and what was wrong."""
        assert self.server is not None
        assert self.load is not None
        process, load, self.server, self.load = self.server.process, self.load, None, None
        results = load.finish(give_up_s=8.0)
        if in_order:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            kill_left(self.folder, only_session_of=process.pid)
            return results, "the server did not end within 30 s"
        return results, ""

    def look(self) -> Boards:
        """Limits, clock locks and energy as the boards have them; the sensor of this board sees 25 ms in 100 ms only."""
        with self.bank._locked(time.monotonic()):
            limits_w = tuple(float(w) for w in self.bank._boards["limit_w"])
            energy_j = tuple(float(e) for e in self.bank._boards["energy_j"])
            return Boards(limits_w, self._locks(), energy_j, float(self.bank._sections.clockwork[0]["time_s"]))

    def _locks(self) -> tuple[tuple[float, float], ...]:
        b = self.bank._boards  # a lock has no getter in NVML, and the bank offers none
        return tuple((float(lo), float(hi)) for lo, hi in zip(b["lock_lo_mhz"], b["lock_hi_mhz"], strict=True))


@contextmanager
def node(cache: str) -> Iterator[Node]:
    """Boards at their default limits in a run directory of their own; at the end nothing of it may be left."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with boards_in(folder) as (bank, path):
        try:
            yield Node(folder, cache, bank, path)
        finally:
            kill_left(folder)


class Load:
    """Clients that each send the next request as soon as the one before is answered, in a thread."""

    def __init__(self, url: str) -> None:
        self.results: list[RequestResult] = []
        self._give_up_s = math.inf
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(url)), name="load", daemon=True)
        self._thread.start()

    async def _run(self, url: str) -> None:
        import aiohttp

        rng = np.random.default_rng(5)
        async with open_session(aiohttp) as session:

            async def one_client() -> None:
                while not self._over.is_set():
                    spec = RequestSpec(at_s=0.0, prompt_tokens=200, output_tokens=int(rng.integers(40, 160)))
                    sent_s = time.monotonic()
                    try:
                        result = await complete(session, url, MODEL, spec, token_ids(spec.prompt_tokens, rng))
                    except asyncio.CancelledError:
                        result = RequestResult(spec=spec, sent_s=sent_s, error=GIVEN_UP)
                    self.results.append(result)
                    if result.error is not None:
                        await asyncio.sleep(0.05)

            clients = [asyncio.create_task(one_client()) for _ in range(CLIENTS)]
            while not all(c.done() for c in clients):
                if self._over.is_set() and time.monotonic() > self._give_up_s:
                    [c.cancel() for c in clients]
                await asyncio.sleep(0.05)

    def wait_answered(self, count: int) -> None:
        """Wait until so many more requests are answered."""
        wanted, end_s = sum(r.error is None for r in self.results) + count, time.monotonic() + 30
        while sum(r.error is None for r in list(self.results)) < wanted:
            assert time.monotonic() < end_s, [r.error for r in self.results[-5:]]
            time.sleep(0.02)

    def finish(self, give_up_s: float) -> list[RequestResult]:
        """Send nothing more; all results once the last is there, or its client has waited so long in vain."""
        self._give_up_s = time.monotonic() + give_up_s
        self._over.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.results


def accepted(r: RequestResult) -> bool:
    """Whether the server had said 200, or nothing at all."""
    after = ("in the", "the stream", "ClientPayload", GIVEN_UP)
    return r.error is None or r.first_token_s is not None or r.error.startswith(after)


def answered(r: RequestResult) -> bool:
    """Whether every token asked for came."""
    return r.error is None and r.output_tokens == r.spec.output_tokens


@dataclass
class Scene:
    """One capd under its service manager on a node's boards, the agent that steers through it, and the judge."""

    node: Node
    manager: ServiceManager
    exit_w: float  # where boards stand without a lease
    budget_w: float | None
    agent_command: Sequence[str] = ()
    agent: subprocess.Popen[bytes] | None = None
    looks: list[Look] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._judge, name="judge", daemon=True)
        self._thread.start()

    # --- who runs ---

    def pid_of(self, who: str) -> int:
        """The capd or agent of now."""
        if who == "capd":
            self.manager.wait_ready()
            assert self.manager.pid is not None
            return self.manager.pid
        assert who == "agent"
        assert self.agent is not None
        return self.agent.pid

    def steer_with(self, command: Sequence[str]) -> None:
        """End the agent where it is another one; `ready` starts this one."""
        if list(self.agent_command) != list(command):
            self.end_agent()
        self.agent_command = command

    def end_agent(self) -> None:
        """Stop the agent in order."""
        if self.agent is not None:
            self.agent.terminate()
            self.agent.wait(20)
            self.agent = None

    def ready(self) -> None:
        """Everybody who died is started again, and every board has a live lease."""
        self.node.serve()
        self.manager.wait_ready()
        if self.agent is None or self.agent.poll() is not None:
            with (self.node.folder / "agent.log").open("ab") as log:
                self.agent = subprocess.Popen(
                    list(self.agent_command), env=self.environ, stdout=log, stderr=log, start_new_session=True
                )
        self.wait(lambda look: self.leased(look), 20.0, "no lease after everybody was started")

    @property
    def environ(self) -> dict[str, str]:
        """Of an agent."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PALS_")}
        return {**kept, "PALS_RUN_DIR": str(self.node.folder), "PALS_CAPD_SOCKET": str(self.manager.socket)}

    def signal_safely(self, pid: int, number: int) -> None:
        """Send it; a process is not left stopped while it holds the lock of the emulated boards' file, as no driver's is."""
        for _ in range(50):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            if number != signal.SIGSTOP or self._boards_free():
                return
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.003)
        raise AssertionError(f"process {pid} cannot be stopped outside the boards' lock")

    def _boards_free(self) -> bool:
        with self.node.bank_path.open("rb") as f:
            for _ in range(20):
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    time.sleep(0.003)
        return False

    # --- what the judge sees ---

    def exit_state(self, look: Look) -> bool:
        """Whether every board stands where it must without a lease."""
        return all(self._at_exit(look, i) for i in range(len(look.boards.limits_w)))

    def leased(self, look: Look) -> bool:
        """Whether every board is leased, and stands no higher than that."""
        return look.leases is not None and all(self._at_lease(look, i) for i in range(len(look.boards.limits_w)))

    def promised(self, look: Look) -> bool:
        """Whether every board stands at its exit policy or within a live lease."""
        return all(self._at_exit(look, i) or self._at_lease(look, i) for i in range(len(look.boards.limits_w)))

    def _at_exit(self, look: Look, i: int) -> bool:
        return abs(look.boards.limits_w[i] - self.exit_w) < SAME_W and look.boards.locks_mhz[i] == self.node.unlocked

    def _at_lease(self, look: Look, i: int) -> bool:
        lease = None if look.leases is None else look.leases[i]
        if lease is None or lease["expires_s"] <= 0:
            return False
        clocks, (low, high) = lease["sm_clock_mhz"], look.boards.locks_mhz[i]
        within = clocks is None or high <= clocks[1] + CLOCK_STEP_MHZ
        unlocked = (low, high) == self.node.unlocked
        return (
            look.boards.limits_w[i] <= (lease["watts"] or self.exit_w) + SAME_W
            and within
            and (clocks is not None or unlocked)
        )

    def wait(self, wanted: Any, timeout_s: float, told: str) -> float:
        """Wait for a look at which something is so; its time."""
        seen, end_s = len(self.looks), time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            for look in self.looks[seen:]:
                seen += 1
                if wanted(look):
                    return look.time_s
            time.sleep(0.01)
        agent_log = (self.node.folder / "agent.log").read_text()[-1500:]
        raise AssertionError(f"{told}: {self.looks[-1]}\n{self.manager.log()[-1500:]}\n{agent_log}")

    def _judge(self) -> None:
        began_s = time.monotonic()
        while not self._over.wait(LOOK_S):
            starved_s = max(0.0, time.monotonic() - began_s - 1.5 * LOOK_S)
            before = self.node.look()
            leases = self._leases()
            seen = self.node.look()
            if seen[:2] == before[:2]:  # else leases and boards are of different moments
                self.looks.append(Look(time_s=time.monotonic(), boards=seen, leases=leases, starved_s=starved_s))
            began_s = time.monotonic()

    def _leases(self) -> tuple[dict[str, Any] | None, ...] | None:
        """As capd tells them; None where it does not answer at once."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(ANSWER_S)
            try:
                s.connect(str(self.manager.socket))
                s.sendall(b'{"op":"read"}\n')
                with s.makefile("rb") as answers:
                    told = json.loads(answers.readline())
            except (OSError, ValueError):
                return None
        by_uuid = {b["uuid"]: b["lease"] for b in told["boards"]}
        return tuple(by_uuid[self.node.bank.uuid(i)] for i in range(self.node.bank.count))

    def close(self) -> None:
        """Stop agent, capd and judge, in this order."""
        self.end_agent()
        self.manager.close()
        self._over.set()
        self._thread.join(10)

    def since(self, time_s: float) -> list[Look]:
        """What was seen later than this."""
        looks = self.looks  # only ever grows
        return looks[bisect.bisect_right(looks, time_s, key=lambda k: k.time_s) :]

    # --- what must hold all the time ---

    def over_budget(self) -> list[Look]:
        """Moments at which the limits together exceeded the budget."""
        budget_w = self.budget_w
        return [] if budget_w is None else [k for k in self.looks if sum(k.boards.limits_w) > budget_w + SAME_W]

    def above_limit(self) -> list[tuple[float, float]]:
        """Mean power over a second, and the highest limit in it and shortly before, where the limit was not kept."""
        found, first = list[tuple[float, float]](), 0
        for last, look in enumerate(self.looks):
            while look.boards.time_s - self.looks[first + 1].boards.time_s > 1.0 and first + 1 < last:
                first += 1
            span_s = look.boards.time_s - self.looks[first].boards.time_s
            window = [k for k in self.looks[max(0, first - 50) : last + 1] if k.time_s > look.time_s - span_s - ACTS_S]
            for b, (end_j, start_j) in enumerate(
                zip(look.boards.energy_j, self.looks[first].boards.energy_j, strict=True)
            ):
                highest_w = max(k.boards.limits_w[b] for k in window)
                if span_s > 1.0 and (end_j - start_j) / span_s > self._kept_w(highest_w):
                    found.append(((end_j - start_j) / span_s, highest_w))
        return found

    def _kept_w(self, limit_w: float) -> float:
        """The most a second's mean may be under a limit: firmware's clamp is soft by 3 %, and reacts to a burst in 50 ms at most.

        Both as measured on boards, see docs/models/boards.md; an engine that is stopped and goes on makes such a burst.
        """
        return max(1.03 * limit_w, limit_w + 0.05 * (self.node.found_w - limit_w))

    def audit_check(self) -> subprocess.CompletedProcess[str]:
        """`pals-capd audit --check`."""
        command = [sys.executable, "-m", "pals_capd.main", "audit", "--check", "--state", str(self.manager.state)]
        return subprocess.run(command, capture_output=True, text=True, env=self.environ, check=False)


@contextmanager
def scene(on: Node, *, budget_w: float | None, safe_w: float) -> Iterator[Scene]:
    """capd on the node's boards, as found or under a budget."""
    folder = Path(tempfile.mkdtemp(prefix="capd-"))
    policy = folder / "capd.toml"
    budget = "" if budget_w is None else f"budget_w = {budget_w}\nsafe_w = {safe_w}\n"
    policy.write_text(f"[node]\nttl_s = {TTL_S}\nmax_ttl_s = {TTL_S}\n{budget}")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PALS_")}
    seen = environment(library(Path(on.cache) / "pals" / "nvml", os.environ), on.bank_path, kept)
    manager = ServiceManager(folder, {**kept, **seen, "PALS_RUN_DIR": str(on.folder)}, policy, folder / "state")
    manager.wait_ready()
    made = Scene(on, manager, on.found_w if budget_w is None else safe_w, budget_w)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


def of_folder(folder: Path) -> list[int]:
    """Living processes that were started with this run directory."""
    mark, found = f"PALS_RUN_DIR={folder}".encode(), []
    for proc in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if proc.name.isdigit() and mark in (proc / "environ").read_bytes().split(b"\0"):
                found.append(int(proc.name))
    return [pid for pid in found if process_alive(pid)]


def kill_left(folder: Path, only_session_of: int | None = None) -> None:
    """After something went wrong: what still runs with this run directory, or a server and its vLLM."""
    for pid in of_folder(folder):
        with contextlib.suppress(ProcessLookupError, OSError):
            words = (Path("/proc") / str(pid) / "cmdline").read_bytes()
            if only_session_of is None or pid == only_session_of or b"vllm" in words.lower():
                os.kill(pid, signal.SIGKILL)
