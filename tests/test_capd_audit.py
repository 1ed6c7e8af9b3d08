"""capd's audit log: numbered through all its files, checked for missing lines and for raises that came before the lowering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pals_capd.audit import KEPT, FileAudit, read_audit
from pals_capd.main import main

Line = dict[str, Any]
A, B = "GPU-a", "GPU-b"


def write(audit: FileAudit, uuid: str, before_w: float, limit_w: float) -> None:
    assert audit.write("write", uuid=uuid, before_w=before_w, limit_w=limit_w)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two boards under 500 W: 100 W go from the first to the second."""
    path = tmp_path / "audit.jsonl"
    audit = FileAudit(path)
    audit.write("start", limits_w={A: 300.0, B: 200.0}, budgets=[{"watts": 500.0, "uuids": [A, B]}])
    write(audit, A, 300.0, 200.0)
    write(audit, B, 200.0, 300.0)
    audit.write("stop")
    return path


def check(log: Path, *more: str) -> int:
    """The command, on this log."""
    return main(["audit", "--check", "--state", str(log.parent), *more])


def lines_of(log: Path) -> list[Line]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_whole_log_is_in_order(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(log) == 0
    assert capsys.readouterr().out == "4 lines, 0 wrong\n"


def renumbered(lines: list[Line]) -> list[Line]:
    return [{**e, "seq": n} for n, e in enumerate(lines, 1)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda e: [e[0], e[1], e[3]], "line 4 follows line 2"),
        (lambda e: [e[0], e[2], e[1], e[3]], "line 3 follows line 1"),
        (lambda e: renumbered([e[0], e[2], e[1], e[3]]), f"line 2: {B} raised to 300 W, 600 W of 500 W"),
        (lambda e: [e[0], e[1], {**e[2], "before_w": 250.0}, e[3]], f"line 3: {B} stood at 200 W, not at 250 W"),
    ],
    ids=["removed", "reordered", "reordered and numbered anew", "a write is missing"],
)
def test_a_log_that_was_changed_fails_the_check(
    log: Path, change: Callable[[list[Line]], list[Line]], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log.write_text("".join(json.dumps(e) + "\n" for e in change(lines_of(log))))

    assert check(log) == 1
    assert told in capsys.readouterr().out


def test_only_later_lines_are_printed_where_asked(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--state", str(log.parent), "--since", "2"]) == 0
    assert [json.loads(line)["seq"] for line in capsys.readouterr().out.splitlines()] == [3, 4]


def test_a_log_that_is_not_there_or_cannot_be_read_passes_no_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "audit.jsonl"
    assert check(log) == 2
    assert f"there is no {log}" in capsys.readouterr().err
    log.mkdir()
    assert check(log) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_long_log_goes_on_in_a_new_file_and_the_oldest_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, count = tmp_path / "audit.jsonl", 100
    for n in range(count):
        if n % 30 == 0:  # another life of capd
            audit = FileAudit(log, largest_bytes=500)
        assert audit.write("refused", error="range")

    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["audit.jsonl", *(f"audit.{n}.jsonl" for n in range(1, KEPT + 1))]
    )
    assert all(p.stat().st_size < 700 for p in tmp_path.iterdir())
    numbers = [e["seq"] for e in read_audit(log)]
    assert numbers == list(range(numbers[0], count + 1))
    assert check(log) == 0
    assert capsys.readouterr().out == f"{len(numbers)} lines, 0 wrong\n"
    (tmp_path / "audit.2.jsonl").unlink()
    assert check(log) == 1


def test_where_no_new_file_can_be_begun_the_log_grows_on(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    (tmp_path / "audit.3.jsonl").touch()
    (tmp_path / "audit.4.jsonl").mkdir()  # nothing can take its place
    audit = FileAudit(log, largest_bytes=100)

    assert all(audit.write("refused", error="range") for _ in range(9))
    assert [e["seq"] for e in lines_of(log)] == list(range(1, 10))
