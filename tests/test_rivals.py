"""bandit, slo-clock and vendor-preset: each owns its lever alone, does what its source says, and replays exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.control.bandit import BanditPolicy, BanditSettings
from pals.control.guard import Guard
from pals.control.policies import KNOWN, UNPROFILED, build_policy, default_settings
from pals.control.slo_clock import SloClockPolicy
from pals.control.vendor_preset import preset_of
from pals.core.errors import ConfigError
from pals.core.protocols import AnyController
from pals.core.quantities import LATENCY_BOUNDS_S, Budget, Decision, EngineSample, Slo, TelemetrySample
from pals.runtime.config import POLICIES, Config, ControlConfig, check_complete
from tests.profile_world import clock_profile, profile
from tests.worlds import BUCKETS, board_info, engine_sample

GUARD = Guard.of([board_info(i) for i in range(4)], launch_sequences=64)
TOP_MHZ, FOUND_W, LAUNCH = 1410, 400.0, 64
NO_BUDGET = Budget()
EASY = Slo(ttft_p95_s=60.0, tpot_p95_s=10.0)


@dataclass
class Engine:
    """A memory-bound engine: steps slow down where the clock falls, power falls faster; counters as an engine tells them."""

    running: int = 16
    waiting: int = 0
    prompt: int = 1200
    output: int = 225
    noise: float = 0.02
    seed: int = 0
    memory_s: float = 0.020
    core_s: float = 0.010  # of a step, at the top clock
    sample: EngineSample = field(default_factory=lambda: engine_sample(running=16))
    time_s: float = 0.0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._tokens = 0.0

    def step_s(self, mhz: int | None) -> float:
        return self.memory_s + self.core_s * TOP_MHZ / (mhz or TOP_MHZ)

    def power_w(self, mhz: int | None) -> float:
        return 300.0 + 900.0 * ((mhz or TOP_MHZ) / TOP_MHZ) ** 3

    def edp(self, mhz: int | None) -> float:
        return self.power_w(mhz) * self.step_s(mhz) ** 2

    def run(self, mhz: int | None, seconds: float = 0.5) -> TelemetrySample:
        """The sample at the end of a period at this clock."""
        self.time_s += seconds
        steps = seconds / self.step_s(mhz)
        self._tokens += steps * self.running
        ended = int(self._tokens / self.output)
        s = self.sample
        new = ended - s.finished_requests

        def counted(counts: tuple[int, ...], value_s: float) -> tuple[int, ...]:
            at = int(np.searchsorted(LATENCY_BOUNDS_S, value_s))
            return tuple(c + new * (i == at) for i, c in enumerate(counts))

        self.sample = replace(
            s, time_s=self.time_s, steps=s.steps + max(1, round(steps)), running=self.running, waiting=self.waiting,
            finished_requests=ended, arrived_requests=ended, output_tokens=int(self._tokens), decode_tokens=int(self._tokens),
            prefill_tokens=ended * self.prompt, arrived_prompt_tokens=ended * self.prompt, busy_s=s.busy_s + seconds,
            ttft_counts=counted(s.ttft_counts, 10.0 * self.step_s(mhz)), tpot_counts=counted(s.tpot_counts, self.step_s(mhz)),
        )  # fmt: skip
        power_w = self.power_w(mhz) * float(np.exp(self.noise * self._rng.standard_normal()))
        return TelemetrySample(time_s=self.time_s, window_s=seconds, boards=(), power_w=power_w, engine=self.sample)


def drive(
    policy: AnyController,
    engine: Engine,
    periods: int,
    slo: Slo = EASY,
    change: Callable[[int, Engine], None] | None = None,
) -> list[Decision]:
    """The policy's decisions, each in force for the next period."""
    state, mhz, out = policy.initial(), None, []
    for i in range(periods):
        if change is not None:
            change(i, engine)
        decision, state = policy.step(state, engine.run(mhz), NO_BUDGET, slo, engine.time_s)
        mhz = GUARD.check(decision, NO_BUDGET).point.sm_clock_mhz
        out.append(decision)
    return out


@cache
def slo_clock() -> AnyController:
    return SloClockPolicy(clock_profile().model(), GUARD)


