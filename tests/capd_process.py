"""Starts, kills and stops the real `pals-capd` and `capd-release` on an emulated node; waits for what they do, never for a time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from tests.emulated_node import EmulatedNode, python
from tests.leasing_client import Talk


def files(node: EmulatedNode) -> tuple[str, ...]:
    """Policy and state of this node."""
    return ("--policy", str(node.policy), "--state", str(node.state))


def start(node: EmulatedNode, *options: str, **environ: str) -> subprocess.Popen[str]:
    """A capd that is ready."""
    capd = node.start(*python("pals_capd.main", *files(node), "--socket", str(node.socket), *options), **environ)
    node.told("READY=1")
    return capd


def run(node: EmulatedNode, *command: str, **environ: str) -> tuple[int, str]:
    """A command that ends by itself: exit code, and what it says."""
    process = node.start(*command, **environ)
    said, _ = process.communicate(timeout=20)
    return process.returncode, said


def released(node: EmulatedNode, *before: str, told: str = "capd-release") -> tuple[int, str]:
    """Run capd-release, by another command where one is given."""
    began_s = time.monotonic()
    ended = run(node, *before, *python("pals_capd.release", *files(node)))
    print(f"{told}: {time.monotonic() - began_s:.2f} s")
    return ended


def killed(capd: subprocess.Popen[str]) -> str:
    """kill -9; what it had said."""
    capd.kill()
    return capd.communicate()[0]


def stopped(capd: subprocess.Popen[str], code: int = 0) -> str:
    """SIGTERM; what it said."""
    capd.terminate()
    said, _ = capd.communicate(timeout=20)
    assert capd.returncode == code, said
    return said


@contextmanager
def leased(node: EmulatedNode, watts: float = 200.0, ttl_s: float = 60.0) -> Iterator[Talk]:
    """All boards leased."""
    with closing(Talk(str(node.socket))) as talk:
        for board in talk.hello["boards"]:
            told = talk.lease(board["uuid"], watts, 1005, ttl_s=ttl_s)
            assert told["ok"], told
        yield talk


def until(true: Callable[[], bool], told: str, timeout_s: float = 20.0) -> float:
    """Wait until something is so; how long it took, s."""
    began_s = time.monotonic()
    while not true():
        assert time.monotonic() < began_s + timeout_s, told
        time.sleep(0.01)
    print(f"{told}: {time.monotonic() - began_s:.2f} s")
    return time.monotonic() - began_s
