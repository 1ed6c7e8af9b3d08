"""capd's state folder: taken by one process, read-only, full, or written by somebody else; whatever it is, boards come back."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.capd_process import files, killed, leased, released, run, start, stopped, until
from tests.emulated_node import EmulatedNode, python
from tests.leasing_client import Talk

pytest.importorskip("pynvml")
LOW, SAFE = (200.0, 200.0), (220.0, 220.0)
NOBODY = 65534


def may_mount() -> bool:
    """Whether this user may give a process mounts of its own."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not may_mount(), reason="needs root that may mount")


def read_only(node: EmulatedNode) -> tuple[str, ...]:
    """A command before another, which then finds the state folder read-only."""
    state = shlex.quote(str(node.state))
    return (
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount --bind {state} {state} && mount -o remount,ro,bind {state} && exec "$@"',
        "sh",
    )


def test_who_finds_the_lock_taken_is_told_by_whom(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node):
        code, said = run(node, *python("pals_capd.main", *files(node), "--socket", f"{node.socket}.second"))
        assert (code, f"another capd (process {capd.pid}) holds {node.state}/lock" in said) == (2, True), said
        assert node.limits_w() == LOW
    stopped(capd)


@needs_mounts
def test_a_release_that_finds_the_folder_read_only_still_sees_a_living_capd(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node):
        code, said = released(node, *read_only(node), told="beside a living capd, refused")
        assert (code, f"process {capd.pid}" in said) == (2, True), said
        assert node.limits_w() == LOW
        killed(capd)

    code, said = released(node, *read_only(node), told="kill -9 and a read-only folder, boards as found")
    assert (code, "cannot be written" in said) == (1, True), said
    assert node.limits_w() == node.found_w


@contextmanager
def full_disk(node: EmulatedNode) -> Iterator[Path]:
    """The state folder on a small disk of its own, and the file that fills it when it is written to."""
    node.state.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(node.state)], check=True)
    try:
        yield node.state / "filling"
    finally:
        subprocess.run(["umount", "-l", str(node.state)], check=True)


def fill(file: Path) -> None:
    """Until nothing more goes in."""
    with file.open("wb", buffering=0) as f:
        try:
            while f.write(b"x" * 4096):
                pass
        except OSError:
            return


@needs_mounts
def test_on_a_full_disk_leases_end_new_ones_are_refused_and_a_release_still_works(node: EmulatedNode) -> None:
    with full_disk(node) as filling:
        capd = start(node)
        with leased(node, ttl_s=1.0) as talk:
            first, second = (b["uuid"] for b in talk.hello["boards"])
            assert talk.lease(second, 190.0, 1005, ttl_s=60.0)["outcome"] == "written"
            fill(filling)
            until(lambda: node.limits_w()[0] == node.found_w[0], "full disk, lease of 1 s: as found")
            assert talk.lease(first, 200.0, 1005)["error"] == "state"
            assert node.limits_w()[0] == node.found_w[0]
            told = node.ask(op="read")
            assert "cannot be written" in told["alarm"]
        killed(capd)

        code, said = released(node, told="kill -9 and a full disk, boards as found")
        assert (code, node.limits_w()) == (1, node.found_w), said
        assert "cannot be written" in said
        filling.unlink()
        assert released(node)[0] == 0
        stopped(start(node))
        assert run(node, *python("pals_capd.main", "audit", "--check", "--state", str(node.state)))[0] == 0


def hand_over(record: Path) -> None:
    os.chown(record, NOBODY, -1)


def link(record: Path) -> None:
    record.rename(record.with_name("elsewhere"))
    record.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("how", "why"),
    [(lambda p: p.chmod(0o622), "mode 622"), (hand_over, f"owner {NOBODY}"), (link, "symbolic link")],
    ids=["anybody may write it", "another user's", "a link"],
)
def test_a_record_that_another_user_may_have_written_is_not_believed(node: EmulatedNode, how: object, why: str) -> None:
    if how is hand_over and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    capd = start(node)
    with leased(node):
        killed(capd)
    assert callable(how)
    how(node.state / "state.json")

    code, said = released(node)
    assert (code, why in said, "no board is written" in said) == (1, True, True), said
    again = start(node)
    assert why in node.ask(op="read")["alarm"]
    talk = Talk(str(node.socket))
    assert talk.lease(talk.hello["boards"][0]["uuid"], 150.0, 1005)["error"] == "state"
    talk.close()
    assert why in stopped(again)
    assert node.limits_w() == LOW


def test_without_a_record_a_release_leaves_the_boards(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node):
        killed(capd)
    (node.state / "state.json").unlink()

    assert released(node) == (0, "capd-release: boards stand at their exit policy\n")
    assert node.limits_w() == LOW, "nothing says that they are ours"


def test_a_budget_outlives_client_and_capd(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node) as talk:
        boards = [b["uuid"] for b in talk.hello["boards"]]
        assert talk.ask(op="budget", watts=440.0, boards=boards)["ok"]
        killed(capd)

    assert released(node, told="kill -9 under a client's budget, boards at their parts of it")[0] == 0
    assert node.limits_w() == SAFE
    again = start(node)
    assert node.ask(op="read")["budget"]["watts"] == 440.0
    assert node.ask(op="release_all")["ok"]
    assert node.limits_w() == node.found_w
    stopped(again)