@pytest.mark.parametrize("name", ["vendor-preset", "bandit", "slo-clock"])
@given(
    samples=st.lists(
        st.tuples(st.integers(0, 64), st.integers(0, 200), st.floats(0, 3000), st.one_of(st.none(), st.floats(0, 1600))),
        min_size=1, max_size=15,
    ),
    target_s=st.one_of(st.none(), st.floats(1e-4, 10.0)),
)  # fmt: skip
@settings(deadline=None, max_examples=15)  # the first one fits a profile
def test_whatever_is_seen_only_the_owned_lever_moves_and_the_wish_lies_in_range(
    name: str, samples: list[tuple[int, int, float, float | None]], target_s: float | None
) -> None:
    policy = slo_clock() if name == "slo-clock" else build_policy(name, default_settings(name), None, GUARD)
    state, tokens = policy.initial(), 0.0
    for i, (running, waiting, rate, power_w) in enumerate(samples):
        tokens += 0.5 * rate
        engine = replace(
            engine_sample(0.5 * i, tokens=int(tokens), running=running, waiting=waiting), steps=25 * i, busy_s=0.5 * i
        )
        sample = TelemetrySample(time_s=0.5 * i, window_s=0.5, boards=(), power_w=power_w, engine=engine)
        slo = Slo(ttft_p95_s=target_s, tpot_p99_s=target_s)
        decision, state = policy.step(state, sample, NO_BUDGET, slo, 0.5 * i)
        point = decision.point
        assert point.active_sequences == LAUNCH
        assert point.sm_clock_mhz is None or point.sm_clock_mhz in GUARD.sm_clocks_mhz
        if name == "vendor-preset":
            assert (point.power_limit_w, point.sm_clock_mhz) == (257.0, None)
        else:
            assert point.power_limit_w == FOUND_W
        assert GUARD.check(decision, NO_BUDGET).point == point


@pytest.mark.parametrize("name", ["bandit", "slo-clock"])
def test_the_same_samples_give_the_same_decisions_and_no_telemetry_is_borne(name: str) -> None:
    policy = slo_clock() if name == "slo-clock" else BanditPolicy(GUARD)
    one, two = (drive(policy, Engine(seed=4), 400) for _ in range(2))
    blind = TelemetrySample(time_s=0.0, window_s=0.5, boards=(), power_w=None, engine=None)

    assert one == two
    assert policy.step(policy.initial(), blind, NO_BUDGET, EASY, 0.0)[0].point.sm_clock_mhz is None


def test_the_bandit_finds_a_clock_whose_energy_delay_product_is_nearly_the_least() -> None:
    for seed in range(3):
        engine = Engine(seed=seed)
        late = Counter(d.point.sm_clock_mhz for d in drive(BanditPolicy(GUARD), engine, 2000)[1200:])
        least = min(engine.edp(mhz) for mhz in BanditPolicy(GUARD).clocks)

        chosen = late.most_common(1)[0][0]
        assert engine.edp(chosen) <= 1.03 * least
        assert engine.edp(chosen) < 0.9 * engine.edp(None)
        assert late.most_common(1)[0][1] > 600


