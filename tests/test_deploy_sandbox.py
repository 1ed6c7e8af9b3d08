"""The real capd in its unit's sandbox on emulated boards, and the container's first process: they start, serve, and leave nothing limited."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.emulated_node import ROOT, EmulatedNode, python, until

pytest.importorskip("pynvml")
UNIT = ROOT / "deploy/systemd/pals-capd.service"
ENTRYPOINT = ROOT / "deploy/container/entrypoint.sh"
GID, READER = 4242, 65534
sandboxed = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("systemd-analyze") or not ctypes.util.find_library("seccomp"),
    reason="a sandbox needs root, systemd-analyze (which system calls a group has) and libseccomp",
)


def in_sandbox(node: EmulatedNode, *command: str) -> list[str]:
    """The command line that runs `command` in the unit's sandbox; only the node's folder may be written."""
    return [*python("tests.unit_sandbox", str(UNIT), str(GID), str(node.folder)), *command]


def daemon(node: EmulatedNode) -> list[str]:
    """capd's command line."""
    files = ("--policy", str(node.policy), "--state", str(node.state), "--socket", str(node.socket))
    return [*python("pals_capd.main", *files, "--group", str(GID))]


def release(node: EmulatedNode) -> list[str]:
    """capd-release's command line."""
    return [*python("pals_capd.release", "--policy", str(node.policy), "--state", str(node.state))]


def as_user(uid: int, gid: int, do: Callable[[], bool]) -> bool:
    """Whether another user succeeds, in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            code = 0 if do() else 1
        except PermissionError:
            code = 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 0


@sandboxed
def test_in_the_sandbox_of_its_unit_capd_serves_its_group_and_reads_its_policy_anew(node: EmulatedNode) -> None:
    node.policy.write_text(f'[rights]\n{READER} = "read"\n')
    node.policy.chmod(0o600)
    capd = node.start(*in_sandbox(node, *daemon(node)))
    try:
        node.told("READY=1")
        facts = node.socket.stat()
        assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (0, GID, 0o660)
        assert stat.S_IMODE(node.state.stat().st_mode) == 0o700
        assert as_user(READER, GID, lambda: node.ask(op="hello")["rights"] == "read")
        assert not as_user(READER, GID + 1, lambda: bool(node.ask(op="hello")["ok"]))
        node.lower_all(str(node.socket))
        node.policy.write_text("[node]\nttl_s = 7.0\n")
        capd.send_signal(signal.SIGHUP)
        node.told("WATCHDOG=1")
        assert until(lambda: node.ask(op="hello")["ttl_s"] == 7.0)
    finally:
        capd.send_signal(signal.SIGTERM)
        said, _ = capd.communicate(timeout=20)
    assert (capd.returncode, said) == (0, "")
    assert node.limits_w() == node.found_w


@sandboxed
def test_in_the_sandbox_of_its_unit_capd_release_puts_back_what_a_killed_capd_left(node: EmulatedNode) -> None:
    capd = node.start(*in_sandbox(node, *daemon(node)))
    node.told("READY=1")
    node.lower_all(str(node.socket))
    capd.kill()
    capd.communicate()

    assert node.limits_w() == (200.0, 200.0)
    done = node.start(*in_sandbox(node, *release(node)))
    assert (done.communicate()[0], done.returncode) == ("capd-release: boards stand at their exit policy\n", 0)
    assert node.limits_w() == node.found_w


@sandboxed
def test_in_the_sandbox_of_its_unit_capd_sees_other_writers(node: EmulatedNode) -> None:
    zeusd = node.folder / "zeusd"
    zeusd.symlink_to("/bin/sleep")
    with subprocess.Popen([str(zeusd), "60"]) as other:
        capd = node.start(*in_sandbox(node, *daemon(node)))
        try:
            node.told("READY=1")
            assert until(lambda: f"zeusd (process {other.pid})" in node.ask(op="read")["others"])
        finally:
            other.kill()
            capd.terminate()
            capd.communicate(timeout=20)


@sandboxed
def test_the_sandbox_of_the_unit_holds(node: EmulatedNode) -> None:
    """Otherwise the tests above prove nothing."""
    attempts = f"""
import mmap, os, socket
def refused(do):
    try: do()
    except OSError as e: return type(e).__name__ + f" {{e.errno}}"
    return "done"
print([refused(do) for do in (
    lambda: open("{node.folder}/inside", "w"), lambda: open("/etc/outside", "w"), lambda: os.setuid(1),
    lambda: os.chown("{node.folder}/inside", -1, {GID}), lambda: os.chown("{node.folder}/inside", 1, -1),
    lambda: socket.create_connection(("127.0.0.1", 9)), lambda: os.mknod("{node.folder}/device", 0o20600, 195 << 8),
    lambda: os.sched_setaffinity(0, [0]), lambda: os.chroot("{node.folder}"))])
"""
    done = node.start(*in_sandbox(node, sys.executable, "-c", attempts))
    assert done.communicate()[0].strip() == str(
        ["done", "OSError 30", "PermissionError 1", "done", "PermissionError 1", "OSError 101", "PermissionError 1",
         "PermissionError 1", "PermissionError 1"]
    )  # fmt: skip


def test_in_a_container_boards_are_put_back_when_capd_is_killed(node: EmulatedNode) -> None:
    container = start_container(node)
    node.lower_all(str(node.socket))
    os.kill(capd_below(container.pid), signal.SIGKILL)

    said, _ = container.communicate(timeout=20)
    assert container.returncode == 128 + signal.SIGKILL
    assert "boards stand at their exit policy" in said
    assert node.limits_w() == node.found_w


def test_in_a_container_signals_reach_capd(node: EmulatedNode) -> None:
    container = start_container(node)
    assert stat.S_IMODE(node.socket.stat().st_mode) == 0o660
    node.lower_all(str(node.socket))
    node.policy.write_text("[node]\nttl_s = 7.0\n")
    container.send_signal(signal.SIGHUP)
    assert until(lambda: node.ask(op="hello")["ttl_s"] == 7.0)
    container.terminate()

    container.communicate(timeout=20)
    assert container.returncode == 0
    assert not node.socket.exists()  # it ended in order
    assert node.limits_w() == node.found_w


def test_a_container_that_was_killed_as_a_whole_is_mended_by_the_next_start(node: EmulatedNode) -> None:
    container = start_container(node)
    node.lower_all(str(node.socket))
    capd = capd_below(container.pid)
    container.kill()
    os.kill(capd, signal.SIGKILL)
    container.communicate()
    assert node.limits_w() == (200.0, 200.0)

    start_container(node).terminate()
    assert node.limits_w() == node.found_w


def start_container(node: EmulatedNode) -> subprocess.Popen[str]:
    """The container's first process, until capd is ready."""
    where = {"PALS_CAPD_POLICY": str(node.policy), "PALS_CAPD_STATE": str(node.state)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    container = node.start(
        "/bin/sh", str(ENTRYPOINT), "--socket", str(node.socket), "--group", str(os.getgid()), PATH=path, **where
    )
    node.told("READY=1")
    return container


def capd_below(pid: int) -> int:
    """The daemon that a container's first process started."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
