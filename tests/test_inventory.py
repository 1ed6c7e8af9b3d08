"""What a run directory says: living and killed engines, agents and their records; nothing in it is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from pals.runtime.agent import FOUND_RECORD
from pals.runtime.channel import GAUGES, AgentChannel, EngineChannel
from pals.runtime.inventory import look_into
from pals.runtime.processes import process_started
from tests.found_records import write_record
from tests.worlds import engine_info


def dead_pid() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    return ended.pid


def test_an_engine_is_shown_with_its_setpoint_until_that_expires(tmp_path: Path) -> None:
    engine = EngineChannel(tmp_path, engine_info(os.getpid()), name="one")
    gauges = dict.fromkeys(GAUGES, 0.0) | {"time_s": 100.0, "steps": 7.0, "running": 3.0, "launch_limit": 64.0}
    engine.publish(list(gauges.values()))
    AgentChannel(engine.path).apply(8, lease_s=60.0)

    facts = look_into(tmp_path, now_s=lambda: 101.5, proc=tmp_path).engines[0]

    assert facts.info.model == "test/model"
    assert facts.pids == (os.getpid(),)
    assert facts.complete
    assert facts.sample is not None
    assert facts.sample.running == 3
    assert facts.age_s == 1.5
    assert facts.setpoint == 8
    assert look_into(tmp_path, now_s=lambda: 1e12, proc=tmp_path).engines[0].setpoint is None


def test_killed_engines_and_foreign_channels_are_named_and_left_alone(tmp_path: Path) -> None:
    pid = dead_pid()
    EngineChannel(tmp_path, replace(engine_info(pid), model="dead/model"), name="dead")
    (tmp_path / "other.channel").write_bytes(b"PALSCH99".ljust(20000, b"\0"))

    facts = look_into(tmp_path, proc=tmp_path)

    assert facts.engines == ()
    assert facts.killed == (f"process {pid} (dead/model)",)
    assert facts.unreadable == ("other.channel",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dead.channel", "other.channel"]


def test_vllm_engines_without_a_channel_are_found_by_their_title(tmp_path: Path) -> None:
    EngineChannel(tmp_path, engine_info(os.getpid()), name="one")
    for pid, title in ((os.getpid(), b"VLLM::EngineCore\0"), (4711, b"VLLM::EngineCore_DP1\0"), (4712, b"bash\0")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes(title)

    assert look_into(tmp_path, proc=tmp_path).without_plugin == (4711,)


def test_records_of_writers_tell_the_living_from_the_killed(tmp_path: Path) -> None:
    record = tmp_path / FOUND_RECORD
    assert look_into(tmp_path, proc=tmp_path).writer.pid is None

    mine = process_started(os.getpid()) or 0
    write_record(record, {f"GPU-{i}": (400.0, []) for i in range(2)}, pid=os.getpid(), started=mine)
    living = look_into(tmp_path, proc=tmp_path).writer
    assert (living.pid, living.alive, living.boards) == (os.getpid(), True, 2)

    write_record(record, {"GPU-0": (400.0, [])}, pid=os.getpid(), started=mine - 1)  # the id went to another process
    assert not look_into(tmp_path, proc=tmp_path).writer.alive

    record.write_text("{")
    assert "is damaged" in (look_into(tmp_path, proc=tmp_path).writer.error or "")


def test_the_agents_newest_record_is_read_and_a_foreign_one_ignored(tmp_path: Path) -> None:
    status = tmp_path / "agent-status.json"
    status.write_text(
        json.dumps(
            {
                "header": {"policy": "static", "period_s": 0.5, "engine": {"model": "a/model"}},
                "record": {"mode": "auto", "index": 12},
            }
        )
    )

    (agent,) = look_into(tmp_path, proc=tmp_path).agents
    assert (agent.model, agent.policy, agent.mode, agent.tick, agent.period_s) == ("a/model", "static", "auto", 12, 0.5)
    status.write_text(json.dumps({"another": "version"}))
    assert look_into(tmp_path, proc=tmp_path).agents == ()


def test_a_missing_run_directory_is_a_fact_and_is_not_made(tmp_path: Path) -> None:
    facts = look_into(tmp_path / "a" / "b", proc=tmp_path)

    assert (facts.exists, facts.writable, facts.engines) == (False, True, ())
    assert list(tmp_path.iterdir()) == []
