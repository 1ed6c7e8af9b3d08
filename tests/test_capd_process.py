"""`pals-capd` and `capd-release` as processes on emulated boards: what is promised of each way to start, to end and to be ill-treated."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.capd_process import files, killed, leased, released, run, start, stopped, until
from tests.emulated_node import EmulatedNode, python
from tests.leasing_client import Talk

pytest.importorskip("pynvml")
SAFE = "[node]\nbudget_w = 500\nsafe_w = 220\n"
BOTH_LOW, BOTH_SAFE = (200.0, 200.0), (220.0, 220.0)


def refused(node: EmulatedNode) -> str:
    """What a capd says that will not start."""
    capd = node.start(*python("pals_capd.main", *files(node), "--socket", f"{node.socket}.second"))
    said, _ = capd.communicate(timeout=20)
    assert capd.returncode == 2, said
    return said


def test_a_second_capd_does_not_start_and_touches_nothing(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node):
        assert "two would fight" in refused(node)
        assert node.limits_w() == BOTH_LOW
        assert released(node)[0] == 2, "a release beside a living capd"
        assert node.limits_w() == BOTH_LOW
    stopped(capd)


@pytest.mark.parametrize(("policy", "exits"), [("", None), (SAFE, BOTH_SAFE)], ids=["restore", "safe"])
def test_what_a_killed_capd_left_is_undone_once_by_capd_release(
    node: EmulatedNode, policy: str, exits: tuple[float, ...] | None
) -> None:
    node.policy.write_text(policy)
    capd = start(node)
    with leased(node):
        killed(capd)
    assert node.limits_w() == BOTH_LOW

    assert released(node) == (0, "capd-release: boards stand at their exit policy\n")
    assert node.limits_w() == (exits or node.found_w)
    node.bank.set_limit(0, 180.0, time.monotonic())  # somebody's choice since
    assert released(node)[0] == 0
    assert node.limits_w()[0] == 180.0, "another hand's limit below the exit policy is left"


def test_a_release_where_no_capd_ever_ran_does_nothing(node: EmulatedNode) -> None:
    node.bank.set_limit(0, 250.0, time.monotonic())

    code, said = released(node)
    assert (code, node.limits_w()[0]) == (0, 250.0)
    assert "nothing to do" in said
    assert not node.state.exists()


def test_the_next_capd_undoes_what_a_killed_one_left(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node):
        killed(capd)

    again = start(node)
    assert node.limits_w() == node.found_w, "before it is ready"
    stopped(again)
    assert json.loads((node.state / "state.json").read_text())["boards"] == {}


def test_a_record_of_another_boot_is_history(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node):
        killed(capd)
    record = node.state / "state.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "boot_id": "another"}))

    stopped(start(node))
    assert node.limits_w() == BOTH_LOW, "nobody knows that these were ours: a boot sets boards to their defaults"


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\x00", b'{"format":"pals-capd-state/9"}'], ids=["empty", "bytes", "newer"]
)
def test_with_an_unreadable_record_nothing_is_touched_and_it_says_so(node: EmulatedNode, damage: bytes) -> None:
    capd = start(node)
    with leased(node):
        killed(capd)
    (node.state / "state.json").write_bytes(damage)

    code, said = released(node)
    assert (code, "no board is written" in said) == (1, True)
    again = start(node)
    assert "no board is written" in node.ask(op="read")["alarm"]
    with closing(Talk(str(node.socket))) as talk:
        told = talk.lease(talk.hello["boards"][0]["uuid"], 150.0, 1005)
    assert (told["ok"], told["error"]) == (False, "state")
    assert node.limits_w() == BOTH_LOW
    assert "alarm" in stopped(again)
    assert (node.state / "state.json").read_bytes() == damage
    assert node.limits_w() == BOTH_LOW


def test_when_the_disk_is_full_no_board_is_raised_or_newly_held_and_leases_still_end(node: EmulatedNode) -> None:
    capd = start(node)
    _, hard = resource.prlimit(capd.pid, resource.RLIMIT_FSIZE)
    with closing(Talk(str(node.socket))) as talk:
        first, second = (b["uuid"] for b in talk.hello["boards"])
        assert talk.lease(first, 200.0, 1005, ttl_s=1.0)["ok"]
        resource.prlimit(capd.pid, resource.RLIMIT_FSIZE, (0, hard))  # each write fails from now on

        assert talk.lease(second, 200.0, 1005)["error"] == "state"
        until(lambda: talk.lease(first, 300.0, 1005, ttl_s=1.0).get("error") == "state", "a raise is refused")
        assert talk.lease(first, 150.0, 1005, ttl_s=1.0)["outcome"] == "written", "lowering never waits"
        assert "cannot be written" in node.ask(op="read")["alarm"]
        until(lambda: node.limits_w() == node.found_w, "with a full disk, found limits are back")
        resource.prlimit(capd.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert talk.lease(second, 200.0, 1005)["ok"]
    assert node.ask(op="read")["alarm"] is None
    stopped(capd)


def test_an_orderly_end_leaves_boards_as_found_and_no_socket(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node):
        began_s = time.monotonic()
        stopped(capd)
        print(f"SIGTERM: ended, boards as found, after {time.monotonic() - began_s:.2f} s")
    assert (node.limits_w(), node.socket.exists()) == (node.found_w, False)
    assert sorted(p.name for p in node.state.iterdir()) == ["audit.jsonl", "lock", "policy.toml", "state.json"]


def test_a_lease_that_is_not_renewed_ends_whatever_the_wall_clock_says(node: EmulatedNode) -> None:
    """The daemon runs where every look at the wall clock tells another year."""
    (node.folder / "sitecustomize.py").write_text("import random, time\ntime.time = lambda: random.uniform(0, 4e9)\n")
    path = f"{node.folder}:{node.environ['PYTHONPATH']}"
    capd = start(node, PYTHONPATH=path)
    with leased(node, ttl_s=1.0):
        began_s = time.monotonic()
    until(lambda: node.limits_w() == node.found_w, "boards as found")
    assert 0.8 < time.monotonic() - began_s < 2.0
    stopped(capd)


def test_a_wrong_policy_is_refused_at_start_and_not_taken_on_reload(node: EmulatedNode) -> None:
    node.policy.write_text("[node]\nttl_s = 7\n")
    capd = start(node)
    for wrong in ("[node]\nttl_s = 'long'\n", "[node]\nbudget_w = 1\n", "nonsense"):
        node.policy.write_text(wrong)
        capd.send_signal(signal.SIGHUP)
        for _ in range(2):  # it reads the file after the round that answers the first
            node.ask(op="hello")
    assert node.ask(op="hello")["ttl_s"] == 7.0
    node.policy.write_text("[node]\nttl_s = 9\n")
    capd.send_signal(signal.SIGHUP)
    until(lambda: node.ask(op="hello")["ttl_s"] == 9.0, "the policy is read anew")
    assert stopped(capd).count("the policy before is still in force") == 3

    node.policy.chmod(0o666)
    assert "may be written by" in refused(node)
    node.policy.write_text("nonsense")
    node.policy.chmod(0o600)
    assert str(node.policy) in refused(node)


@pytest.mark.parametrize("lose", [lambda p: p.write_text("nonsense"), lambda p: p.unlink()], ids=["wrong", "gone"])
def test_without_its_policy_file_a_release_keeps_the_budget_that_was_in_force(
    node: EmulatedNode, lose: Callable[[Path], object]
) -> None:
    node.policy.write_text(SAFE)
    capd = start(node)
    with leased(node, 180.0):
        lose(node.policy)
        capd.send_signal(signal.SIGHUP)
        for _ in range(2):
            node.ask(op="hello")
        assert node.limits_w() == (180.0, 180.0), "the policy before holds on"
        killed(capd)

    code, said = released(node)
    assert (code, node.limits_w()) == (0, BOTH_SAFE), said
    assert "the policy that was in force before is used" in said
    assert str(node.policy) in refused(node), "and without it no capd starts"


def test_the_kill_switch_releases_everything_and_refuses_until_it_is_gone(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node) as talk:
        (node.state / "off").touch()
        until(lambda: node.limits_w() == node.found_w, "kill switch: boards as found")
        told = talk.lease(talk.hello["boards"][0]["uuid"], 200.0, 1005)
        assert (told["ok"], told["error"], node.ask(op="read")["off"]) == (False, "off", True)
        (node.state / "off").unlink()
        until(lambda: talk.lease(talk.hello["boards"][0]["uuid"], 200.0, 1005)["ok"], "leased again")
    stopped(capd)


def test_a_dry_run_does_everything_but_the_write(node: EmulatedNode) -> None:
    capd = start(node, "--dry-run")
    with leased(node) as talk:
        uuid = talk.hello["boards"][0]["uuid"]
        told = talk.lease(uuid, 190.0, 1005)
        assert (told["outcome"], told["watts"]["accepted"]) == ("dry-run", 190.0)
        assert talk.lease(uuid, 9.0, 1005)["error"] == "range"
        assert node.limits_w() == node.found_w
    stopped(capd)
    assert "audit.dry-run.jsonl" in {p.name for p in node.state.iterdir()}


def test_a_capd_that_was_stopped_and_goes_on_lets_overdue_leases_end_at_once(node: EmulatedNode) -> None:
    capd = start(node)
    with leased(node, ttl_s=0.5):
        capd.send_signal(signal.SIGSTOP)
        time.sleep(1.5)  # longer than the lease, shorter than any watchdog
        assert node.limits_w() == BOTH_LOW
        capd.send_signal(signal.SIGCONT)
        assert until(lambda: node.limits_w() == node.found_w, "after SIGCONT, boards as found") < 1.0
    stopped(capd)


def test_the_service_manager_is_told_ready_alive_and_stopping(node: EmulatedNode) -> None:
    capd = start(node)
    node.told("WATCHDOG=1")
    node.told("WATCHDOG=1")
    capd.terminate()
    node.told("STOPPING=1")
    capd.communicate(timeout=20)


def test_the_log_tells_every_write_in_order_and_a_check_finds_what_is_missing(node: EmulatedNode) -> None:
    node.policy.write_text(SAFE)
    capd = start(node)
    with leased(node, 180.0) as talk:
        for watts in (150.0, 240.0):
            for board in talk.hello["boards"]:
                talk.lease(board["uuid"], watts, 1005, ttl_s=60.0)
    stopped(capd)
    log = node.state / "audit.jsonl"

    lines = log.read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines]
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    assert (events[0]["event"], events[-1]["event"]) == ("start", "stop")
    assert {"uid", "why", "before_w", "limit_w", "enforced_w"} <= next(
        e for e in events if e["event"] == "write"
    ).keys()
    assert checked(node) == (0, f"{len(lines)} lines, 0 wrong")
    log.write_text("".join(lines[:3] + lines[4:]))
    assert checked(node)[0] == 1
    first, second = (b["uuid"] for b in talk.hello["boards"])
    above = {"event": "write", "uuid": first, "before_w": 220.0, "limit_w": 390.0, "seq": len(lines) + 1}
    log.write_text("".join(lines) + json.dumps(above) + "\n")
    code, said = checked(node)
    assert (code, f"{first} raised to 390 W, 610 W of 500 W" in said) == (1, True)
    log.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert checked(node)[0] == 1
    assert second != first


def checked(node: EmulatedNode) -> tuple[int, str]:
    """`pals-capd audit --check`."""
    code, said = run(node, *python("pals_capd.main", "audit", "--check", "--state", str(node.state)))
    return code, said.strip()


def test_without_a_driver_it_does_not_start(node: EmulatedNode) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PALS_", "LD_"))}
    done = subprocess.run(
        python("pals_capd.main", *files(node), "--socket", str(node.socket)),
        env=environ, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no NVIDIA driver answers" in done.stderr
    assert "nothing was changed" in done.stderr
