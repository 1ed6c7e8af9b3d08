"""`pals doctor`: every state of a node gets a status and a remedy, reads well in any terminal, and never ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
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
from pals.core.quantities import PowerSample
from pals.engines.installed import fits
from pals.plant.boards import BoardBank
from pals.plant.specs import board_specs
from pals.views.doctor import as_json, findings, print_findings, worst
from pals.views.doctor.render import ranges
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
    }
    for name, value in changes.items():
        sound[name] = replace(sound[name], **value)
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


def env(**variables: str) -> NodeFacts:
    return node(software={"environment": variables})


NONE = "no NVIDIA driver found (NVML Shared Library Not Found); to run without a GPU use --emulate"
LOST = BoardFacts(index=0, error="board 0: the board is lost")
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
    (node(), "write", Status.OK, "not tried"),
    (node(nvml={"may_write": False}, privilege={"euid": 1000}), "write", Status.WARNING, "sudo pals agent"),
    (node(privilege={"sys_admin": False}), "write", Status.WARNING, "--cap-add SYS_ADMIN"),
    (node(nvml=EMULATED), "write", Status.OK, "emulated boards accept"),
    (node(nvml=EMULATED | {"may_write": False}), "write", Status.WARNING, "--unprivileged"),
    (node(), "other-writers", Status.OK, "no PALS agent writes"),
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
