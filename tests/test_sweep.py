"""The sweep measures what the plant does, discards what its meters missed, goes on where it was stopped, keeps its budgets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pals.core.errors import ConfigError, NotSupportedError, PermissionDeniedError, ProfileMismatchError
from pals.core.load import Mix
from pals.core.quantities import OperatingPoint, PowerSample, fingerprint_of
from pals.engines.model_zoo import read_config
from pals.experiments.simulated_node import SimulatedBoard
from pals.experiments.simulated_profile import (
    ProfiledReplica,
    SimulatedSweep,
    facts_of,
    measured_truth,
    plan_of,
    profiled_replica,
    simulated_sweep,
)
from pals.experiments.simulated_run import EMPTY, Simulation
from pals.models.row import ProfileRow
from pals.plant.specs import parse_boards
from pals.profiler.design import Candidate
from pals.profiler.load import Latencies
from pals.profiler.partial import PartialRows
from pals.profiler.plan import SweepPlan
from pals.profiler.repeats import is_at
from pals.profiler.sweep import Interrupted, Progress, sweep
from pals.profiler.visit import Visited, Visitor
from pals.profiler.window import Window, fault_of, row_of
from pals.runtime.loop import GridClock
from tests.linear_model import linear_fit
from tests.worlds import engine_sample, telemetry

pytest.importorskip("numba")
CHAT = Mix(name="chat", prompt_tokens=400, output_tokens=100)
FULL = Candidate(OperatingPoint(power_limit_w=700.0, active_sequences=32), 0)


def simulation(model: str = "llama-3.1-8b", boards: str = "h100-sxm5-80gb", *, launch: int = 32) -> Simulation:
    spec, count = parse_boards(boards)
    name, config = read_config(model)
    return Simulation(
        model=name, config=config, spec=spec, boards=count, max_num_seqs=launch, max_num_batched_tokens=8192,
        prefix_caching=True, board_seed=0, context_tokens=8192, workload=EMPTY,
    )  # fmt: skip


SIM = simulation()
PLAN = SweepPlan(
    mixes=(CHAT,), limits_w=(200.0, 400.0, 700.0), sequences=(4, 32), clocks_mhz=(1005,), points=9, error=1e-6
)


class World:
    """A replica under a sweep, with things that happen at a time of its clock."""

    def __init__(self, sim: Simulation = SIM, plan: SweepPlan = PLAN) -> None:
        self.sim, self.plan = sim, plan
        self.node: ProfiledReplica = profiled_replica(sim, np.random.default_rng(1))
        self.due: list[tuple[float, Callable[[], None]]] = []
        self.stop_s = float("inf")
        self.told: list[Progress] = []

    def clock(self) -> GridClock:
        def wait(seconds: float) -> bool:
            while self.due and self.due[0][0] <= self.node.replica.now_s:
                self.due.pop(0)[1]()
            self.node.clock.wait(seconds)
            return self.node.replica.now_s >= self.stop_s

        return GridClock(now_s=self.node.clock.now_s, wait=wait)

    def visit(self, wanted: Candidate = FULL) -> Visited:
        visitor = Visitor(
            self.node.rig, self.node.engine, self.plan, load=self.node.load, facts=facts_of(self.sim), clock=self.clock(),
            begun_s=0.0,
        )  # fmt: skip
        return visitor.measure(wanted, until_s=1e9)

    def sweep(self, path: Path) -> list[ProfileRow]:
        facts, boards = facts_of(self.sim), [m.info for m in self.node.rig.meters]
        partial = PartialRows(path, fingerprint_of(self.sim.engine, boards), facts, self.plan.mixes)
        return sweep(
            self.node.rig, self.plan, load=self.node.load, facts=facts, partial=partial, clock=self.clock(), fit=linear_fit,
            progress=self.told.append,
        )  # fmt: skip


@pytest.fixture(scope="module")
def default() -> SimulatedSweep:
    return simulated_sweep(simulation(launch=64), fit=linear_fit)


def test_rows_hold_what_the_plant_does() -> None:
    world = World()
    replica = world.node.replica
    world.visit()  # warm
    before_j, before, since_s = replica.energy_j(), replica.counters(), replica.now_s

    row = world.visit().row

    assert row is not None
    passed_s, now = replica.now_s - since_s, replica.counters()
    assert row.power_w == pytest.approx((replica.energy_j() - before_j) / passed_s, rel=0.03)
    assert row.tokens_per_s == pytest.approx((now.output_tokens - before.output_tokens) / passed_s, rel=0.05)
    assert row.prefill_tokens_per_s / row.tokens_per_s == pytest.approx(CHAT.prefill_per_output, rel=0.05)
    assert row.running == pytest.approx(32.0, abs=0.5)
    assert row.steps_per_s * 32 == pytest.approx(row.tokens_per_s, rel=0.02)  # each sequence gets a token each step
    assert row.tpot_p50_s == pytest.approx(1 / row.steps_per_s, rel=0.05)
    assert row.ttft_p50_s is not None
    assert row.tpot_p95_s is not None
    assert row.ttft_p50_s > 0.5 / row.steps_per_s
    assert row.temperature_c is not None


def test_limits_bind_and_locks_hold_in_the_rows() -> None:
    points = [
        OperatingPoint(power_limit_w=700.0),
        OperatingPoint(power_limit_w=300.0),
        OperatingPoint(power_limit_w=700.0, sm_clock_mhz=1005),
    ]
    natural, capped, locked = measured_truth(SIM, points, CHAT)

    assert natural.power_w > 350.0
    assert capped.power_w == pytest.approx(300.0, rel=0.03)
    assert locked.sm_clock_mhz == 1005
    assert (locked.sm_clock_lock_mhz, natural.sm_clock_lock_mhz) == (1005, None)
    assert natural.tokens_per_s > max(capped.tokens_per_s, locked.tokens_per_s)
    assert [r.active_sequences for r in (natural, capped, locked)] == [32, 32, 32]
    assert [r.power_w for r in measured_truth(SIM, points, CHAT)] == [natural.power_w, capped.power_w, locked.power_w]


@pytest.mark.parametrize(
    ("model", "boards", "launch"),
    [
        ("deepseek-v3", "8xh200-sxm5-141gb", 256),
        ("mixtral-8x7b", "4xa100-sxm4-80gb", 64),
        ("gpt2", "h100-sxm5-80gb", 64),
    ],
)
def test_a_default_sweep_takes_less_than_twenty_minutes_of_the_engine(model: str, boards: str, launch: int) -> None:
    done = simulated_sweep(simulation(model, boards, launch=launch), fit=linear_fit)

    assert done.event_s < 20 * 60
    assert 25 <= len(done.rows) <= 40
    assert {r.mix for r in done.rows} == {0, 1, 2}


def test_a_default_sweep_sees_floor_natural_draw_and_every_lever(default: SimulatedSweep) -> None:
    plan = plan_of(simulation(launch=64))
    levels = {(r.power_limit_w, r.sm_clock_lock_mhz, r.active_sequences) for r in default.rows if r.mix == 0}

    assert len(default.rows) == 40
    assert {(200.0, None, 64), (700.0, None, 64), (700.0, min(plan.clocks_mhz), 64), (700.0, None, 1)} <= levels
    natural_w = next(r.power_w for r in default.rows if r.power_limit_w == 700.0 and r.active_sequences == 64)
    assert max(w for w in plan.limits_w if w < 0.97 * natural_w) in {
        w for w, mhz, n in levels if (mhz, n) == (None, 64)
    }
    assert default.event_s < 20 * 60
    assert all(r.window_s <= plan.longest_window_s + 1.0 for r in default.rows)


def test_the_progress_tells_rows_error_time_and_drift(default: SimulatedSweep) -> None:
    told = default.told

    assert [t.rows for t in told] == list(range(41))
    assert told[0].error is None
    errors = [t.error for t in told if t.error is not None]
    assert errors[-1] < 0.2 * errors[0]
    left = [t.seconds_left for t in told]
    assert left == sorted(left, reverse=True)
    assert told[-1].drift is not None
    assert told[-1].drift.points >= 4
    assert told[-1].drift.power == pytest.approx(1.0, abs=0.02)  # the plant does not change; its boards warm up
    assert told[-1].drift.temperature_k is not None


def test_the_same_seed_makes_the_same_sweep() -> None:
    one, two = (simulated_sweep(SIM, fit=linear_fit, plan=PLAN, seed=3).rows for _ in range(2))

    assert one == two
    assert one != simulated_sweep(SIM, fit=linear_fit, plan=PLAN, seed=4).rows


def test_levels_given_by_the_user_are_the_only_ones_visited(tmp_path: Path) -> None:
    rows = World().sweep(tmp_path / "p.jsonl")

    assert len(rows) == 9  # eight points, of which one was measured again
    assert {r.power_limit_w for r in rows} == {200.0, 400.0, 700.0}
    assert {r.active_sequences for r in rows} == {4, 32}
    assert {r.sm_clock_lock_mhz for r in rows} == {None, 1005}


def test_the_time_budget_is_kept_and_the_error_asked_for_ends_the_sweep(tmp_path: Path) -> None:
    short = World(plan=replace(PLAN, seconds=70.0))
    rows = short.sweep(tmp_path / "short.jsonl")
    assert 1 < len(rows) < 9
    assert short.node.replica.now_s <= 75.0

    assert len(World(plan=replace(PLAN, error=10.0)).sweep(tmp_path / "coarse.jsonl")) < 9


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, first = tmp_path / "p.jsonl", World()
    first.stop_s = 60.0
    with pytest.raises(Interrupted):
        first.sweep(path)
    kept = path.read_text()
    measured = first.told[-1].rows
    assert 1 <= measured < 9

    second = World()
    rows = second.sweep(path)

    assert path.read_text().startswith(kept)
    assert [t.rows for t in second.told] == list(range(measured, 10))
    assert len({(r.point, r.mix) for r in rows}) == 8
    assert [r.at_s for r in rows] == sorted(r.at_s for r in rows)
    assert World().sweep(path) == rows  # nothing is left to do


def test_a_line_cut_off_in_its_write_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = World().sweep(path)
    path.write_text(path.read_text()[:-20])

    again = World().sweep(path)

    assert again[:-1] == rows[:-1]
    assert len(again) == len(rows)
    assert len(path.read_text().splitlines()) == 10


def test_rows_of_another_engine_or_load_are_left_alone(tmp_path: Path) -> None:
    path, facts = tmp_path / "p.jsonl", facts_of(SIM)
    fingerprint = fingerprint_of(SIM.engine, [m.info for m in World().node.rig.meters])
    PartialRows(path, fingerprint, facts, [CHAT])
    before = path.read_text()

    with pytest.raises(ProfileMismatchError, match=r"(?s)left alone:.*model: "):
        PartialRows(path, replace(fingerprint, model="another"), facts, [CHAT])
    with pytest.raises(ProfileMismatchError, match="step_tokens: 8192 before, 2048 now"):
        PartialRows(path, fingerprint, replace(facts, step_tokens=2048), [CHAT])
    with pytest.raises(ProfileMismatchError, match="mixes: "):
        PartialRows(path, fingerprint, facts, [CHAT, replace(CHAT, name="more", output_tokens=7)])
    assert path.read_text() == before
    for rubbish in ("rubbish\n", "", "[]\n", '{"fingerprint": 1}\n', before + "{}\n", before + '{"power": \n'):
        path.write_text(rubbish)
        with pytest.raises(ConfigError, match="damaged"):
            PartialRows(path, fingerprint, facts, [CHAT])
        assert path.read_text() == rubbish


def test_a_window_in_which_a_counter_stood_still_is_measured_again() -> None:
    world = World()
    replica = world.node.replica
    world.due = [(6.0, lambda: replica.inject(0, "stuck", 1.0)), (16.0, lambda: replica.inject(0, "stuck", 0.0))]

    visited = world.visit()

    assert visited.row is not None
    assert replica.now_s > 16.0
    assert any("stood still" in note for note in visited.notes)


def test_a_board_that_is_lost_for_good_ends_the_sweep_and_keeps_the_rows(tmp_path: Path) -> None:
    world, path = World(), tmp_path / "p.jsonl"
    world.due = [(30.0, lambda: world.node.replica.inject(0, "lost", 1.0))]

    with pytest.raises(ConfigError, match=r"3 points in a row could not be measured: .*lost.* rows so far are kept"):
        world.sweep(path)

    assert len(path.read_text().splitlines()) > 1
    assert [t.row for t in world.told[-3:]] == [None] * 3


def test_an_engine_that_no_request_reaches_is_said_at_the_first_point(tmp_path: Path) -> None:
    class Nobody:
        def set_load(self, mix: Mix, in_flight: int) -> None:
            pass

        def latencies(self, since_s: float) -> Latencies:
            return Latencies()

    world = World()
    facts, boards = facts_of(SIM), [m.info for m in world.node.rig.meters]
    partial = PartialRows(tmp_path / "p.jsonl", fingerprint_of(SIM.engine, boards), facts, PLAN.mixes)

    with pytest.raises(ConfigError, match=r"1 point in a row .*took no step.*does the load reach"):
        sweep(
            world.node.rig, PLAN, load=Nobody(), facts=facts, partial=partial, clock=world.clock(), fit=linear_fit,
            progress=world.told.append,
        )  # fmt: skip


def test_a_limit_that_another_hand_lowers_is_what_the_row_tells(tmp_path: Path) -> None:
    world = World()
    world.due = [(6.0, lambda: world.node.replica.inject(0, "external_limit", 350.0))]

    visited = world.visit()

    assert visited.row is not None
    assert visited.row.power_limit_w == 350.0
    assert any("350 W was in force, not the 700 W accepted" in note for note in visited.notes)
    rows = world.sweep(tmp_path / "p.jsonl")  # and the sweep neither hangs nor believes in 700 W
    assert {r.power_limit_w for r in rows} == {200.0, 350.0}
    assert len({(r.point, r.mix) for r in rows}) == 6  # 200 and 350 W, and the lock, each with two batches


def test_a_lock_that_was_lost_in_the_window_is_set_and_measured_again() -> None:
    world = World()
    world.due = [(6.0, lambda: world.node.replica.set_clock_lock(None))]

    visited = world.visit(Candidate(OperatingPoint(power_limit_w=700.0, sm_clock_mhz=1005, active_sequences=32), 0))

    assert visited.row is not None
    assert visited.row.sm_clock_mhz == 1005
    assert any("lock at 1005 MHz was lost" in note for note in visited.notes)


class NoLocks(SimulatedBoard):
    """A board whose driver has no clock locks."""

    def apply(self, wanted: OperatingPoint) -> OperatingPoint:
        accepted = super().apply(replace(wanted, sm_clock_mhz=None))
        if wanted.sm_clock_mhz is not None:
            raise NotSupportedError(f"no clock lock here; {accepted.power_limit_w:.0f} W is in force.")
        return accepted


def test_boards_without_clock_locks_are_swept_by_limits_alone(tmp_path: Path) -> None:
    world = World()
    board = world.node.rig.meters[0]
    assert isinstance(board, SimulatedBoard)
    lockless = NoLocks(board._group, 0)
    world.node.rig.meters, world.node.rig.actuators = [lockless], [lockless]

    rows = world.sweep(tmp_path / "p.jsonl")

    assert {r.sm_clock_lock_mhz for r in rows} == {None}
    assert len({r.point for r in rows}) == 6
    assert sum("no clock lock" in note for t in world.told for note in t.notes) >= 1


def test_a_board_that_may_not_be_written_ends_the_sweep(tmp_path: Path) -> None:
    world = World()
    world.node.replica.inject(0, "denied", 1.0)
    with pytest.raises(PermissionDeniedError):
        world.sweep(tmp_path / "p.jsonl")

    world.node.rig.actuators = []
    with pytest.raises(ConfigError, match="nothing was changed"):
        world.sweep(tmp_path / "q.jsonl")


def test_where_the_kv_cache_is_short_the_rows_tell_what_ran_and_larger_batches_are_left_alone(tmp_path: Path) -> None:
    long = Mix(name="long", prompt_tokens=3000, output_tokens=300)
    sim = simulation("llama-2-7b", "a100-sxm4-80gb", launch=128)
    world = World(sim, SweepPlan(mixes=(long,), limits_w=(300.0, 400.0), sequences=(4, 16, 64, 128), points=8))

    rows = world.sweep(tmp_path / "p.jsonl")

    starved = [r for r in rows if r.active_sequences > 1.3 * r.running]
    assert starved
    assert starved[0].running > 8
    assert {r.active_sequences for r in rows[len(starved) + 1 :]} <= {4, 16}
    assert any("find no room" in note for t in world.told for note in t.notes)


def test_a_batch_much_smaller_than_the_one_before_is_no_sign_of_a_full_cache() -> None:
    sim = simulation("mixtral-8x7b", "4xa100-sxm4-80gb", launch=64)
    node, mix = profiled_replica(sim, np.random.default_rng(2)), Mix(name="chat", prompt_tokens=1200, output_tokens=225)
    plan = replace(PLAN, mixes=(mix,), limits_w=(400.0,))
    visitor = Visitor(node.rig, node.engine, plan, load=node.load, facts=facts_of(sim), clock=node.clock, begun_s=0.0)

    def measured(n: int) -> ProfileRow | None:
        point = OperatingPoint(power_limit_w=400.0, sm_clock_mhz=570, active_sequences=n)
        return visitor.measure(Candidate(point, 0), until_s=1e9).row

    rows = [measured(64)]
    node.load.set_load(mix, 72)  # some wait when the batch is lowered, and then run one after the other
    node.clock.wait(1.0)
    rows += [measured(1), measured(64)]

    assert [r is not None and round(r.running / r.active_sequences, 1) for r in rows] == [1.0, 1.0, 1.0]


def test_ctrl_c_reaches_a_simulated_sweep_through_its_stop() -> None:
    stop = threading.Event()

    def told(so_far: Progress) -> None:
        if so_far.rows == 2:
            stop.set()

    with pytest.raises(Interrupted):
        simulated_sweep(SIM, fit=linear_fit, plan=PLAN, progress=told, stop=stop.is_set)


def board_reading(time_s: float, *, energy_j: float | None = None, limit_w: float = 400.0) -> PowerSample:
    return PowerSample(
        time_s=time_s, power_w=300.0, energy_j=300.0 * time_s if energy_j is None else energy_j,
        enforced_limit_w=limit_w, sm_clock_mhz=1400, temperature_c=50.0,
    )  # fmt: skip


def window(**changed: object) -> Window:
    """Ten seconds, all well."""
    samples = []
    for t in range(11):
        engine = replace(engine_sample(100.0 + t, tokens=100 * t, running=8), steps=10 * t, finished_requests=t)
        samples.append(replace(telemetry(100.0 + t), boards=(board_reading(float(t)),), engine=engine))
    whole = Window(
        point=OperatingPoint(power_limit_w=400.0, active_sequences=8), mix=0, samples=samples,
        latencies=Latencies(ttft_s=[0.1] * 19, tpot_s=[0.02] * 20), whole_requests=True, at_s=111.0,
    )  # fmt: skip
    return replace(whole, **changed)  # type: ignore[arg-type]


def test_a_window_becomes_a_row_of_means_and_leaves_out_tails_of_too_few_requests() -> None:
    row = row_of(window())

    assert fault_of(window()) is None
    assert (row.power_w, row.tokens_per_s, row.steps_per_s, row.running) == (300.0, 100.0, 10.0, 8.0)
    assert (row.ttft_p95_s, row.tpot_p95_s, row.tpot_p50_s) == (None, 0.02, 0.02)
    assert (row.at_s, row.window_s, row.temperature_c) == (111.0, 10.0, 50.0)
    assert is_at(row, OperatingPoint(power_limit_w=400.0, active_sequences=8), 0)
    assert row_of(window(whole_requests=False)).tpot_p95_s is None
    assert row_of(window(ranks=2)).steps_per_s == 5.0


def test_each_fault_of_a_window_is_told() -> None:
    def with_boards(make: Callable[[int], PowerSample]) -> Window:
        samples = window().samples
        return window(samples=[replace(s, boards=(make(t),)) for t, s in enumerate(samples)])

    still = with_boards(lambda t: board_reading(float(t), energy_j=300.0 * min(t, 5)))
    fallen = with_boards(lambda t: board_reading(float(t), energy_j=300.0 * (t % 7)))
    moved = with_boards(lambda t: board_reading(float(t), limit_w=400.0 if t < 5 else 350.0))
    assert "stood still for 5.0 s" in str(fault_of(still))
    assert "backwards" in str(fault_of(fallen))
    assert "350 W was in force" in str(fault_of(moved))
    absent = [replace(s, absent=(0,), boards=()) for s in window().samples]
    assert "could not be read" in str(fault_of(window(samples=absent)))
    stalled = [replace(s, engine=window().samples[0].engine) for s in window().samples]
    assert "no step for more than 5 s" in str(fault_of(window(samples=stalled)))
    silent = [replace(s, engine=replace(s.engine, output_tokens=7)) for s in window().samples if s.engine is not None]
    assert "no token came out" in str(fault_of(window(samples=silent)))
    assert "9 of 19 requests failed" in str(fault_of(window(latencies=Latencies(failed=9))))
    without = with_boards(lambda t: replace(board_reading(float(t)), energy_j=None))
    assert fault_of(without) is None
    assert row_of(without).power_w == 300.0
