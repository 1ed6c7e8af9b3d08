"""The channel: what one side writes the other reads, setpoints expire, and dead engines are noticed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pals.core.errors import EngineGoneError
from pals.runtime.channel import GAUGES, AgentChannel, EngineChannel, Setpoint, find_engines, run_dir
from tests.worlds import BUCKETS, engine_info


def pair(tmp_path: Path) -> tuple[EngineChannel, AgentChannel]:
    engine = EngineChannel(tmp_path, engine_info(os.getpid()), name="vllm-test")
    return engine, AgentChannel(engine.path)


def test_telemetry_arrives_as_written(tmp_path: Path) -> None:
    engine, agent = pair(tmp_path)
    gauges = [float(i) for i in range(len(GAUGES))]
    gauges[GAUGES.index("lowering")] = 1.0
    ttft, tpot = list(range(BUCKETS)), list(range(BUCKETS, 0, -1))

    engine.publish(gauges, ttft, tpot)
    sample = agent.read()

    assert [float(getattr(sample, name)) for name in GAUGES if name != "lowering"] == gauges[:-1]
    assert sample.lowering == "time-slice"
    assert sample.ttft_counts == tuple(ttft)
    assert sample.tpot_counts == tuple(tpot)
    assert agent.info == engine_info(os.getpid())


def test_before_the_first_step_the_launch_limit_stands(tmp_path: Path) -> None:
    _, agent = pair(tmp_path)

    assert agent.read().active_limit == agent.read().launch_limit == 64


def test_a_setpoint_holds_for_its_lease_and_no_longer(tmp_path: Path) -> None:
    engine, agent = pair(tmp_path)
    assert engine.setpoint(time.monotonic()) is None

    agent.apply(8, lease_s=5.0, lowering="preempt")

    now_s = time.monotonic()
    assert engine.setpoint(now_s) == Setpoint(8, "preempt")
    assert engine.setpoint(now_s + 5.1) is None
    agent.release()
    assert engine.setpoint(now_s) is None


@pytest.mark.parametrize("limit", [0, -1, 65])
def test_a_limit_outside_the_launch_batch_is_refused(tmp_path: Path, limit: int) -> None:
    engine, agent = pair(tmp_path)
    agent.apply(8, lease_s=60.0)

    with pytest.raises(ValueError, match=r"outside 1\.\.64"):
        agent.apply(limit, lease_s=60.0)

    with pytest.raises(ValueError, match="none of drain, time-slice, preempt"):
        agent.apply(8, lease_s=60.0, lowering="kill")

    assert engine.setpoint(time.monotonic()) == Setpoint(8, "drain")


def test_a_dead_engine_is_gone_and_its_channel_removed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    engine = EngineChannel(tmp_path, engine_info(child.pid), name="vllm-dead")
    agent = AgentChannel(engine.path)
    child.wait()

    with pytest.raises(EngineGoneError, match="has ended"):
        agent.read()
    assert find_engines(tmp_path) == []
    assert not engine.path.exists()


def test_a_channel_taken_away_or_made_anew_by_a_living_process_is_gone_too(tmp_path: Path) -> None:
    engine, agent = pair(tmp_path)
    EngineChannel(tmp_path, engine_info(os.getpid()), name="vllm-test")  # the process made another under the same name
    with pytest.raises(EngineGoneError, match="PALS plugin switched itself off"):
        agent.read()

    agent = AgentChannel(engine.path)
    assert agent.read().steps == 0
    engine.close()
    with pytest.raises(EngineGoneError, match="took its channel away"):
        agent.read()


def test_an_idle_engine_is_at_its_launch_limit_once_the_setpoint_has_expired(tmp_path: Path) -> None:
    now_s = [100.0]
    engine = EngineChannel(tmp_path, engine_info(os.getpid()), name="vllm-idle")
    agent = AgentChannel(engine.path, lambda: now_s[0])
    told = {"active_limit": 8.0, "launch_limit": 64.0, "lowering": 1.0, "running": 3.0}
    agent.apply(8, lease_s=3.0, lowering="time-slice")
    engine.publish([told.get(name, 0.0) for name in GAUGES])
    now_s[0] = 104.0
    assert agent.read().active_limit == 8  # busy: it says itself what it obeys

    engine.publish([(told | {"running": 0.0}).get(name, 0.0) for name in GAUGES])
    assert (agent.read().active_limit, agent.read().lowering) == (64, "drain")
    agent.apply(8, lease_s=3.0)
    assert agent.read().active_limit == 8


def test_a_reader_never_sees_a_half_written_block(tmp_path: Path) -> None:
    engine, agent = pair(tmp_path)
    writer = (
        "import sys; from pathlib import Path\n"
        "from tests.worlds import *; from pals.runtime.channel import *\n"
        "import os\n"
        f"c = EngineChannel(Path({str(tmp_path)!r}), engine_info(os.getpid()), name='busy')\n"
        "print('ready', flush=True)\n"
        "for i in range(30000): c.publish([float(i)] * len(GAUGES), [i] * BUCKETS, [i] * BUCKETS)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert child.stdout is not None
    child.stdout.readline()
    busy = AgentChannel(tmp_path / "busy.channel")
    seen = 0
    while child.poll() is None:
        sample = busy._telemetry.read()
        if sample is not None:
            assert len(set(sample)) == 1
            seen += 1
    child.stdout.close()
    assert seen > 0
    engine.close()
    assert agent.alive()


def test_the_run_directory_follows_the_environment() -> None:
    assert run_dir({"PALS_RUN_DIR": "/x/y"}) == Path("/x/y")
    assert run_dir({}).name.startswith("pals")
