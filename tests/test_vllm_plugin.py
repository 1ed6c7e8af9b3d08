"""The plugin over vLLM's real async scheduler: limits move live and lose nothing, counters tell what happened."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.scheduler_harness import Driver, engine_config, greedy, make_scheduler, request

from pals.core.quantities import EngineSample
from pals.engines.step_telemetry import StepTelemetry, tokens_given
from pals.runtime.channel import AgentChannel, EngineChannel, find_engines
from tests.worlds import engine_info

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT, OUTPUT = 40, 60


@pytest.fixture(scope="module")
def config(olmoe: Path) -> Any:
    return engine_config(olmoe, max_num_seqs=64)


@pytest.fixture
def composed(config: Any, tmp_path: Path) -> tuple[Driver, AgentChannel]:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from pals.engines.vllm_plugin import EngineLink, compose

    channel = EngineChannel(tmp_path, engine_info(os.getpid(), launch=64), name="vllm-test")

    class Linked(compose(AsyncScheduler)):  # type: ignore[misc]
        def _pals_link(self) -> EngineLink:
            return EngineLink(self, channel)

    return Driver(make_scheduler(Linked, config)), AgentChannel(channel.path)


def read(agent: AgentChannel) -> EngineSample:
    return agent.read()


def test_limits_move_64_8_64_live_and_every_request_gets_exactly_its_tokens(
    composed: tuple[Driver, AgentChannel],
) -> None:
    driver, agent = composed
    for i in range(200):
        driver.add(request(f"r{i}", prompt=PROMPT, output=OUTPUT + i % 7))
    for _ in range(20):
        driver.step()
    assert driver.running_history[-1] == 64

    agent.apply(8, lease_s=60.0)
    for _ in range(150):
        driver.step()
    assert driver.running_history[-1] == 8
    assert read(agent).active_limit == 8
    assert read(agent).waiting > 0

    agent.apply(64, lease_s=60.0)
    for _ in range(3):
        driver.step()
    assert driver.running_history[-1] == 64
    driver.drain()

    assert driver.finished == {f"r{i}" for i in range(200)}
    assert driver.tokens == {f"r{i}": OUTPUT + i % 7 for i in range(200)}
    assert read(agent).preemptions == 0


def test_an_expired_setpoint_returns_to_the_launch_limit(composed: tuple[Driver, AgentChannel]) -> None:
    driver, agent = composed
    agent.apply(4, lease_s=0.05)
    for i in range(100):
        driver.add(request(f"r{i}", prompt=8, output=500))
    driver.step()
    assert driver.running_history[-1] == 4

    end_s = time.monotonic() + 0.06
    while time.monotonic() < end_s:
        pass
    for _ in range(3):
        driver.step()

    assert driver.running_history[-1] == 64
    assert read(agent).active_limit == read(agent).launch_limit == 64


def test_counters_tell_what_happened(composed: tuple[Driver, AgentChannel]) -> None:
    driver, agent = composed
    for i in range(10):
        driver.add(request(f"r{i}", prompt=PROMPT, output=OUTPUT))
    for _ in range(5):
        driver.step()
    driver.scheduler.finish_requests("r3", _aborted())
    driver.drain()
    driver.step()
    driver.land()
    now = read(agent)

    assert now.arrived_requests == 10
    assert now.arrived_prompt_tokens == 10 * PROMPT == now.prefill_tokens
    assert (now.finished_requests, now.aborted_requests) == (9, 1)
    assert now.output_tokens == sum(driver.tokens.values())
    assert sum(now.ttft_counts) == 10
    assert sum(now.tpot_counts) == 10
    assert (now.running, now.waiting) == (0, 0)
    assert now.busy_s > 0


def test_a_token_sampled_after_eos_is_not_counted(composed: tuple[Driver, AgentChannel]) -> None:
    driver, agent = composed
    for i in range(20):
        new = request(f"r{i}", prompt=PROMPT, output=OUTPUT)
        new.sampling_params.stop_token_ids = [greedy(f"r{i}", 5 + i)]
        driver.add(new)
    driver.drain()

    assert max(driver.tokens.values()) <= 24  # each stopped early, while its next step was in flight
    assert sum(sum(plan.values()) for plan in driver.plans) > sum(driver.tokens.values()) + 20 * PROMPT - 20
    assert read(agent).output_tokens == sum(driver.tokens.values())


def test_a_release_that_returns_something_else_is_counted_by_what_was_sampled() -> None:
    out = SimpleNamespace(outputs=[SimpleNamespace(new_token_ids=[1, 2]), SimpleNamespace(new_token_ids=[])])

    assert tokens_given({0: out, 1: out}, [[1, 2, 3]]) == 4
    assert tokens_given({}, [[1]]) == 0  # the step's only token was discarded
    assert tokens_given(None, [[1], [], [2]]) == 2
    assert tokens_given([out], [[1]]) == 1


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED


def test_a_broken_channel_never_kills_a_step(config: Any, tmp_path: Path) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from pals.engines.vllm_plugin import EngineLink, compose

    class Broken(EngineChannel):
        def publish(self, *args: object) -> None:
            raise OSError("no shared memory")

    class Linked(compose(AsyncScheduler)):  # type: ignore[misc]
        def _pals_link(self) -> EngineLink:
            link = EngineLink(self, Broken(tmp_path, engine_info(os.getpid()), name="broken"))
            AgentChannel(link.channel.path).apply(2, lease_s=60.0)
            return link

    driver = Driver(make_scheduler(Linked, config))
    for i in range(30):
        driver.add(request(f"r{i}", prompt=8, output=5))
    driver.drain()

    assert len(driver.finished) == 30
    assert driver.scheduler._pals is None
    assert driver.scheduler.max_num_active_reqs == 64


def test_the_class_vllm_picks_is_composed_once_and_left_alone_when_off(config: Any) -> None:
    from vllm.config import SchedulerConfig
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from pals.engines.vllm_plugin import PalsMixin, compose, register

    register()
    first = SchedulerConfig.get_scheduler_cls
    register()

    assert SchedulerConfig.get_scheduler_cls is first
    picked = config.scheduler_config.get_scheduler_cls()
    assert issubclass(picked, PalsMixin)
    assert issubclass(picked, AsyncScheduler)
    assert compose(picked) is picked


def test_boards_follow_rank_and_visible_devices() -> None:
    from pals.engines.vllm_plugin import boards_of

    second = SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1, data_parallel_rank_local=1)

    assert boards_of(second, "") == (2, 3)
    assert boards_of(second, "4,5,6,7") == (6, 7)
    assert boards_of(second, "4,5,6") == ()
    second.assigned_physical_gpu_ids = [3, 1, 7, 5]  # --device-ids, of all ranks
    assert boards_of(second, "0,1") == (7, 5)
    second.assigned_physical_gpu_ids = [7, 5]  # of this rank alone
    assert boards_of(second, "") == (7, 5)


def test_boards_by_uuid_are_those_vllms_platform_finds_and_never_guessed() -> None:
    from pals.engines.vllm_plugin import boards_of

    four = SimpleNamespace(tensor_parallel_size=4, pipeline_parallel_size=1)
    assert boards_of(four, "GPU-aaaa,GPU-bbbb,GPU-cccc,GPU-dddd") == ()  # no such boards here
    assert boards_of(four, "0,1,2,MIG-dddd") == ()
    assert boards_of(four, " 3, 2,1 ,0") == (3, 2, 1, 0)


def test_only_local_ranks_count_and_what_ray_placed_is_unknown(config: Any) -> None:
    from pals.engines.vllm_plugin import boards_of

    parallel = copy.copy(config.parallel_config)
    parallel.tensor_parallel_size, parallel.world_size = 16, 16
    parallel.nnodes, parallel.node_rank = 2, 1
    assert boards_of(parallel, "") == tuple(range(8))
    assert boards_of(parallel, "7,6,5,4,3,2,1,0") == (7, 6, 5, 4, 3, 2, 1, 0)
    parallel.nnodes = 1
    parallel.prefill_context_parallel_size, parallel.world_size = 2, 32
    assert len(boards_of(parallel, "")) == 32
    parallel.distributed_executor_backend = "ray"
    assert boards_of(parallel, "") == ()


def test_the_order_of_cudas_indices_is_told() -> None:
    from pals.engines.vllm_plugin import in_cuda_order

    assert in_cuda_order({})
    assert in_cuda_order({"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    assert not in_cuda_order({"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert not in_cuda_order({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"})


def test_the_channel_of_a_real_link_says_what_the_engine_is(config: Any) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from pals.engines.vllm_plugin import compose
    from pals.runtime.channel import run_dir

    scheduler = make_scheduler(compose(AsyncScheduler), config)
    mine = [e for e in find_engines(run_dir(os.environ)) if e.info.pid == os.getpid()]

    assert mine[0].info.parallelism == "tp1 pp1 dp1 ep0"
    assert mine[0].info.launch_sequences == 64
    assert mine[0].info.capabilities == {
        "active_limit": True, "running_limit": True, "throttle_prefills": True, "async_scheduling": True,
        "time-slice": True, "preempt": True,
    }  # fmt: skip
    scheduler.shutdown()
    assert not mine[0].path.exists()


def test_telemetry_forgets_requests_that_end_before_they_ran() -> None:
    telemetry = StepTelemetry(8)
    telemetry.arrived(SimpleNamespace(request_id="a", num_prompt_tokens=5, num_output_tokens=0, status=None), 1.0)
    idle = SimpleNamespace(
        finished_req_ids={"a"}, scheduled_new_reqs=[], num_scheduled_tokens={}, total_num_scheduled_tokens=0,
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
    )  # fmt: skip
    telemetry.scheduled(idle)
    telemetry.updated(0, 2.0)

    assert not telemetry._waiting
    assert not telemetry._requests
    assert not telemetry._prefilling
