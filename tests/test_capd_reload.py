"""The real capd over a driver that is unloaded for a while, counts its boards otherwise, or fails to read one: it goes on, by UUID."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from tests.capd_process import leased, start, stopped, until
from tests.emulated_node import EmulatedNode
from tests.unsteady_nvml import Unsteady

pynvml = pytest.importorskip("pynvml")
TWO_POLLS = 2


@pytest.fixture
def driver(node: EmulatedNode) -> Unsteady:
    return Unsteady(node.folder)


def start_over(node: EmulatedNode, driver: Unsteady) -> subprocess.Popen[str]:
    """A capd that uses this driver."""
    return start(node, PYTHONPATH=f"{driver.path}:{node.environ['PYTHONPATH']}", **driver.environ)


def refusals(node: EmulatedNode) -> list[str | None]:
    return [b["refusal"] for b in node.ask(op="read")["boards"]]


@pytest.mark.parametrize("away", [{"there": False}, {"load": 2, "order": ()}], ids=["no driver", "no boards yet"])
def test_when_a_driver_that_was_away_is_back_with_other_indices_leases_hold_again(
    node: EmulatedNode, driver: Unsteady, away: dict[str, Any]
) -> None:
    capd = start_over(node, driver)
    with leased(node) as talk:
        first, second = (b["uuid"] for b in talk.hello["boards"])
        assert talk.lease(second, 180.0, 1005, ttl_s=60.0)["ok"]
        driver.be(**away)
        for i, found_w in enumerate(node.found_w):
            node.bank.set_limit(i, found_w, 0.0)  # a driver forgets limits
        before = driver.inits()
        until(lambda: driver.inits() >= before + TWO_POLLS, "NVML is tried again and again")
        assert all(refusals(node))
        assert talk.lease(first, 150.0, 1005)["error"] == "lost"

        driver.be(load=3, order=(1, 0))
        until(lambda: node.limits_w() == (200.0, 180.0), "driver back, leases in force on the same boards")
        assert refusals(node) == [None, None]
        assert talk.lease(first, 150.0, 1005, ttl_s=60.0)["ok"]
        assert node.limits_w() == (150.0, 180.0)
    stopped(capd)
    assert node.limits_w() == node.found_w


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNKNOWN", "NOT_SUPPORTED"])
def test_a_board_that_cannot_be_read_is_refused_and_the_other_goes_on(
    node: EmulatedNode, driver: Unsteady, code: str
) -> None:
    capd = start_over(node, driver)
    with leased(node) as talk:
        first, second = (b["uuid"] for b in talk.hello["boards"])
        driver.be(errors={"0": getattr(pynvml, f"NVML_ERROR_{code}")})
        until(lambda: refusals(node)[0] is not None, f"{code}: seen")
        assert "would not read" in str(refusals(node)[0])
        told = talk.lease(first, 150.0, 1005)
        assert (told["ok"], told["error"]) == (False, "lost"), told
        assert talk.lease(second, 150.0, 1005, ttl_s=60.0)["ok"]
        assert node.limits_w() == (200.0, 150.0)

        driver.be()
        until(lambda: refusals(node)[0] is None, f"{code}: over")
        assert talk.lease(first, 150.0, 1005, ttl_s=60.0)["ok"]
    stopped(capd)
    assert node.limits_w() == node.found_w


def test_a_board_that_was_missing_when_the_driver_came_back_is_found_later(
    node: EmulatedNode, driver: Unsteady
) -> None:
    capd = start_over(node, driver)
    with leased(node) as talk:
        driver.be(load=2, order=(0,))
        until(lambda: any(refusals(node)), "a board is missing")
        driver.be(load=2, order=(0, 1))
        until(lambda: not any(refusals(node)), "it is found again", timeout_s=45.0)
        assert talk.hello["ok"]
    stopped(capd)
