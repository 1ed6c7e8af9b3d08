"""The simulated replica: what it must conserve, how it lowers, and that compiled and plain run are one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError, DeviceLostError, PermissionDeniedError
from pals.core.quantities import LATENCY_BOUNDS_S
from pals.engines.model_zoo import shipped_config
from pals.plant.fleet import ROUTERS, FleetSpec, route, simulate
from pals.plant.llm_step import StepModel
from pals.plant.replica import Replica
from pals.plant.specs import BoardSpec, board_specs
from pals.plant.workload import Workload

pytest.importorskip("numba")
SPEC = "a100-sxm4-80gb"
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def olmoe() -> tuple[StepModel, BoardSpec]:
    spec = board_specs()[SPEC]
    shape = ModelShape.from_config(shipped_config("allenai/OLMoE-1B-7B-0924"))
    return StepModel(shape, spec, tensor_parallel=1), spec


def make(**more: Any) -> Replica:
    model, spec = olmoe()
    return Replica(model, spec, **{"boards": 1, "max_num_seqs": 64, "max_num_batched_tokens": 2048, **more})


def load(arrival_s: Any, prompt: Any, output: Any, prefix: Any = None) -> Workload:
    arrival_s = np.asarray(arrival_s, float)

    def fill(values: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, np.int32), arrival_s.shape).copy()

    return Workload(
        name="a test's load",
        arrival_s=arrival_s,
        prompt_tokens=fill(prompt),
        output_tokens=fill(output),
        prefix_tokens=fill(0 if prefix is None else prefix),
    )


def random_load(seed: int, count: int) -> Workload:
    rng = np.random.default_rng(seed)
    prompt = 1 + rng.integers(0, 900, count)
    return load(
        np.cumsum(rng.exponential(0.01, count)), prompt, 1 + rng.integers(0, 90, count), rng.integers(0, prompt)
    )


def bits(replica: Replica) -> tuple[bytes, ...]:
    """Everything the replica remembers but the build that ran it."""
    m = replica._memory
    names = [n for n in m.state.dtype.names or () if n != "build"]
    return tuple(m.state[n].tobytes() for n in names) + tuple(np.asarray(a).tobytes() for a in m[1:])


@FEW
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 60),
    kv_blocks=st.integers(64, 400),
    seqs=st.integers(1, 40),
    batched=st.integers(40, 3000),
    prefix_caching=st.booleans(),
    async_scheduling=st.booleans(),
)
def test_every_request_gets_its_tokens_within_slots_and_memory(
    seed: int, count: int, kv_blocks: int, seqs: int, batched: int, prefix_caching: bool, async_scheduling: bool
) -> None:
    replica = make(kv_blocks=kv_blocks, max_num_seqs=seqs, max_num_batched_tokens=batched,
                   prefix_caching=prefix_caching, async_scheduling=async_scheduling)  # fmt: skip
    work = random_load(seed, count)
    replica.submit(work)
    while not replica.finished:
        replica.advance(replica.now_s + 0.05)
        now = replica.counters()
        assert now.running <= seqs
        assert 0.0 <= now.kv_usage <= 1.0
        # who is sent back with its last token in flight neither runs nor waits until that has come
        assert 0 <= now.arrived_requests - now.finished_requests - (now.running + now.waiting) <= now.preemptions
    now, times = replica.counters(), replica.results()

    assert (now.running, now.waiting, now.kv_usage) == (0, 0, 0.0)
    assert now.output_tokens == work.output_tokens.sum()
    assert now.arrived_prompt_tokens == work.prompt_tokens.sum()
    assert (
        now.prefill_tokens + now.decode_tokens
        >= (work.prompt_tokens + work.output_tokens - 1 - work.prefix_tokens).sum()
    )
    if not prefix_caching and now.preemptions == 0:
        assert now.prefill_tokens == work.prompt_tokens.sum()
        assert now.decode_tokens == (work.output_tokens - 1).sum()
    assert now.preemptions == times.preemptions.sum()
    assert sum(now.ttft_counts) == count
    assert sum(now.tpot_counts) == (work.output_tokens > 1).sum()
    assert np.all(work.arrival_s <= times.scheduled_s)
    assert np.all(times.scheduled_s < times.first_token_s)
    assert np.all((times.first_token_s < times.last_token_s) == (work.output_tokens > 1))
    assert np.all(np.diff(times.scheduled_s) >= 0)  # first come, first served
    free = replica._memory.state[0]
    assert free["queue_put"] - free["queue_taken"] == kv_blocks
    assert (replica._memory.phases == 0).all()
    assert (replica._memory.wheel == -1).all()


@FEW
@given(
    seed=st.integers(0, 10**6), lowering=st.sampled_from(["drain", "time-slice", "preempt"]), limit=st.integers(1, 20)
)
def test_a_lowered_limit_loses_nothing_and_is_obeyed(seed: int, lowering: str, limit: int) -> None:
    replica = make(max_num_seqs=24)
    work = random_load(seed, 60)
    replica.submit(work)
    replica.advance(0.3)
    before = replica.counters()
    replica.set_active_sequences(limit, lowering)
    if before.running == 24 and limit < 24:
        replica.advance(replica.now_s + 0.06)  # the two steps planned before are over
        after = replica.counters()
        if lowering != "drain":
            assert after.scheduled is not None
            assert after.scheduled <= limit
        if lowering == "preempt":
            assert after.running <= limit
        if lowering == "time-slice":
            assert after.preemptions == before.preemptions
    replica.advance(1.0)
    replica.set_active_sequences(None)
    replica.run()

    assert replica.counters().output_tokens == work.output_tokens.sum()
    assert (replica.counters().preemptions > 0) <= (lowering == "preempt")


def test_compiled_and_plain_run_are_equal_bit_for_bit() -> None:
    """Preemption, prefixes, a binding limit, a clock lock, turns: every path of both."""
    work = random_load(3, 80)

    def run(compiled: bool) -> Replica:
        replica = make(kv_blocks=300, max_num_seqs=40, board_seed=5, compiled=compiled, boards=2)
        replica.submit(work)
        replica.set_limit_w(120.0)
        for at_s, limit, lowering in ((0.3, 6, "time-slice"), (0.6, 4, "preempt"), (0.9, 40, "drain")):
            replica.advance(at_s)
            replica.set_active_sequences(limit, lowering)
            replica.set_clock_lock(1005 if limit == 4 else None)
        replica.advance(20.0)
        assert replica.finished
        return replica

    assert bits(run(compiled=True)) == bits(run(compiled=False))


def test_how_often_it_is_looked_at_changes_nothing_that_was_served() -> None:
    seen = []
    for step_s in (10.0, 0.017):
        replica = make(kv_blocks=300)
        replica.submit(random_load(4, 60))
        while replica.now_s < 10.0:
            replica.advance(min(10.0, replica.now_s + step_s))
        seen.append(replica)
    one, two = (r.results() for r in seen)

    np.testing.assert_allclose(one.last_token_s, two.last_token_s, rtol=1e-9)
    np.testing.assert_allclose(seen[0].energy_j(), seen[1].energy_j(), rtol=1e-9)


def test_energy_is_the_integral_of_power_and_a_limit_holds_the_mean() -> None:
    replica = make(boards=2, max_num_seqs=128)
    replica.submit(load(np.zeros(128), 200, 900))
    replica.set_limit_w(110.0)
    replica.advance(2.005)  # amid a tick
    start_j, watts = replica.energy_j(), []
    for k in range(1, 301):
        replica.advance(2.005 + 0.01 * k)
        watts.append(float(replica._memory.boards["power_w"].sum()))
    spent_j = replica.energy_j() - start_j

    assert not replica.finished
    assert spent_j == pytest.approx(sum(watts) * 0.01, rel=1e-6)
    assert spent_j / 3.0 == pytest.approx(220.0, abs=3.0)
    assert all(b.throttled for b in replica.boards())
    assert all(b.enforced_limit_w == 110.0 for b in replica.boards())


def test_a_long_idle_stretch_costs_idle_power_and_no_steps() -> None:
    replica = make(board_seed=1)
    replica.submit(load([1.0, 4000.0], 50, 20))
    replica.advance(3999.0)
    board = replica.boards()[0]
    idle_w = replica._memory.boards["idle_factor"][0] * replica.spec.silicon.idle_w

    assert board.power_instant_w == pytest.approx(idle_w)
    assert board.sm_clock_mhz == replica.spec.min_sm_clock_mhz
    assert replica.energy_j() == pytest.approx(3999.0 * idle_w, rel=0.002)
    steps = replica.counters().steps
    replica.run()
    times = replica.results()
    first, second = times.last_token_s - np.array([1.0, 4000.0])
    assert replica.counters().steps == 2 * steps
    assert second == pytest.approx(first, rel=0.02)  # boards wake at once


def test_slower_clocks_slow_prefill_more_than_decode() -> None:
    def served(mhz: int | None) -> tuple[float, float]:
        replica = make(max_num_batched_tokens=8192)
        replica.set_clock_lock(mhz)
        replica.submit(load([0.0], 8000, 300))
        replica.run()
        times = replica.results()
        return float(times.first_token_s[0]), float(times.last_token_s[0] - times.first_token_s[0])

    fast, slow = served(None), served(705)
    assert slow[0] / fast[0] > 1.2
    assert slow[0] / fast[0] > slow[1] / fast[1] > 1.0


def test_a_limit_set_in_the_middle_of_a_step_slows_that_very_step() -> None:
    def served(**more: Any) -> float:
        replica = make(max_num_seqs=4, max_num_batched_tokens=16384, **more)
        replica.submit(load([0.0], 16000, 1))
        replica.advance(0.005)
        replica.set_clock_lock(600)
        replica.run()
        return float(replica.results().last_token_s[0])

    assert served() > 1.2 * served(pace_when_planned=True)


def test_a_request_that_arrives_in_a_step_waits_for_the_one_planned_behind_it() -> None:
    ttft_s = []
    for async_scheduling in (True, False):
        replica = make(async_scheduling=async_scheduling)
        replica.submit(load([0.0, 0.5], [100, 100], [400, 1]))
        replica.run()
        times = replica.results()
        ttft_s.append(float(times.first_token_s[1] - 0.5))
        step_s = float(times.last_token_s[0] - times.first_token_s[0]) / 399
    assert step_s < ttft_s[0] - ttft_s[1] + 1e-4
    assert ttft_s[0] - ttft_s[1] < 2.2 * step_s


def test_cached_prefixes_are_not_computed_again_in_whole_blocks() -> None:
    replica = make()
    replica.submit(load([0.0, 1.0, 2.0], 100, 5, [0, 40, 100]))
    replica.run()
    assert replica.counters().prefill_tokens == 100 + 68 + 4  # never the whole prompt: its last token gives the first

    without = make(prefix_caching=False)
    without.submit(load([0.0, 1.0, 2.0], 100, 5, [0, 40, 100]))
    without.run()
    assert without.counters().prefill_tokens == 300


def test_the_newest_is_preempted_when_blocks_run_out_and_served_in_full() -> None:
    replica = make(kv_blocks=100, prefix_caching=False)  # 1,600 tokens
    work = load(np.arange(8) * 1e-4, 150, 200)
    replica.submit(work)
    replica.run()
    times = replica.results()

    assert replica.counters().preemptions > 0
    assert times.preemptions[0] == 0
    assert times.preemptions[-1] > 0
    assert replica.counters().output_tokens == 1600
    assert times.last_token_s[0] < times.last_token_s[-1]


def test_a_swapped_model_takes_effect_from_the_next_step_on() -> None:
    model, spec = olmoe()
    slow = StepModel(model.shape, spec, tensor_parallel=1)
    slow.tables = slow.tables._replace(host_s=0.1)
    replica = make()
    replica.submit(load([0.0], 10, 30))
    replica.advance(0.02)
    replica.swap_model(slow)
    replica.run()
    assert replica.now_s > 1.5


def test_latencies_fall_into_the_buckets_the_engine_publishes() -> None:
    replica = make()
    work = random_load(8, 50)
    replica.submit(work)
    replica.run()
    ttft_s = replica.results().first_token_s - work.arrival_s
    expected = np.bincount(np.searchsorted(LATENCY_BOUNDS_S, ttft_s), minlength=len(LATENCY_BOUNDS_S) + 1)
    assert replica.counters().ttft_counts == tuple(expected)


def test_what_never_fits_and_what_is_out_of_order_is_refused_and_nothing_changes() -> None:
    replica = make(kv_blocks=10)
    with pytest.raises(ConfigError, match="needs 11 KV blocks of 16 tokens and the replica has 10"):
        replica.submit(load([0.0], 100, 70))
    replica.submit(load([5.0], 10, 10))
    with pytest.raises(ConfigError, match="in order of arrival, none before 5"):
        replica.submit(load([4.0], 10, 10))
    with pytest.raises(ConfigError, match="at least one prompt"):
        replica.submit(load([6.0], 10, 0))
    with pytest.raises(ValueError, match=r"lies outside 100..400 W .* 400.0 W stays in force"):
        replica.set_limit_w(50.0)
    with pytest.raises(ValueError, match="hibernate"):
        replica.set_active_sequences(3, "hibernate")
    with pytest.raises(ConfigError, match="make it with max_tokens=99999"):
        make(max_num_batched_tokens=99999)
    with pytest.raises(ConfigError, match="at least max_num_seqs"):
        make(max_num_batched_tokens=8)
    replica.run()
    assert replica.counters().finished_requests == 1


def test_requests_can_be_added_while_others_run() -> None:
    whole, parts = make(), make()
    work = random_load(2, 40)
    whole.submit(work)
    half = {f: getattr(work, f) for f in ("arrival_s", "prompt_tokens", "output_tokens", "prefix_tokens")}
    parts.submit(replace(work, **{f: v[:20] for f, v in half.items()}))
    parts.advance(float(work.arrival_s[19]))
    parts.submit(replace(work, **{f: v[20:] for f, v in half.items()}))
    whole.run()
    parts.run()
    np.testing.assert_allclose(whole.results().last_token_s, parts.results().last_token_s, rtol=1e-12)


def test_faults_do_what_they_say_and_end_when_removed() -> None:
    replica = make(boards=2, max_num_seqs=64)
    replica.submit(load(np.zeros(64), 100, 4000))
    replica.advance(2.0)
    free_mhz = replica.board(0).sm_clock_mhz

    replica.inject(0, "external_limit", 150.0)
    replica.advance(4.0)
    held = replica.board(0)
    assert (held.enforced_limit_w, held.requested_limit_w, held.throttled) == (150.0, 400.0, True)
    assert held.power_instant_w == pytest.approx(150.0, abs=5.0)
    replica.inject(0, "external_limit", 0.0)

    replica.inject(1, "thermal")
    replica.advance(5.0)
    assert replica.board(1).sm_clock_mhz <= free_mhz / 2 + 15
    replica.inject(1, "thermal", 0.0)

    replica.advance(6.0)
    replica.inject(1, "dip", 0.5)
    replica.advance(6.2)
    assert replica.board(1).sm_clock_mhz < 0.8 * free_mhz
    assert replica.board(1).throttled
    replica.advance(8.0)
    assert replica.board(1).sm_clock_mhz > 0.95 * free_mhz

    replica.inject(0, "stuck")
    frozen = replica.board(0)
    replica.advance(9.0)
    assert replica.board(0).energy_j == frozen.energy_j
    assert replica.board(1).energy_j > frozen.energy_j
    replica.inject(0, "stuck", 0.0)
    assert replica.board(0).energy_j > frozen.energy_j

    replica.inject(0, "slow_setter", 2.0)
    replica.set_limit_w(120.0)
    replica.advance(10.5)
    assert not replica.board(0).throttled
    assert replica.board(1).throttled
    replica.advance(12.0)
    assert replica.board(0).throttled


def test_a_lost_board_has_no_readings_and_the_others_are_still_set() -> None:
    replica = make(boards=2)
    replica.inject(1, "lost")
    with pytest.raises(DeviceLostError, match="board 1 is lost"):
        replica.boards()
    with pytest.raises(DeviceLostError, match="the others of its replica were written"):
        replica.set_limit_w(200.0)
    assert replica.board(0).requested_limit_w == 200.0
    replica.inject(1, "lost", 0.0)
    replica.inject(0, "denied")
    with pytest.raises(PermissionDeniedError, match="board 0: the driver refused"):
        replica.set_clock_lock(900)
    assert replica.boards()[0].requested_limit_w == 200.0
    with pytest.raises(ValueError, match="unknown fault 'gremlin'; known: lost"):
        replica.inject(0, "gremlin")
    with pytest.raises(ValueError, match="not a number of at least 0"):
        replica.inject(0, "ambient", float("nan"))


def fleet_of(replicas: int, **more: Any) -> FleetSpec:
    model, spec = olmoe()
    engine = {"max_num_seqs": 32, "max_num_batched_tokens": 2048}
    return FleetSpec(
        model=model, spec=spec, replicas=replicas, boards=1, power_period_s=1.0, **{"engine": engine, **more}
    )


@pytest.mark.parametrize("router", ROUTERS)
def test_a_fleet_serves_every_request_once_whatever_the_router(router: str) -> None:
    work = random_load(5, 200)
    result = simulate(fleet_of(3), work, router=router, until_s=10.0, seed=4)

    assert not np.isnan(result.times.last_token_s).any()
    assert set(result.replica) == {0, 1, 2}
    np.testing.assert_allclose(result.power_w.sum(axis=1) * 1.0, result.energy_j)
    np.testing.assert_allclose(result.node_power_w, 1.05 * result.power_w.sum(axis=0) + 345.0)


def test_a_fleet_of_one_is_its_replica_and_least_outstanding_evens_out_long_requests() -> None:
    work = random_load(5, 60)
    alone = make(max_num_seqs=32)
    alone.submit(work)
    alone.advance(10.0)
    fleet = simulate(fleet_of(1), work, router="round-robin", until_s=10.0)
    np.testing.assert_allclose(fleet.times.last_token_s, alone.results().last_token_s, rtol=1e-12)

    long_first = load(np.zeros(4), [1600, 10, 10, 10], 5)
    assert list(route(long_first, fleet_of(2), "least-outstanding")) == [0, 1, 1, 1]
    with pytest.raises(ConfigError, match="unknown router 'sticky'"):
        route(work, fleet_of(2), "sticky")


def test_a_fleet_is_bit_identical_for_any_number_of_workers() -> None:
    work = random_load(6, 120)
    one, two = (simulate(fleet_of(3), work, router="least-outstanding", until_s=5.0, workers=w) for w in (1, 2))
    assert one.times.last_token_s.tobytes() == two.times.last_token_s.tobytes()
    assert one.power_w.tobytes() == two.power_w.tobytes()
