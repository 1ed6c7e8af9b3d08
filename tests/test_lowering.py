"""Three ways under a lowered limit, over vLLM's real async scheduler: when each bites, and that nothing is lost or changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from benchmarks.scheduler_harness import Driver, block_hasher, engine_config, greedy, make_scheduler, request

from pals.core.architecture import ModelShape
from pals.core.quantities import LOWERINGS
from pals.engines.emulated_device import EmulatedDevice
from pals.plant.boards import BoardBank
from pals.plant.llm_step import StepModel
from pals.plant.specs import board_specs
from pals.runtime.channel import AgentChannel, EngineChannel
from tests.worlds import engine_info

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")
Make = Callable[..., tuple[Driver, AgentChannel]]
AT_ONCE = ("time-slice", "preempt")


@pytest.fixture(scope="module")
def config(olmoe: Path) -> Any:
    return engine_config(olmoe, max_num_seqs=64)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A driver over a composed scheduler, and the agent's end of its channel."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from pals.engines.vllm_plugin import EngineLink, compose

    made = 0

    def build(
        config: Any, base: type = AsyncScheduler, run: Callable[[Any], Any] | None = None, **more: Any
    ) -> tuple[Driver, AgentChannel]:
        nonlocal made
        made += 1
        channel = EngineChannel(tmp_path, engine_info(os.getpid(), launch=64), name=f"vllm-{made}")

        class Linked(compose(base)):  # type: ignore[misc]
            def _pals_link(self) -> EngineLink:
                return EngineLink(self, channel)

        return Driver(make_scheduler(Linked, config, **more), run), AgentChannel(channel.path)

    return build


def load(driver: Driver, count: int, *, prompt: int = 40, output: int = 60, **more: Any) -> dict[str, list[int]]:
    """Add `count` requests; return what each must be given."""
    wanted = {f"r{i}": output + i % 7 for i in range(count)}
    for rid, tokens in wanted.items():
        driver.add(request(rid, prompt=prompt, output=tokens, **more))
    return {rid: [greedy(rid, n + 1) for n in range(tokens)] for rid, tokens in wanted.items()}


def steps(driver: Driver, count: int) -> list[dict[str, int]]:
    """Run `count` steps; return what each scheduled."""
    for _ in range(count):
        driver.step()
    return driver.plans[-count:]


@pytest.mark.parametrize("runner_v2", [False, True])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_64_8_64_gives_every_request_exactly_the_tokens_of_an_undisturbed_run(
    make: Make, config: Any, lowering: str, runner_v2: bool
) -> None:
    driver, agent = make(config)
    driver.scheduler.use_v2_model_runner = (
        runner_v2  # other rules for resumed requests; without Triton V1 is the default
    )
    expected = load(driver, 150)
    steps(driver, 20)
    assert driver.running_history[-1] == 64

    agent.apply(8, lease_s=60.0, lowering=lowering)
    steps(driver, 40)
    assert agent.read().active_limit == 8
    assert agent.read().lowering == lowering
    agent.apply(64, lease_s=60.0, lowering=lowering)
    steps(driver, 6)
    assert driver.running_history[-1] == 64
    driver.drain()

    assert driver.finished == set(expected)
    assert driver.outputs == expected
    assert driver.scheduler._pals is not None
    assert (agent.read().preemptions > 0) == (lowering == "preempt")


@pytest.mark.parametrize("lowering", AT_ONCE)
def test_the_very_next_step_has_no_more_than_the_new_limit(make: Make, config: Any, lowering: str) -> None:
    driver, agent = make(config)
    load(driver, 100, output=300)
    assert len(steps(driver, 10)[-1]) == 64

    agent.apply(8, lease_s=60.0, lowering=lowering)
    plans = steps(driver, 100)

    assert [len(p) for p in plans] == [8] * 100
    assert agent.read().scheduled == 8
    agent.apply(3, lease_s=60.0, lowering=lowering)
    assert {len(p) for p in steps(driver, 50)} == {3}


def test_draining_admits_nobody_and_preempts_nobody(make: Make, config: Any) -> None:
    driver, agent = make(config)
    load(driver, 100)
    steps(driver, 10)
    before = {r.request_id for r in driver.scheduler.running}

    agent.apply(8, lease_s=60.0)
    plans = steps(driver, 45)

    assert all(set(p) <= before for p in plans)
    assert len(plans[-1]) == 64  # none has ended yet
    assert len(steps(driver, 20)[-1]) == 8
    assert agent.read().preemptions == 0


def test_time_slices_keep_the_kv_cache_and_everybody_advances_in_turn(make: Make, config: Any) -> None:
    driver, agent = make(config)
    load(driver, 60, output=300)
    steps(driver, 10)
    order = [r.request_id for r in driver.scheduler.running]
    computed = {r.request_id: r.num_computed_tokens for r in driver.scheduler.running}

    agent.apply(8, lease_s=60.0, lowering="time-slice")
    plans = steps(driver, 60)

    turns = {rid: [i for i, p in enumerate(plans) if rid in p] for rid in order}
    assert all(7 <= len(t) <= 9 for t in turns.values())  # 60 steps of 8 for 60 requests
    assert max(b - a for t in turns.values() for a, b in pairwise(t)) <= 8
    assert [r.request_id for r in driver.scheduler.running] == order
    assert all(
        r.num_computed_tokens == computed[r.request_id] + len(turns[r.request_id]) for r in driver.scheduler.running
    )
    assert agent.read().preemptions == 0


def test_preempting_frees_the_newest_and_they_come_back_first(make: Make, config: Any) -> None:
    driver, agent = make(config)
    load(driver, 80, output=120)
    steps(driver, 10)
    order = [r.request_id for r in driver.scheduler.running]
    usage = driver.scheduler.kv_cache_manager.usage

    agent.apply(16, lease_s=60.0, lowering="preempt")
    steps(driver, 3)

    assert [r.request_id for r in driver.scheduler.running] == order[:16]
    assert driver.scheduler.kv_cache_manager.usage < 0.3 * usage
    assert agent.read().preemptions == 48
    agent.apply(64, lease_s=60.0, lowering="preempt")
    steps(driver, 3)
    assert [r.request_id for r in driver.scheduler.running] == order


@pytest.mark.parametrize("lowering", AT_ONCE)
def test_long_prompts_are_not_starved_by_a_small_limit(make: Make, config: Any, lowering: str) -> None:
    driver, agent = make(config)
    load(driver, 30, output=200)
    for i in range(6):
        driver.add(request(f"long{i}", prompt=3600, output=5))
    steps(driver, 2)  # 8,192 tokens a step: some prompts are half done
    half_done = [r for r in driver.scheduler.running if r.request_id.startswith("long") and r.is_prefill_chunk]
    assert half_done

    agent.apply(4, lease_s=60.0, lowering=lowering)
    plans = steps(driver, 60)

    assert {len(p) for p in plans} <= {1, 2, 3, 4}
    if lowering == "time-slice":  # whole chunks, not slivers of four tokens
        assert {"long0", "long1"} <= driver.finished
        assert max(max(p.values()) for p in plans) > 1000
    agent.release()
    driver.drain()
    assert len(driver.finished) == 36
    assert all(driver.outputs[f"long{i}"] == [greedy(f"long{i}", n) for n in range(1, 6)] for i in range(6))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_kv_cache_too_small_for_all_is_survived(make: Make, config: Any, lowering: str) -> None:
    driver, agent = make(config, blocks=150)
    expected = load(driver, 60, prompt=30, output=80)
    for limit in (64, 8, 3, 20, 64, 5):
        agent.apply(limit, lease_s=60.0, lowering=lowering)
        assert max(len(p) for p in steps(driver, 40)) <= 64
    driver.drain()

    assert driver.outputs == expected
    assert driver.scheduler.kv_cache_manager.usage == 0.0


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_with_prefix_caching_and_priorities_nothing_changes_either(make: Make, olmoe: Path, lowering: str) -> None:
    driver, agent = make(
        engine_config(olmoe, max_num_seqs=64, enable_prefix_caching=True, scheduling_policy="priority")
    )
    hasher = block_hasher()
    expected = load(driver, 40, output=90, block_hasher=hasher)
    urgent = {f"u{i}": [greedy(f"u{i}", n) for n in range(1, 41)] for i in range(10)}
    for rid in urgent:
        driver.add(request(rid, prompt=64, output=40, priority=-5, block_hasher=hasher))
    steps(driver, 8)

    agent.apply(10, lease_s=60.0, lowering=lowering)
    plans = steps(driver, 30)
    if lowering == "preempt":
        assert {r.request_id for r in driver.scheduler.running} <= set(urgent)
    if lowering != "drain":
        assert {len(p) for p in plans} <= set(range(11))
    driver.drain()

    assert driver.outputs == expected | urgent


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_two_steps_in_flight_without_async_scheduling_as_in_a_pipeline_neither_hang_nor_change(
    make: Make, olmoe: Path, lowering: str
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    config = engine_config(olmoe, max_num_seqs=64)
    config.scheduler_config.async_scheduling = False
    driver, agent = make(config, Scheduler)
    expected = load(driver, 40)
    steps(driver, 9)
    for limit in (12, 7, 1):
        agent.apply(limit, lease_s=60.0, lowering=lowering)
        plans = steps(driver, 12)
        assert any(plans)
        assert lowering == "drain" or max(map(len, plans)) <= limit
    driver.drain()

    assert driver.outputs == expected


def emulated(olmoe: Path, bank: Path) -> Callable[[Any], Any]:
    """Executes steps on an emulated device, as the emulated executor does."""
    from vllm.v1.outputs import ModelRunnerOutput

    board = board_specs()["h100-sxm5-80gb"]
    shape = ModelShape.from_config(json.loads((olmoe / "config.json").read_text()))
    device = EmulatedDevice(
        StepModel(shape, board, tensor_parallel=1), BoardBank.create(bank, board, 1), (0,),
        canned=list(range(100, 1100)), eos=None, environ={},
    )  # fmt: skip

    def run(output: Any) -> Any:
        step = device.launch(output)
        index = {rid: i for i, rid in enumerate(step.req_ids)}
        return ModelRunnerOutput(req_ids=step.req_ids, req_id_to_index=index, sampled_token_ids=step.sampled)

    return run


@pytest.mark.parametrize("runner_v2", [False, True])
def test_the_emulated_device_gives_the_same_tokens_however_the_limit_is_lowered(
    make: Make, config: Any, olmoe: Path, tmp_path: Path, runner_v2: bool
) -> None:
    told = {}
    for lowering in ("undisturbed", *LOWERINGS):
        driver, agent = make(config, run=emulated(olmoe, tmp_path / f"bank-{lowering}"))
        driver.scheduler.use_v2_model_runner = runner_v2
        wanted = {rid: len(tokens) for rid, tokens in load(driver, 64, prompt=30, output=50).items()}
        steps(driver, 6)
        if lowering != "undisturbed":
            agent.apply(5, lease_s=60.0, lowering=lowering)
            steps(driver, 20)
            agent.apply(50, lease_s=60.0, lowering=lowering)
        driver.drain()
        assert driver.tokens == wanted
        told[lowering] = driver.outputs

    assert all(outputs == told["undisturbed"] for outputs in told.values())


def _admission_limit(scheduler: Any) -> int:
    return int(getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs))  # apart since vLLM 0.31


@pytest.mark.parametrize("lowering", AT_ONCE)
def test_an_expired_setpoint_leaves_the_launch_batch_budget_and_order(make: Make, config: Any, lowering: str) -> None:
    driver, agent = make(config)
    expected = load(driver, 60)
    steps(driver, 5)
    order = [r.request_id for r in driver.scheduler.running]
    budget = driver.scheduler.max_num_scheduled_tokens
    agent.apply(4, lease_s=0.05, lowering=lowering)
    steps(driver, 1)

    end_s = time.monotonic() + 0.06
    while time.monotonic() < end_s:
        pass
    plans = steps(driver, 4)

    assert len(plans[-1]) == 60
    assert [r.request_id for r in driver.scheduler.running] == order
    assert driver.scheduler.max_num_scheduled_tokens == budget
    assert _admission_limit(driver.scheduler) == 64
    assert agent.read().lowering == "drain"
    driver.drain()
    assert driver.outputs == expected


@pytest.mark.parametrize("lowering", AT_ONCE)
def test_aborts_in_the_middle_of_a_lowered_batch_lose_nobody_else(make: Make, config: Any, lowering: str) -> None:
    from vllm.v1.request import RequestStatus

    driver, agent = make(config)
    expected = load(driver, 64)
    steps(driver, 5)
    agent.apply(8, lease_s=60.0, lowering=lowering)
    gone = [f"r{i}" for i in (0, 3, 9, 40, 63)]
    for rid in gone:
        driver.scheduler.finish_requests(rid, RequestStatus.FINISHED_ABORTED)
        assert len(steps(driver, 3)[-1]) <= 8
    driver.drain()

    rest = {rid: tokens for rid, tokens in expected.items() if rid not in gone}
    assert {rid: t for rid, t in driver.outputs.items() if rid in rest} == rest


def test_a_scheduler_that_lacks_what_preempting_needs_drains_and_says_so_once(
    make: Make, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    class Older(AsyncScheduler):  # type: ignore[misc]
        _preempt_request = None

    class Other(AsyncScheduler):  # type: ignore[misc]
        def _preempt_request(self, request: Any, timestamp: float, reason: str) -> None:
            raise NotImplementedError

    for base in (Older, Other):
        driver, agent = make(config, base)
        caplog.clear()
        load(driver, 64, output=200)
        steps(driver, 5)
        agent.apply(8, lease_s=60.0, lowering="preempt")
        plans = steps(driver, 30)

        assert len(plans[-1]) == 64
        assert agent.read().lowering == "drain"
        assert len([r for r in caplog.records if "drains instead" in r.message]) == 1
        assert driver.scheduler._pals is not None


def test_a_failing_preemption_kills_nothing(make: Make, config: Any) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    class Failing(AsyncScheduler):  # type: ignore[misc]
        def _preempt_request(self, request: Any, timestamp: float) -> None:
            raise RuntimeError("not now")

    driver, agent = make(config, Failing)
    expected = load(driver, 64)
    steps(driver, 5)
    agent.apply(8, lease_s=60.0, lowering="preempt")
    driver.drain()

    assert driver.scheduler._pals is None
    assert driver.outputs == expected


def test_the_docs_hold_the_costs_as_they_are_measured(config: Any) -> None:
    from benchmarks.lowering import table

    text, whole = table(config)

    assert whole
    assert text in (Path(__file__).parent.parent / "docs" / "levers.md").read_text()
