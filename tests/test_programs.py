"""Programs that may write are told by their command lines, as they look in /proc; nothing else is taken for one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pals.hardware.programs import PALS_AGENT, ancestors, programs


def proc(folder: Path, *lines: str) -> Path:
    """A /proc with one process a line, from 100 on; words are separated by blanks."""
    for pid, line in enumerate(lines, 100):
        (folder / str(pid)).mkdir()
        (folder / str(pid) / "cmdline").write_bytes(line.replace(" ", "\0").encode() + b"\0")
        (folder / str(pid) / "stat").write_text(f"{pid} (a name) with) S {pid - 1} 0 0")
    return folder


@pytest.mark.parametrize(
    ("line", "name", "writes"),
    [
        ("/usr/local/bin/zeusd serve", "zeusd", True),
        ("/usr/bin/nv-hostengine -n", "DCGM host engine", None),
        ("python3 -m dynamo.power_agent", "Dynamo power agent", True),
        ("/opt/venv/bin/python /opt/venv/bin/pals agent --mode auto", PALS_AGENT, True),
        ("nvidia-smi -i 0 -pl 300", "nvidia-smi that sets limits or clocks", True),
        ("watch -n 1 nvidia-smi --power-limit=300", "nvidia-smi that sets limits or clocks", True),
        ("nvidia-smi --query-gpu=power.draw --format=csv -l 1", "nvidia-smi in a loop", False),
    ],
)
def test_known_writers_are_seen(tmp_path: Path, line: str, name: str, writes: bool | None) -> None:
    (found,) = programs(proc(tmp_path, line), without=frozenset())

    assert (found.pid, found.name, found.writes) == (100, name, writes)


@pytest.mark.parametrize(
    "line", ["nvidia-smi", "vim zeusd.toml", "python -m pals.cli status", "/usr/bin/python3 train.py -l 1", ""]
)
def test_others_are_not(tmp_path: Path, line: str) -> None:
    assert programs(proc(tmp_path, line), without=frozenset()) == ()


def test_whoever_asks_and_its_parents_are_left_out(tmp_path: Path) -> None:
    folder = proc(tmp_path, "pals agent", "pals agent", "pals agent")

    assert ancestors(folder, 101) == {101, 100, 99}
    assert [p.pid for p in programs(folder, without=ancestors(folder, 101))] == [102]
    assert os.getpid() not in [p.pid for p in programs()]


def test_a_closed_proc_gives_none(tmp_path: Path) -> None:
    assert programs(tmp_path / "gone") == ()
