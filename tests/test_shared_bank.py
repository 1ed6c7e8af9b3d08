"""Emulated boards of a run directory: made by the first server, joined by others, gone with the last; boards are chosen once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pals.cli.run_folder import BANK_FILE, OWNERS_FILE
from pals.cli.shared_bank import shared_bank
from pals.cli.vllm_options import chosen, emulated_boards
from pals.core.errors import ConfigError
from pals.plant.boards import BoardBank
from pals.plant.specs import board_specs

H100, A100 = board_specs()["h100-sxm5-80gb"], board_specs()["a100-sxm4-80gb"]


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A living process that stands for another server."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def owned_by(folder: Path, pid: int, boards: str, *, count: int = 8) -> None:
    BoardBank.create(folder / BANK_FILE, H100, count).close()
    (folder / OWNERS_FILE).write_text(f"{pid} {boards}\n")


def test_a_second_server_joins_the_same_boards_and_leaves_them_to_the_first(
    tmp_path: Path, other: subprocess.Popen[bytes]
) -> None:
    owned_by(tmp_path, other.pid, "0 1 2 3")
    before = (tmp_path / BANK_FILE).stat().st_ino

    with shared_bank(tmp_path, H100, 8, (4, 5, 6, 7), seed=0, writable=True) as bank:
        assert bank.stat().st_ino == before
        assert (tmp_path / OWNERS_FILE).read_text().splitlines() == [f"{other.pid} 0 1 2 3", f"{os.getpid()} 4 5 6 7"]

    assert (tmp_path / OWNERS_FILE).read_text() == f"{other.pid} 0 1 2 3\n"
    assert (tmp_path / BANK_FILE).exists()


def test_the_last_server_takes_the_boards_along(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    with ExitStack() as exits:
        exits.enter_context(shared_bank(tmp_path, H100, 8, (4, 5), seed=0, writable=True))
        with (tmp_path / OWNERS_FILE).open("a") as owners:
            owners.write(f"{other.pid} 0 1\n")
        other.kill()
        other.wait()

    assert list(tmp_path.iterdir()) == []


def test_boards_left_by_killed_servers_are_made_anew(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    owned_by(tmp_path, other.pid, "0 1 2 3")
    other.kill()
    other.wait()

    with shared_bank(tmp_path, A100, 4, (0, 1, 2, 3), seed=0, writable=True) as path:
        bank = BoardBank.open(path)
        assert (bank.spec.name, bank.count) == ("a100-sxm4-80gb", 4)
        bank.close()


@pytest.mark.parametrize(
    ("spec", "count", "boards", "writable", "told"),
    [
        (A100, 8, (4,), True, "has 8xh100-sxm5-80gb in"),
        (H100, 4, (3,), True, "--emulate 8xh100-sxm5-80gb"),
        (H100, 8, (4,), False, "joins the same boards"),
        (H100, 8, (2, 3, 4), True, "uses boards 2, 3 already"),
    ],
)
def test_other_boards_or_taken_ones_are_refused_and_nothing_changes(
    tmp_path: Path, other: subprocess.Popen[bytes], spec: object, count: int, boards: tuple[int, ...], writable: bool, told: str
) -> None:  # fmt: skip
    owned_by(tmp_path, other.pid, "0 1 2 3")

    with (
        pytest.raises(ConfigError, match="Nothing was started") as refused,
        shared_bank(tmp_path, spec, count, boards, seed=0, writable=writable),  # type: ignore[arg-type]
    ):
        pass

    assert told in str(refused.value)
    assert str(other.pid) in str(refused.value)
    assert (tmp_path / OWNERS_FILE).read_text() == f"{other.pid} 0 1 2 3\n"


@pytest.mark.parametrize(
    ("visible", "options", "boards", "added"),
    [
        ("", [], (0, 1, 2, 3, 4, 5, 6, 7), ["--tensor-parallel-size", "8"]),
        ("4,5,6,7", [], (4, 5, 6, 7), ["--tensor-parallel-size", "4"]),
        ("4,5,6,7", ["-tp", "2"], (4, 5), []),
        ("", ["--tensor-parallel-size=2", "-pp", "2", "--data-parallel-size", "2"], (0, 1, 2, 3, 4, 5, 6, 7), []),
        ("7,6", ["-dp", "2"], (7, 6), []),
    ],
)
def test_a_server_uses_the_boards_its_parallelism_needs(
    visible: str, options: list[str], boards: tuple[int, ...], added: list[str]
) -> None:
    assert emulated_boards(visible, 8, options) == (boards, [*options, *added])


@pytest.mark.parametrize(
    ("visible", "options", "told"),
    [
        ("8", [], "not among the 8 emulated"),
        ("4,5", ["-tp", "4"], "needs 4 boards, 2 are there"),
        ("4,4", [], "different board indices"),
        ("GPU-1234", [], "different board indices"),
        ("", ["-tp", "many"], "'many' is not a size"),
    ],
)
def test_boards_that_do_not_fit_are_refused(visible: str, options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        emulated_boards(visible, 8, options)


def test_spaces_between_indices_do_not_matter() -> None:
    assert chosen("4, 5,6 ", "--boards") == (4, 5, 6)
