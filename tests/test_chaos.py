"""Processes of a loaded node are killed, stopped and terminated at random instants; each time the boards go where was promised."""

from __future__ import annotations

import itertools
import math
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.chaos_world import TTL_S, Node, Scene, accepted, answered, node, of_folder, scene

pytest.importorskip("vllm")
pytest.importorskip("pynvml")
PARTS = ("engine", "api", "agent", "capd")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
PROMISED_S = TTL_S + 1.0
BUDGET_W, SAFE_W = 560.0, 220.0
ON_THE_WAY_S = 0.2  # a request sent so shortly before a signal may come after it
STUCK_S = 5.0
SETTLED_S = 0.3  # the promised state has held for so long: the next fault may come


class Fault(NamedTuple):
    """One signal to one process."""

    part: str
    number: signal.Signals

    @property
    def ends_engine(self) -> bool:
        """Whether vLLM has to be started again."""
        return self.part in ("engine", "api") and self.number != signal.SIGSTOP

    def __str__(self) -> str:
        return f"{self.part} {self.number.name}"


SINGLE = [(Fault(p, n),) for p in PARTS for n in SIGNALS]
PAIRS = [(Fault(a, m), Fault(b, n)) for a, b in itertools.combinations(PARTS, 2) for m in SIGNALS for n in SIGNALS]
ALL: list[tuple[Fault, ...]] = [*SINGLE, *PAIRS]
SPARING = [c for c in ALL if not any(f.ends_engine for f in c)]
ENDING = [c for c in ALL if any(f.ends_engine for f in c)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one case: from the last of its faults until the boards stood where promised, for good."""

    faults: tuple[Fault, ...]
    agent: str
    budget: bool
    settled_s: float
    last_bad: str = ""  # how the boards stood just before
    problems: tuple[str, ...] = ()
    lost: int = 0  # requests accepted and not answered
    took_s: float = 0.0  # all of the case, restarts too

    def __str__(self) -> str:
        names = " + ".join(map(str, self.faults))
        where = "budget" if self.budget else "as found"
        return f"{names:32} {self.agent:8} {where:9} {self.settled_s:5.2f} s  (case {self.took_s:.1f} s, {self.lost} cut){''.join(f'  WRONG: {p}' for p in self.problems)}{self.last_bad}"


def strike(world: Scene, faults: Sequence[Fault], agent: str, rng: random.Random) -> Outcome:
    """Signals at random instants, those that were stopped go on later, all that died is started again; then judge."""
    began_s = time.monotonic()
    world.ready()
    vllm = world.node.pids()  # one of them may take the other with it
    stopped, down_s, ended_s = dict[int, float](), None, None
    for fault in rng.sample(list(faults), len(faults)):
        time.sleep(rng.uniform(0.0, 0.3))
        pid = vllm[fault.part] if fault.part in vllm else world.pid_of(fault.part)
        world.signal_safely(pid, fault.number)
        struck_s = time.monotonic()
        ended_s = struck_s if fault.ends_engine and ended_s is None else ended_s
        if fault.number == signal.SIGSTOP:
            stopped[pid] = struck_s + rng.choice([rng.uniform(0.2, 0.9), PROMISED_S + 0.2])
        if fault.part == "agent" and stopped.get(pid, struck_s + 9.0) - struck_s > PROMISED_S:
            down_s = struck_s  # for so long that nobody's lease can be alive at the end
    over_s = rest(world, struck_s, stopped, agent_down=down_s is not None)
    problems, lost = recover(world, faults, ended_s)
    late_s, last_bad = settled_s(world, struck_s, over_s, agent_down=down_s is not None)
    return Outcome(
        faults=tuple(faults), agent=agent, budget=world.budget_w is not None, lost=lost, problems=tuple(problems),
        settled_s=late_s, last_bad=last_bad if late_s > PROMISED_S else "",
        took_s=time.monotonic() - began_s,
    )  # fmt: skip


def rest(world: Scene, struck_s: float, stopped: dict[int, float], *, agent_down: bool) -> float:
    """Let those that are stopped go on in time; the moment until which a dead agent was dead."""
    over_s, held_s = struck_s, 0.0
    while stopped or (held_s < SETTLED_S and time.monotonic() < struck_s + PROMISED_S + 0.5):
        time.sleep(0.02)
        for pid in [p for p, at_s in stopped.items() if time.monotonic() >= at_s]:
            over_s = time.monotonic() if agent_down and world.agent and pid == world.agent.pid else over_s
            del stopped[pid]
            world.signal_safely(pid, signal.SIGCONT)
        wanted = world.exit_state if agent_down else world.promised
        seen = world.since(struck_s)
        bad_s = [k.time_s for k in seen if not wanted(k)]
        held_s = seen[-1].time_s - max([struck_s, *bad_s]) if seen else 0.0
    return time.monotonic() if over_s == struck_s else over_s


def settled_s(world: Scene, struck_s: float, over_s: float, *, agent_down: bool) -> tuple[float, str]:
    """When the boards were first seen to stand where promised for good, after the last fault, and how they stood before."""
    late_s, last_bad, bad = 0.0, "", False
    for look in world.since(struck_s):
        wanted = world.exit_state if agent_down and look.time_s < over_s else world.promised
        late_s = look.time_s - struck_s if bad else late_s
        bad = not wanted(look)
        last_bad = f" {look}" if bad else last_bad
    return (math.inf if bad else late_s), last_bad


def recover(world: Scene, faults: Sequence[Fault], ended_s: float | None) -> tuple[list[str], int]:
    """Start again what died; what went wrong with requests and ends, and how many requests died with their engine."""
    problems, lost = list[str](), 0
    if world.agent is not None and any(f.part == "agent" and f.number != signal.SIGSTOP for f in faults):
        world.agent.wait(20)
    if ended_s is not None:
        results, wrong = world.node.gone(in_order=False)
        problems += [wrong] if wrong else []
        cut = [r for r in results if accepted(r) and not answered(r)]
        lost = len(cut)
        drained = not any(f.ends_engine and f != Fault("api", signal.SIGTERM) for f in faults)
        problems += [f"cut: {r.error}" for r in cut if drained and r.sent_s < ended_s - ON_THE_WAY_S]
        problems += [f"cut before: {r.error}" for r in cut if r.last_token_s and r.last_token_s < ended_s - STUCK_S]
    world.ready()
    assert world.node.load is not None
    world.node.load.wait_answered(2)
    return problems, lost


def product_agent(world: Scene, watts: float) -> list[str]:
    """`pals agent`, steering through capd; under a budget it tells capd of one of its own, too."""
    options = ["--policy", "static", "--power-limit-w", str(watts), "--sm-clock-mhz", "1005", "--metrics-port", "0"]
    budget = [] if world.budget_w is None else ["--budget", str(world.budget_w - 20.0)]
    return [sys.executable, "-m", "pals.cli", "agent", "--writer", "capd", "--period-s", "0.3", *options, *budget]


def hostile_client(world: Scene, seed: int) -> list[str]:
    """A client that leases other watts each time, and misbehaves in between."""
    high_w = 390.0 if world.budget_w is None else world.budget_w / world.node.bank.count
    script = str(Path(__file__).with_name("leasing_client.py"))
    return [sys.executable, "-S", script, str(world.manager.socket), "120", str(high_w), str(seed), "--hostile"]


def play(on: Node, cases: Sequence[tuple[Fault, ...]], seed: int) -> tuple[list[Outcome], list[str]]:
    """All cases, half of them under a budget, half of each with the product's agent; what must hold all the time is judged too."""
    rng, half, outcomes, problems = random.Random(seed), len(cases) // 2, list[Outcome](), list[str]()
    for budget_w, part in ((None, cases[:half]), (BUDGET_W, cases[half:])):
        with scene(on, budget_w=budget_w, safe_w=SAFE_W) as world:
            for i, case in enumerate(part):
                product = i < len(part) // 2
                world.steer_with(product_agent(world, 200.0) if product else hostile_client(world, seed))
                outcomes.append(strike(world, case, "pals" if product else "hostile", rng))
                print(outcomes[-1], flush=True)
            problems += judge_scene(world)
    return outcomes, problems


def judge_scene(world: Scene) -> list[str]:
    """What is wrong at the end of a scene: boards not at their exit policy, budget or limits not kept, log, things left."""
    world.close()
    limits_w, locks = world.node.look()[:2]
    lives, checked = world.manager.lives, world.audit_check()
    print(
        f"{len(lives)} lives of capd, {sum(x.by_watchdog for x in lives)} ended by the watchdog; audit: {checked.stdout.strip()[-60:]}"
    )
    wrong = {
        f"boards at {limits_w} {locks} in the end": limits_w != (world.exit_w,) * len(limits_w)
        or set(locks) != {world.node.unlocked},
        f"over the budget: {world.over_budget()[:1]}": bool(world.over_budget()),
        f"above their limits: {world.above_limit()[:3]}": bool(world.above_limit()),
        f"capd-release failed: {world.manager.log()[-800:]}": {x.release_code for x in lives} != {0},
        f"audit: {checked.stdout[-800:]}{checked.stderr[-800:]}": checked.returncode != 0,
        f"left: {left_by(world)}": left_by(world) != {"state.json", "audit.jsonl", "lock"},
    }
    return [told for told, is_so in wrong.items() if is_so]


def left_by(world: Scene) -> set[str]:
    """Files of a capd that has ended."""
    sockets = {world.manager.socket.name} if world.manager.socket.exists() else set()
    return {p.name for p in world.manager.state.iterdir()} | sockets


def judge_end(on: Node) -> list[str]:
    """The server ends in order: what was not answered, and what of all that ran is left."""
    results, wrong = on.gone(in_order=True)
    cut = [r.error for r in results if accepted(r) and not answered(r)]
    left = sorted(p.name for p in on.folder.rglob("*") if not p.name.endswith((".log", ".jsonl")))
    return [
        *([wrong] if wrong else []),
        *([f"cut: {cut[:5]}"] if cut else []),
        *([f"still runs: {of_folder(on.folder)}"] if of_folder(on.folder) else []),
        *([f"left: {left}"] if left != ["emulated-boards.bank", "emulated-boards.owners"] else []),  # this test's own
    ]


def judge_outcomes(outcomes: Sequence[Outcome], problems: Sequence[str], seconds: float) -> None:
    """Print the worst of each kind of fault; all within what is promised."""
    worst = defaultdict[str, list[float]](list)
    for o in outcomes:
        worst[" + ".join(sorted(map(str, o.faults)))].append(o.settled_s)
    for name, took in sorted(worst.items(), key=lambda kv: -max(kv[1])):
        print(f"{max(took):5.2f} s worst of {len(took):2}  {name}")
    print(f"{len(outcomes)} cases in {seconds:.0f} s; worst {max(o.settled_s for o in outcomes):.2f} s")
    late = [str(o) for o in outcomes if o.settled_s > PROMISED_S or o.problems]
    print(*problems, sep="\n")
    assert [*late, *problems] == []


def drawn(cases: Sequence[tuple[Fault, ...]], count: int, seed: int) -> list[tuple[Fault, ...]]:
    """Cases in random order, each as often as the others."""
    rng, found = random.Random(seed), list[tuple[Fault, ...]]()
    while len(found) < count:
        found += rng.sample(list(cases), len(cases))
    return found[:count]


def chaos(cases: Sequence[tuple[Fault, ...]], cache: str, seed: int) -> None:
    """Play and judge."""
    began_s = time.monotonic()
    with node(cache) as on:
        outcomes, problems = play(on, cases, seed)
        problems += judge_end(on)
        print("engine starts:", [f"{s:.0f} s" for s in on.starts_s])
    judge_outcomes(outcomes, problems, time.monotonic() - began_s)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where model folders and the C library are built."""
    return str(tmp_path_factory.mktemp("cache"))


def test_twenty_faults_that_leave_the_engine_alive(cache: str) -> None:
    chaos(drawn(SPARING, 20, seed=20), cache, seed=20)


@pytest.mark.slow
def test_every_fault_that_leaves_the_engine_alive_many_times(cache: str) -> None:
    chaos(drawn(SPARING, 164, seed=164), cache, seed=164)


@pytest.mark.slow
def test_every_fault_that_ends_the_engine(cache: str) -> None:
    chaos(drawn(ENDING, 36, seed=36), cache, seed=36)
