"""`pals doctor`: every state of a node gets a status and a remedy, reads well in any terminal, and never ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pals.core.diagnosis import (
    AgentFacts,
    BoardFacts,
    BoardSettings,
    EngineFacts,
    Finding,
    MeterFacts,
    NodeFacts,
    NvmlFacts,
    PrivilegeFacts,
    RunDirFacts,
    SoftwareFacts,
    Status,
    WriterFacts,
)
from pals.core.diagnosis_writing import (
    BoardTrial,
    CapdBoardFacts,
    CapdFacts,
    ClockTrial,
    LatencyTrial,
    LimitTrial,
    Program,
    Reach,
    WriterChoice,
)
from pals.core.quantities import PowerSample
from pals.engines.installed import fits
from pals.plant.boards import BoardBank
from pals.plant.silicon import Load
from pals.plant.specs import board_specs
from pals.runtime.processes import process_started
from pals.views.doctor import as_json, findings, print_findings, worst
from pals.views.doctor.render import ranges
from tests.found_records import write_record
from tests.worlds import board_info, engine_info, engine_sample

DOCS = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text(encoding="utf-8")
SETTINGS = BoardSettings(persistence_mode=True, mig_mode=False, clock_reasons=(), clock_lock_api=True)
METER = MeterFacts(
    seconds=2.0, sampled_every_s=0.005, power_w=200.0, swing_w=40.0, energy_refresh_s=0.1, power_window_s=1.0
)
NOW = PowerSample(time_s=1.0, power_w=210.0, energy_j=1e6, enforced_limit_w=400.0, sm_clock_mhz=1410)
AGENT = AgentFacts(model="m", policy="static", mode="auto", tick=3, period_s=0.5, age_s=0.2)
ENGINE = EngineFacts(
    info=replace(engine_info(), capabilities={"active_limit": True}),
    pids=(4711,),
    complete=True,
    sample=replace(engine_sample(1.0, running=3), steps=9),
    age_s=0.1,
    setpoint=32,
)
CAPD = CapdFacts(
    path="/run/pals/capd.sock", reach=Reach.ANSWERS, took_s=0.0004, version="0.1.0", rights="set", ttl_s=3.0, max_ttl_s=60.0,
    boards=tuple(CapdBoardFacts(uuid=f"GPU-{i}", exit_policy="restore") for i in range(2)),
)  # fmt: skip
NO_CAPD = dict.fromkeys(("took_s", "version", "rights", "ttl_s", "max_ttl_s")) | {"boards": ()}
TRIAL = BoardTrial(
    index=0, writer="capd", found_w=400.0, left_w=400.0,
    clock=ClockTrial(before_mhz=210, target_mhz=330, measured_mhz=330, took_s=0.03, after_mhz=210, idle=True),
    limit=LimitTrial(before_w=400.0, asked_w=395.0, enforced_w=395.0),
    latency=LatencyTrial(writes=20, p50_s=0.0001, p99_s=0.0006),
)  # fmt: skip


def board(index: int = 0, **changes: Any) -> BoardFacts:
    return replace(BoardFacts(index=index, info=board_info(index), now=NOW, settings=SETTINGS, meter=METER), **changes)


def node(**changes: Any) -> NodeFacts:
    """A healthy node with two boards and one engine, with some of its facts changed."""
    sound: dict[str, Any] = {
        "nvml": NvmlFacts(emulated=None, kernel_driver="NVRM 1.0", boards=(board(0), board(1)), may_write=True),
        "privilege": PrivilegeFacts(euid=0, sys_admin=True),
        "run_dir": RunDirFacts(path="/run/pals", exists=True, writable=True, engines=(ENGINE,)),
        "software": SoftwareFacts(
            python="3.11.7",
            pals="0.1.0",
            vllm="0.32.0",
            vllm_wanted=">=0.28,<0.34",
            vllm_fits=True,
            vllm_has_kernels=True,
            entry_points=("vllm.general_plugins: pals", "vllm.platform_plugins: pals_emulated"),
            packages={"nvidia-ml-py": "13.0", "aiohttp": "3.14", "matplotlib": "3.11", "pynvml": None},
            environment={},
        ),
        "capd": CAPD,
        "chosen": WriterChoice(kind="capd", told="capd (dead-man: capd, 3 s)"),
        "programs": (),
        "trials": None,
    }
    for name, value in changes.items():
        sound[name] = replace(sound[name], **value) if isinstance(value, dict) else value
    return NodeFacts(**sound)


def boards(*made: BoardFacts, **changes: Any) -> NodeFacts:
    return node(nvml={"boards": made, **changes})


def info(**changes: Any) -> BoardFacts:
    return board(info=replace(board_info(), **changes))


def settings(**changes: Any) -> BoardFacts:
    return board(settings=replace(SETTINGS, **changes))


def meter(**changes: Any) -> BoardFacts:
    return board(meter=replace(METER, **changes))


def engine(**changes: Any) -> NodeFacts:
    return node(run_dir={"engines": (replace(ENGINE, **changes),)})


def capd(reach: Reach = Reach.ANSWERS, **changes: Any) -> NodeFacts:
    """A node with another capd; where it is not reached, this process would write."""
    if reach is Reach.ANSWERS:
        return node(capd=changes)
    return node(capd={**NO_CAPD, "reach": reach, **changes}, chosen=DIRECT)


def capd_board(**changes: Any) -> NodeFacts:
    return capd(boards=(replace(CAPD.boards[0], **changes), CAPD.boards[1]))


def advised(reach: Reach, **changes: Any) -> NodeFacts:
    """This user may not write, and capd is reached so far."""
    unprivileged = {"nvml": {"may_write": False}, "privilege": {"euid": 1000}, "chosen": NOBODY}
    return node(**unprivileged, capd={**NO_CAPD, "reach": reach, **changes})


def tried(**changes: Any) -> NodeFacts:
    return node(trials=(replace(TRIAL, **changes),))


def clock(**changes: Any) -> NodeFacts:
    assert TRIAL.clock is not None
    return tried(clock=replace(TRIAL.clock, **changes))


def env(**variables: str) -> NodeFacts:
    return node(software={"environment": variables})


NONE = "no NVIDIA driver found (NVML Shared Library Not Found); to run without a GPU use --emulate"
LOST = BoardFacts(index=0, error="board 0: the board is lost")
DIRECT = WriterChoice(kind="direct", told="this process (no dead-man)")
NOBODY = WriterChoice(kind="none", told="nobody", why="this process may not write power limits (needs root)")
HOST_ENGINE = Program(pid=8, name="DCGM host engine", writes=None)
EMULATED = {"emulated": "/run/pals/emulated-boards.bank", "emulator_pid": 7, "emulator_alive": True}
# a state of the node, the check it shows in, its status, and what is said or advised
CASES: list[tuple[NodeFacts, str, Status, str]] = [
    (node(nvml={"boards": (), "error": NONE, "kernel_driver": None}), "nvml", Status.PROBLEM, "pals demo"),
    (node(nvml={"boards": (), "error": NONE}), "nvml", Status.PROBLEM, "--gpus all"),
    (node(nvml={"boards": ()}), "nvml", Status.PROBLEM, "lists no board"),
    (node(software={"packages": {}}), "nvml", Status.UNKNOWN, "pip install nvidia-ml-py"),
    (node(nvml=EMULATED), "nvml", Status.OK, "EMULATED: 2 boards"),
    (node(nvml=EMULATED | {"emulator_alive": False}), "nvml", Status.WARNING, "rm /run/pals/emulated-boards.bank"),
    (node(nvml=EMULATED | {"error": "gone", "boards": ()}), "nvml", Status.PROBLEM, "folder of your own"),
    (boards(LOST, board(1)), "usable", Status.PROBLEM, "board 0: the board is lost"),
    (boards(board()), "identity", Status.OK, "Test board, GPU-0"),
    (boards(board()), "power-limit", Status.OK, "100..400 W can be set, default 400 W"),
    (boards(info(found_limit_w=300.0)), "power-limit", Status.OK, "never goes above"),
    (
        node(
            nvml={"boards": (info(found_limit_w=300.0),)}, run_dir={"writer": WriterFacts(pid=9, alive=True, boards=1)}
        ),
        "power-limit",
        Status.OK,
        "the agent set it",
    ),
    (boards(board(now=replace(NOW, enforced_limit_w=250.0))), "power-limit", Status.WARNING, "BMC"),
    (boards(info(min_limit_w=400.0)), "power-limit", Status.WARNING, "cannot be moved"),
    (boards(board()), "limit-binds", Status.OK, "draws 200 W: the limit does not bind"),
    (boards(meter(power_w=389.0)), "limit-binds", Status.OK, "limit binds now"),
    (boards(settings(clock_reasons=("power limit",))), "limit-binds", Status.OK, "limit binds now"),
    (boards(board(meter=None)), "limit-binds", Status.OK, "draws 210 W"),
    (boards(settings(clock_lock_api=False)), "sm-clock", Status.WARNING, "cannot lock"),
    (boards(settings(clock_reasons=("power brake",))), "sm-clock", Status.WARNING, "cooling"),
    (boards(board()), "energy-counter", Status.OK, "every about 100 ms"),
    (boards(meter(sampled_every_s=0.09)), "energy-counter", Status.OK, "every at most 100 ms"),
    (boards(meter(energy_refresh_s=0.5)), "energy-counter", Status.WARNING, "at least 2.0 s"),
    (boards(meter(energy_refresh_s=None)), "energy-counter", Status.PROBLEM, "cannot be measured"),
    (boards(board(meter=None)), "energy-counter", Status.UNKNOWN, "--watch-s 2"),
    (boards(board()), "power-window", Status.OK, "about 1 s"),
    (boards(meter(power_window_s=None, swing_w=0.4)), "power-window", Status.UNKNOWN, "steady (±0.4 W)"),
    (boards(meter(power_window_s=None)), "power-window", Status.UNKNOWN, "no known window"),
    (boards(board(meter=None)), "power-window", Status.UNKNOWN, "not watched"),
    (boards(settings(persistence_mode=False)), "persistence-mode", Status.WARNING, "nvidia-smi -pm 1"),
    (boards(settings(persistence_mode=None)), "persistence-mode", Status.UNKNOWN, "does not say"),
    (boards(settings(mig_mode=True)), "mig", Status.WARNING, "whole boards"),
    (node(), "write", Status.OK, "capd (dead-man: capd, 3 s) would write"),
    (node(chosen=DIRECT), "write", Status.OK, "not tried"),
    (advised(Reach.MISSING), "write", Status.WARNING, "sudo pals agent"),
    (node(chosen=DIRECT, privilege={"sys_admin": False}), "write", Status.WARNING, "--cap-add SYS_ADMIN"),
    (node(nvml=EMULATED, chosen=DIRECT), "write", Status.OK, "emulated boards accept"),
    (node(nvml=EMULATED | {"may_write": False}, chosen=NOBODY), "write", Status.WARNING, "--unprivileged"),
    (node(capd={"rights": "read"}, chosen=NOBODY), "write", Status.WARNING, "capd lets this user only read"),
    (node(), "other-programs", Status.OK, "no other program"),
    (node(programs=(Program(pid=7, name="zeusd", writes=True),)), "other-programs", Status.WARNING, "zeusd (process 7)"),
    (node(programs=(HOST_ENGINE,)), "other-programs", Status.UNKNOWN, "dcgmi config --get"),
    (node(programs=(Program(pid=8, name="nvidia-smi in a loop", writes=False),)), "other-programs", Status.OK, "reads only"),
    (capd(others=("zeusd (process 12)",)), "other-programs", Status.WARNING, "zeusd (process 12)"),
    (capd(others=("DCGM host engine (process 12)",)), "other-programs", Status.UNKNOWN, "process 12"),
    (node(), "daemon", Status.OK, "answered in 0.4 ms"),
    (capd(Reach.MISSING), "daemon", Status.WARNING, "enable --now pals-capd"),
    (node(nvml=EMULATED, capd={**NO_CAPD, "reach": Reach.MISSING}), "daemon", Status.OK, "for real boards"),
    (advised(Reach.CLOSED, group="pals"), "daemon", Status.WARNING, "sudo usermod -aG pals $USER"),
    (advised(Reach.CLOSED, group="pals", in_group=True), "daemon", Status.WARNING, "newgrp pals"),
    (advised(Reach.CLOSED, group="root"), "daemon", Status.WARNING, "usermod -aG pals"),
    (advised(Reach.TURNED_AWAY), "daemon", Status.WARNING, "[rights]"),
    (capd(Reach.STALE), "daemon", Status.PROBLEM, "restart pals-capd"),
    (advised(Reach.SILENT), "daemon", Status.PROBLEM, "hangs"),
    (capd(Reach.STRANGE), "daemon", Status.PROBLEM, "no capd of this version"),
    (node(), "rights", Status.OK, "right is set"),
    (capd(rights="read"), "rights", Status.WARNING, "[rights]"),
    (node(), "dead-man", Status.OK, "ends after 3 s (at most 60 s"),
    (capd_board(exit_policy="hold"), "dead-man", Status.WARNING, "exit ="),
    (capd_board(exit_policy="safe"), "dead-man", Status.OK, "restore (as found) or safe"),
    (capd(budget_w=800.0), "dead-man", Status.OK, "budget 800 W"),
    (node(), "state", Status.OK, "no kill switch, no alarm"),
    (capd(off=True, alarm="kill switch: the file"), "state", Status.PROBLEM, "sudo rm /var/lib/pals-capd/off"),
    (capd(alarm="the audit log cannot be written"), "state", Status.PROBLEM, "audit log"),
    (capd(dry_run=True), "state", Status.WARNING, "--dry-run"),
    (node(), "write-latency", Status.OK, "written nothing"),
    (capd(writes=9, write_p50_s=0.008, write_p99_s=0.02), "write-latency", Status.OK, "8 ms (p50), 20 ms (p99)"),
    (capd(writes=9, write_p50_s=0.2, write_p99_s=0.4), "write-latency", Status.WARNING, "longer control periods"),
    (node(), "leases", Status.OK, "0 of 2 boards leased"),
    (capd_board(leased_by="user 1000 (pals agent 7)"), "leases", Status.OK, "1 of 2 boards leased: user 1000 (pals agent 7)"),
    (capd(boards=CAPD.boards[:1]), "boards", Status.WARNING, "does not know board 1"),
    (capd_board(refusal="MIG mode is enabled"), "refuses", Status.WARNING, "MIG"),
    (node(), "second-hand", Status.OK, "nobody else"),
    (capd_board(other_hand_w=250.0), "second-hand", Status.WARNING, "somebody else set 250 W"),
    (capd_board(suspected_lock="locked at 1200, 1410 measured"), "second-hand", Status.WARNING, "1410 measured"),
    (tried(refused="not idle", clock=None, limit=None, latency=None), "tried", Status.UNKNOWN, "not written: not idle"),
    (tried(error="capd went away"), "tried", Status.WARNING, "ended early: capd went away"),
    (tried(), "clock-lock", Status.OK, "330 MHz measured within 30 ms"),
    (clock(measured_mhz=None, took_s=None, error="not supported"), "clock-lock", Status.WARNING, "power limit and active"),
    (clock(measured_mhz=210, took_s=None), "clock-lock", Status.UNKNOWN, "--try-writes=busy"),
    (clock(measured_mhz=300, took_s=None, capped=True, idle=False), "clock-lock", Status.UNKNOWN, "holds the clock lower"),
    (clock(measured_mhz=1410, took_s=None, idle=False), "clock-lock", Status.PROBLEM, "nvidia-smi -rgc"),
    (tried(), "limit-write", Status.OK, "395 W asked for and in force"),
    (tried(limit=LimitTrial(before_w=100.0, asked_w=None)), "limit-write", Status.UNKNOWN, "at its minimum"),
    (tried(limit=LimitTrial(before_w=400.0, asked_w=395.0, enforced_w=400.0)), "limit-write", Status.WARNING, "BMC"),
    (tried(limit=LimitTrial(before_w=400.0, asked_w=395.0, error="denied")), "limit-write", Status.WARNING, "denied"),
    (tried(), "write-latency", Status.OK, "20 renewals of a lease"),
    (tried(writer="direct"), "write-latency", Status.OK, "20 writes of the same limit: 0.1 ms (p50), 0.6 ms (p99)"),
    (tried(latency=LatencyTrial(writes=20, p50_s=0.3, p99_s=0.4)), "write-latency", Status.WARNING, "nvidia-smi loops"),
    (tried(), "put-back", Status.OK, "stands as found: 400 W"),
    (tried(left_w=395.0), "put-back", Status.PROBLEM, "-pl 400"),
    (tried(left_w=None), "put-back", Status.PROBLEM, "nvidia-smi -q"),
    (clock(after_mhz=330), "put-back", Status.PROBLEM, "nvidia-smi -i 0 -rgc"),
    (node(), "steerable", Status.OK, "2 of 2 boards: by power limit and SM clock, written by capd"),
    (boards(LOST, board(1)), "steerable", Status.WARNING, "1 of 2 boards"),
    (boards(settings(clock_lock_api=False)), "steerable", Status.OK, "by power limit, written"),
    (capd_board(refusal="MIG mode is enabled"), "steerable", Status.WARNING, "1 of 2 boards"),
    (capd(off=True), "steerable", Status.WARNING, "kill switch is on → sudo rm"),
    (capd(dry_run=True), "steerable", Status.WARNING, "runs dry"),
    (advised(Reach.MISSING), "steerable", Status.WARNING, "there is no capd"),
    (advised(Reach.CLOSED), "steerable", Status.WARNING, "capd's socket → sudo usermod -aG pals"),
    (node(capd={**NO_CAPD, "reach": Reach.SILENT}, chosen=NOBODY), "steerable", Status.WARNING, "capd hangs"),
    (node(), "other-writers", Status.OK, "no PALS agent of this run directory writes"),
    (node(run_dir={"writer": WriterFacts(pid=9, alive=True, boards=2)}), "other-writers", Status.OK, "sets 2 boards"),
    (node(run_dir={"writer": WriterFacts(pid=9, boards=1)}), "other-writers", Status.PROBLEM, "pals restore"),
    (node(run_dir={"writer": WriterFacts(error="x cannot be read")}), "other-writers", Status.WARNING, "nvidia-smi -q"),
    (node(), "agent", Status.OK, "none runs"),
    (
        node(run_dir={"agents": (AGENT,)}),
        "agent",
        Status.OK,
        "m: policy static, mode auto, tick 3, 0.2 s ago",
    ),
    (
        node(run_dir={"agents": (replace(AGENT, age_s=60.0),)}),
        "agent",
        Status.WARNING,
        "no longer ticks",
    ),
    (node(), "engine", Status.OK, "test/model; vllm 0.32.0, tp1 pp1 dp1 ep0, boards 0; plugin loaded"),
    (engine(info=replace(ENGINE.info, boards=())), "engine", Status.PROBLEM, "CUDA_VISIBLE_DEVICES"),
    (engine(complete=False), "engine", Status.WARNING, "only 1 data-parallel rank"),
    (node(run_dir={"engines": ()}), "engine", Status.OK, "pals serve MODEL"),
    (node(), "telemetry", Status.OK, "3 running, 0 waiting, last step 0.1 s ago"),
    (engine(age_s=9.0), "telemetry", Status.WARNING, "PALS plugin failed"),
    (engine(age_s=9.0, sample=engine_sample()), "telemetry", Status.OK, "idle, no step yet"),
    (engine(sample=None), "telemetry", Status.PROBLEM, "ended"),
    (node(), "active-sequences", Status.OK, "limit 64 of 64, setpoint 32 in force; offers active_limit"),
    (engine(setpoint=None), "active-sequences", Status.OK, "no setpoint in force"),
    (engine(info=replace(ENGINE.info, capabilities={})), "active-sequences", Status.WARNING, "launch limit 64"),
    (node(run_dir={"without_plugin": (8, 9)}), "plugin", Status.WARNING, "process 8, 9"),
    (node(run_dir={"killed": ("process 8 (m)",)}), "killed", Status.WARNING, "process 8 (m) was killed"),
    (node(run_dir={"unreadable": ("a.channel",)}), "channel", Status.WARNING, "engine's user"),
    (node(), "vllm", Status.OK, ">=0.28,<0.34"),
    (node(software={"vllm": None}), "vllm", Status.WARNING, "pip install 'vllm>=0.28,<0.34'"),
    (node(software={"vllm": "0.99", "vllm_fits": False}), "vllm", Status.WARNING, "vllm>=0.28,<0.34"),
    (node(software={"vllm_has_kernels": False}), "vllm", Status.PROBLEM, "pure-Python build"),
    (node(nvml=EMULATED, software={"vllm_has_kernels": False}), "vllm", Status.OK, "pure-Python build"),
    (node(software={"entry_points": ()}), "entry-points", Status.PROBLEM, "pip install"),
    (node(software={"packages": {"nvidia-ml-py": "13.0"}}), "package", Status.WARNING, "pip install aiohttp"),
    (node(software={"packages": {"pynvml": "11.5.0"}}), "package", Status.WARNING, "pip uninstall pynvml"),
    (node(run_dir={"writable": False}), "run-directory", Status.PROBLEM, "PALS_RUN_DIR"),
    (node(run_dir={"exists": False}), "run-directory", Status.OK, "will be made"),
    (node(), "variables", Status.OK, "none stands in the way"),
    (env(VLLM_PLUGINS="other"), "variables", Status.PROBLEM, "add pals"),
    (env(VLLM_PLUGINS="pals"), "variables", Status.WARNING, "pals_emulated"),
    (env(VLLM_PLUGINS="pals, pals_emulated"), "variables", Status.OK, "none"),
    (env(PALS_PLUGIN="0"), "variables", Status.WARNING, "unset PALS_PLUGIN"),
    (env(PALS_EMU="0"), "variables", Status.WARNING, "uses no GPU"),
    (env(VLLM_TARGET_DEVICE="cpu"), "variables", Status.WARNING, "platform plugins"),
    (env(CUDA_VISIBLE_DEVICES="GPU-1,GPU-2"), "variables", Status.WARNING, "list indices"),
    (env(CUDA_VISIBLE_DEVICES="0,1"), "variables", Status.OK, "none"),
    (boards(board(0), info(index=1, name="Another")), "variables", Status.WARNING, "PCI_BUS_ID"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "check", "status", "told"), CASES, ids=[f"{c[1]}-{c[3]}" for c in CASES])
def test_each_state_of_a_node_gets_its_status_and_what_to_do(
    state: NodeFacts, check: str, status: Status, told: str
) -> None:
    found = [f for f in findings(state) if f.check == check and f.status is status]

    assert any(told in f"{f.text} → {f.remedy}" for f in found), found


def test_whatever_is_not_ok_has_a_one_line_remedy_or_nothing_that_can_be_done() -> None:
    for state, *_ in CASES:
        for f in findings(state):
            assert "\n" not in f.text + (f.remedy or "")
            if f.status in (Status.WARNING, Status.PROBLEM):
                assert f.remedy, f
            if f.status is Status.OK:
                assert f.remedy is None, f


def test_a_sound_node_has_nothing_but_ok() -> None:
    assert worst(findings(node())) is Status.OK
    assert worst([]) is Status.OK


def test_the_worst_status_decides() -> None:
    assert worst(findings(boards(board(meter=None)))) is Status.UNKNOWN
    assert worst(findings(engine(age_s=9.0))) is Status.WARNING
    assert worst(findings(boards(LOST))) is Status.PROBLEM


def test_the_docs_name_every_check_and_every_value() -> None:
    for state, *_ in CASES:
        for f in findings(state):
            assert f"| {f.area} | `{f.check}` |" in DOCS
            row = next(line for line in DOCS.splitlines() if line.startswith(f"| {f.area} | `{f.check}` |"))
            for name in f.values:
                assert f"`{name}`" in row, (f.check, name)


def test_json_says_the_same_as_the_findings() -> None:
    for state, *_ in CASES:
        found = findings(state)
        report = json.loads(as_json(found, pals="0.1.0", run_dir="/run/pals", emulated=False))
        assert report["format"] == 1
        assert [(f["check"], f["status"], f["text"]) for f in report["findings"]] == [
            (f.check, f.status.value, f.text) for f in found
        ]
        assert sum(report["counts"].values()) == len(found)


def printed(found: list[Finding], width: int, *, emulated: bool = False) -> str:
    out = io.StringIO()
    print_findings(found, Console(file=out, width=width, highlight=False), emulated=emulated)
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(width: int) -> None:
    for state, *_ in CASES:
        found = findings(state)
        text = printed(found, width)
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
        if width == 120:
            squeezed = "".join(text.split())
            assert all("".join(f.text.split()) in squeezed for f in found if f.area != "boards")


def test_boards_of_which_the_same_is_true_share_a_line() -> None:
    eight = boards(*(board(i, meter=replace(METER, power_w=200.0 + 30.0 * (i == 5))) for i in range(8)))

    lines = [line.split() for line in printed(findings(eight), 120).splitlines()]

    assert ["ok", "boards", "0-7", "persistence", "mode", "on"] in lines
    assert any(line[:4] == ["ok", "boards", "0-4,6-7", "draws"] for line in lines)
    assert any(line[:5] == ["ok", "board", "5", "draws", "230"] for line in lines)
    assert sum(line[:1] == ["ok"] and "board" in line[1] for line in lines) == 8 + 2 + 6  # identity, power, the rest
    assert ranges([0, 1, 3]) == "0-1,3"


def test_emulated_boards_are_marked() -> None:
    text = printed(findings(node(nvml=EMULATED)), 80, emulated=True)

    assert "EMULATED: 2 boards" in text
    assert "Boards (EMULATED)" in text
    assert "EMULATED" not in printed(findings(node()), 80)


def test_text_in_square_brackets_is_not_taken_for_markup() -> None:
    text = printed(findings(engine(info=replace(ENGINE.info, model="[red]odd[/red] [bold]"))), 120)

    assert "[red]odd[/red] [bold]" in text


def test_versions_are_compared_as_versions() -> None:
    pytest.importorskip("packaging")

    assert fits("0.32.0", ">=0.28,<0.34")
    assert fits("0.9.2", ">=0.28,<0.34") is False
    assert fits("not a version", ">=0.28") is None


# --- the command ------------------------------------------------------------------------------------------------


def doctor(*args: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    traps = ("PALS_", "VLLM_", "CUDA_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(traps)}
    environ |= {"PALS_RUN_DIR": str(run_dir), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "pals.cli", "doctor", *args], capture_output=True, text=True, env=environ, timeout=60
    )


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[BoardBank]:
    pytest.importorskip("pynvml")
    made = BoardBank.create(tmp_path / "emulated-boards.bank", board_specs()["a100-sxm4-80gb"], 2)
    yield made
    made.close()


def test_without_a_driver_it_helps_and_leaves_nothing(tmp_path: Path) -> None:
    done = doctor(run_dir=tmp_path / "run")

    assert done.returncode == 1
    assert "NVIDIA driver" in done.stdout
    assert "--emulate" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_emulated_boards_are_examined_and_the_killed_server_is_noticed(tmp_path: Path, bank: BoardBank) -> None:
    done = doctor("--json", "--watch-s", "0.4", run_dir=tmp_path)

    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["emulated"] is True
    by_check = {f["check"]: f for f in report["findings"] if f["subject"] in ("", "board 1")}
    assert by_check["nvml"]["status"] == "warning"
    assert by_check["power-limit"]["values"]["max_limit_w"] == 400.0
    assert by_check["energy-counter"]["status"] == "ok"
    assert by_check["write"]["status"] == "ok"
    assert done.returncode == (1 if report["counts"]["problem"] else 0)


def limits_w(bank: BoardBank) -> list[float]:
    return [bank.reading(i, time.monotonic()).requested_limit_w for i in range(2)]


def test_nothing_is_written_unless_it_is_asked_for_and_then_boards_are_left_as_found(
    tmp_path: Path, bank: BoardBank
) -> None:
    bank.set_limit(1, 350.0, time.monotonic())
    writes = bank._boards["writes"].copy()  # nothing else tells of writes that were undone
    doctor("--watch-s", "0", run_dir=tmp_path)
    assert (bank._boards["writes"] == writes).all()

    done = doctor("--try-writes", "--json", "--watch-s", "0", run_dir=tmp_path)

    found = {(f["check"], f["subject"]): f for f in json.loads(done.stdout)["findings"] if f["area"] == "trial"}
    assert "lock the SM clock for less than 2 s" in done.stderr  # said before it is done
    assert found["clock-lock", "board 0"]["status"] == "ok"
    assert found["limit-write", "board 1"]["values"]["enforced_w"] == 345.0
    assert found["write-latency", "board 0"]["values"]["writes"] == 20
    assert found["put-back", "board 1"]["status"] == "ok"
    assert limits_w(bank) == [400.0, 350.0]
    assert not (tmp_path / "limits-found.json").exists()


def test_a_board_at_work_is_tried_only_where_that_is_said(tmp_path: Path, bank: BoardBank) -> None:
    now_s = time.monotonic()
    for second in range(60):
        bank.book([0], now_s + second, now_s + second + 1.0, Load(compute=0.3, memory=0.5), now_s)

    done = doctor("--try-writes", "--json", "--watch-s", "0.5", run_dir=tmp_path)

    tried = {f["subject"]: f for f in json.loads(done.stdout)["findings"] if f["area"] == "trial"}
    assert "not idle (busy" in tried["board 0"]["text"]
    assert "--try-writes=busy" in tried["board 0"]["remedy"]
    assert tried["board 1"]["check"] == "put-back"


def test_a_living_agents_boards_are_never_tried(tmp_path: Path, bank: BoardBank) -> None:
    me = os.getpid()
    write_record(
        tmp_path / "limits-found.json", {bank.uuid(0): (400.0, [300.0])}, pid=me, started=process_started(me) or 0
    )
    record = (tmp_path / "limits-found.json").read_bytes()

    done = doctor("--try-writes=busy", "--json", "--watch-s", "0", run_dir=tmp_path)

    tried = [f for f in json.loads(done.stdout)["findings"] if f["area"] == "trial"]
    assert ["another hand" in f["text"] for f in tried] == [True, True]
    assert (tmp_path / "limits-found.json").read_bytes() == record


def test_a_wrong_duration_is_refused(tmp_path: Path) -> None:
    done = doctor("--watch-s", "-1", run_dir=tmp_path)

    assert done.returncode == 2
    assert "0..60" in done.stderr


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_damaged_bank_is_a_finding_and_not_a_traceback(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("pynvml")
    (tmp_path / "emulated-boards.bank").write_bytes(content)

    done = doctor(run_dir=tmp_path)

    assert done.returncode == 1
    assert "is not a file of emulated boards" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr
