"""A capd that was stopped is not to blame and goes on; one that hangs in the driver ends itself, and its release waits for the driver."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from tests.capd_process import files, killed, leased, start, stopped, until
from tests.emulated_node import EmulatedNode, python
from tests.unsteady_nvml import Unsteady

pytest.importorskip("pynvml")
LOW = (200.0, 200.0)
WATCHDOG_S = 2.0
HANGS_S = 4.0


def test_a_capd_that_was_stopped_for_longer_than_its_watchdog_allows_goes_on(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node, ttl_s=0.5):
        capd.send_signal(signal.SIGSTOP)
        threading.Event().wait(1.5 * WATCHDOG_S)  # that time passes is what is tested
        assert node.limits_w() == LOW
        capd.send_signal(signal.SIGCONT)
        assert until(lambda: node.limits_w() == node.found_w, "SIGCONT after 3 s, boards as found") < 1.0
    for _ in range(4):
        node.told("WATCHDOG=1")  # lives for another watchdog's look, and turns
    with leased(node):
        assert node.limits_w() == LOW
    stopped(capd)


def test_a_capd_that_hangs_in_a_setter_ends_itself_and_the_boards_are_put_back(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node, ttl_s=1.0):
        for i in range(2):
            node.bank.inject(i, "slow_setter", HANGS_S, time.monotonic())
        began_s = time.monotonic()
        capd.wait(20)
        print(f"leases of 1 s, setters hang: exit code {capd.returncode} after {time.monotonic() - began_s:.2f} s")
    for i in range(2):
        node.bank.inject(i, "slow_setter", 0.0, time.monotonic())
    assert capd.returncode == 70
    until(lambda: node.limits_w() == node.found_w, "setters answer again, boards as found")
    said, _ = capd.communicate(timeout=20)  # ends with capd-release, which says it in its name
    assert "no turn for 2 s" in said
    assert "capd-release: boards stand at their exit policy" in said


def test_a_release_that_finds_no_driver_waits_for_it(node: EmulatedNode) -> None:
    driver = Unsteady(node.folder)
    over = {"PYTHONPATH": f"{driver.path}:{node.environ['PYTHONPATH']}", **driver.environ}
    capd = start(node, **over)
    with leased(node):
        killed(capd)
    driver.be(there=False)
    before = driver.inits()
    release = node.start(*python("pals_capd.release", *files(node), "--wait", "20"), **over)
    until(lambda: driver.inits() >= before + 2, "NVML is tried again")
    assert node.limits_w() == LOW

    driver.be(load=2)
    began_s = time.monotonic()
    said, _ = release.communicate(timeout=20)
    print(f"driver back, boards as found: {time.monotonic() - began_s:.2f} s")
    assert (release.returncode, node.limits_w()) == (0, node.found_w), said


def test_a_release_waits_for_boards_that_refuse_and_then_says_which_it_could_not_put_back(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node) as talk:
        second = talk.hello["boards"][1]["uuid"]
        killed(capd)
    for i in range(2):
        node.bank.inject(i, "denied", 1.0, time.monotonic())
    release = node.start(*python("pals_capd.release", *files(node), "--wait", "2"))
    log = node.state / "audit.jsonl"
    until(lambda: '"write-failed"' in log.read_text(), "the driver has refused")

    node.bank.inject(0, "denied", 0.0, time.monotonic())
    said, _ = release.communicate(timeout=20)
    assert (release.returncode, node.limits_w()) == (1, (node.found_w[0], 200.0)), said
    assert second in said
    assert "no permission" in said