def test_the_bandits_comparison_is_not_misled_by_load() -> None:
    """Load that swings makes rounds differ far more than clocks do."""

    def swing(i: int, engine: Engine) -> None:
        engine.running = 4 if (i // 30) % 2 else 60

    engine = Engine(seed=1)
    late = drive(BanditPolicy(GUARD), engine, 3000, change=swing)[2000:]
    mean_edp = sum(engine.edp(d.point.sm_clock_mhz) for d in late) / len(late)

    assert mean_edp <= 1.06 * min(engine.edp(mhz) for mhz in BanditPolicy(GUARD).clocks)


def test_the_bandit_explores_from_high_clocks_to_low_and_prunes_the_slow_ones_together() -> None:
    policy = BanditPolicy(GUARD, BanditSettings(alpha=20.0))  # so curious that bad arms are tried again
    engine = Engine(core_s=0.06, memory_s=0.0)  # all in the core: slow clocks are a loss
    state, mhz, order = policy.initial(), None, list[int]()
    for _ in range(1500):
        decision, state = policy.step(state, engine.run(mhz), NO_BUDGET, EASY, engine.time_s)
        mhz = decision.point.sm_clock_mhz
        if decision.reason == "explore" and mhz is not None and mhz not in order:
            order.append(mhz)

    assert order == sorted(order, reverse=True)
    pruned = [a.mhz for a in state.arms if a.pruned]
    assert pruned
    slow = [mhz for mhz in pruned if mhz is not None and mhz < TOP_MHZ / 2]
    assert slow == [a.mhz for a in state.arms if a.mhz is not None and a.mhz <= max(slow)]
    assert not state.arms[0].pruned


def test_the_bandit_leaves_a_clock_that_misses_targets_at_once_and_in_the_long_run() -> None:
    slo = Slo(tpot_p95_s=0.035)  # kept at 940 MHz and above; the energy-delay product alone would go lower
    engine, free = Engine(core_s=0.010), Engine(core_s=0.010)
    energy = BanditSettings(delay_weight=0.0)
    decisions = drive(BanditPolicy(GUARD, energy), engine, 2000, slo)
    without = drive(BanditPolicy(GUARD, energy), free, 2000)

    late = [d.point.sm_clock_mhz or TOP_MHZ for d in decisions[1200:]]
    assert min(d.point.sm_clock_mhz or TOP_MHZ for d in without[1800:]) < 900
    assert sum(mhz < 900 for mhz in late) < 0.1 * len(late)
    recovered = [d for d in decisions if d.reason == "slo-recovery"]
    assert recovered
    assert all(d.point.sm_clock_mhz is None for d in recovered)


def test_a_bandit_without_clocks_or_work_changes_nothing() -> None:
    bare = replace(GUARD, sm_clocks_mhz=())
    assert {d.point.sm_clock_mhz for d in drive(BanditPolicy(bare), Engine(), 100)} == {None}

    idle = [d.point.sm_clock_mhz for d in drive(BanditPolicy(GUARD), Engine(running=0), 100)]
    assert set(idle) == {None}


def predicted_s(name: str, mhz: int, running: int) -> float:
    """What the profile says of a clock, seconds."""
    from pals.core.load import Load
    from pals.core.quantities import OperatingPoint
    from pals.models.observed import OBSERVED

    model = clock_profile().model()
    point = OperatingPoint(power_limit_w=FOUND_W, sm_clock_mhz=mhz, active_sequences=LAUNCH)
    told = model.told([point], Load(mix=model.mixes[0], running=running))
    return float(np.exp(told[OBSERVED.index(name), 0]))


def decided_mhz(slo: Slo, *, running: int = 16, waiting: int = 0) -> int | None:
    """What slo-clock locks on its first sight of such a load."""
    engine = Engine(running=running, waiting=waiting)
    return drive(slo_clock(), engine, 1, slo)[0].point.sm_clock_mhz


@pytest.mark.parametrize(("quantity", "target"), [("tpot_p95_s", "tpot_p95_s"), ("ttft_p95_s", "ttft_p95_s")])
def test_slo_clock_takes_the_lowest_clock_predicted_to_meet_the_target(quantity: str, target: str) -> None:
    target_s = predicted_s(quantity, 1110, 16)
    mhz = decided_mhz(Slo(**{target: 1.005 * target_s}))

    assert mhz is not None
    assert abs(mhz - 1110) <= 45  # the load is rounded to five per cent
    lower = GUARD.sm_clocks_mhz[GUARD.sm_clocks_mhz.index(mhz) - 6]
    assert predicted_s(quantity, lower, 16) > target_s


def test_slo_clock_rises_with_load_and_with_tighter_targets_and_gives_up_locking_where_nothing_helps() -> None:
    slo = Slo(tpot_p95_s=predicted_s("tpot_p95_s", 1005, 24), ttft_p95_s=30.0)
    by_load = [decided_mhz(slo, running=n) or TOP_MHZ + 1 for n in (1, 8, 24, 40, 64)]
    tight = [
        decided_mhz(Slo(tpot_p95_s=f * (slo.tpot_p95_s or 0.0)), running=24) or TOP_MHZ + 1
        for f in (2.0, 1.0, 0.9, 0.1)
    ]

    assert by_load == sorted(by_load)
    assert by_load[0] < by_load[-1]
    assert tight == sorted(tight)
    assert tight[-1] == TOP_MHZ + 1
    assert decided_mhz(Slo(tpot_p99_s=0.1 * (slo.tpot_p95_s or 0.0)), running=24) is None


def test_slo_clock_counts_a_queue_against_the_first_token() -> None:
    slo = Slo(ttft_p95_s=2.0 * predicted_s("ttft_p95_s", 810, 40))
    calm, queued = decided_mhz(slo, running=40), decided_mhz(slo, running=40, waiting=20)

    assert calm is not None
    assert queued is None or queued > calm
    assert decided_mhz(slo, running=64, waiting=500) is None


def test_slo_clocks_feedback_raises_the_clock_while_targets_are_missed_and_lets_go_when_calm() -> None:
    """An engine slower than its profile, then one as fast."""
    target_s = predicted_s("tpot_p95_s", 900, 16)
    slow = 1.4 * target_s
    engine = Engine(memory_s=slow, core_s=0.0)

    def heal(i: int, engine: Engine) -> None:
        if i == 200:
            engine.memory_s = 0.4 * target_s

    decisions = drive(slo_clock(), engine, 1200, Slo(tpot_p95_s=target_s), change=heal)
    mhz = [d.point.sm_clock_mhz or TOP_MHZ + 1 for d in decisions]

    assert mhz[195] > mhz[5] + 200
    assert decisions[195].reason == "slo-feedback"
    assert mhz[-1] < mhz[195] - 200
    assert decisions[-1].reason == "slo-clock"
    assert mhz[100:195] == sorted(mhz[100:195])


def test_presets_are_those_published_for_the_board_and_borrowed_elsewhere() -> None:
    known = {
        "NVIDIA A100-SXM4-80GB": (400.0, 275.0), "NVIDIA A100 80GB PCIe": (300.0, 200.0), "NVIDIA H100 80GB HBM3": (700.0, 450.0),
        "NVIDIA H100 NVL": (400.0, 350.0), "NVIDIA H100 PCIe": (350.0, 200.0), "NVIDIA H200": (700.0, 500.0),
    }  # fmt: skip
    for board, (default_w, limit_w) in known.items():
        found_w, source = preset_of(board, default_w)
        assert found_w == limit_w
        assert "MLPerf" in source
    assert preset_of("NVIDIA B200", 1000.0) == (643.0, "nothing published for NVIDIA B200; the share of an H100")


def test_a_preset_stays_within_what_was_found() -> None:
    boards = [replace(board_info(found_w=250.0), name="NVIDIA A100-SXM4-80GB")]
    policy = build_policy("vendor-preset", {}, None, Guard.of(boards, 64))
    decision, _ = policy.step(policy.initial(), Engine().run(None), NO_BUDGET, Slo(), 0.0)

    assert decision.point.power_limit_w == 250.0
    assert decision.reason == "vendor-preset"
    assert "MLPerf v3.0" in decision.detail


def test_each_policy_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match=r"no rows of these boards' SM clocks.*pals profile --clocks"):
        build_policy("slo-clock", default_settings("slo-clock"), profile(), GUARD)
    with pytest.raises(ConfigError, match="policy slo-clock needs a profile"):
        build_policy("slo-clock", {}, None, GUARD)
    with pytest.raises(
        ConfigError, match=r"slo-clock steers by latency targets: give --slo-ttft-p95 or --slo-tpot-p95"
    ):
        check_complete(Config(control=ControlConfig(policy="slo-clock"), slo=Slo(throughput_tokens_s=100.0)))
    with pytest.raises(ConfigError, match="cap-only steers by a throughput target"):
        check_complete(Config(control=ControlConfig(policy="cap-only"), slo=EASY))
    for policy in UNPROFILED:
        check_complete(Config(control=ControlConfig(policy=policy)))
        build_policy(policy, default_settings(policy), None, GUARD)
    check_complete(Config(control=ControlConfig(policy="slo-clock"), slo=Slo(tpot_p99_s=0.1)))
    assert set(KNOWN) <= set(POLICIES)
    assert len(LATENCY_BOUNDS_S) + 1 == BUCKETS
