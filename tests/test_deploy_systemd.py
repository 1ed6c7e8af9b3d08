"""The units under a real systemd, in namespaces of its own, on emulated boards: what they promise when capd or the agent dies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated_node import emulated_node, until
from tests.systemd_box import Box, box, can_box

pytest.importorskip("pynvml")
pytestmark = pytest.mark.slow
PROBE = """
import errno, json, os, socket
def refused(do):
    try: do()
    except OSError as e: return errno.errorcode[e.errno]
    return "done"
def opened(name): return refused(lambda: os.close(os.open("/dev/" + name, os.O_RDWR)))
found = {name: opened(name) for name in ("null", "nvidiactl", "nvidia0", "nvidia-uvm")}
found |= {"home": refused(lambda: os.listdir("/root")), "etc": refused(lambda: open("/etc/x", "w")), "setuid": refused(lambda: os.setuid(1))}
found |= {"network": refused(lambda: socket.socket(socket.AF_INET)), "tmp": os.listdir("/tmp")}
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
found |= {key: status[key] for key in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")}
open("/opt/emu/probe.json", "w").write(json.dumps(found))
"""
ENGINE = """
import os, sys
sys.path[:0] = ["/opt/pals/checkout/src", "/opt/pals/checkout", "/opt/pals/site"]
from dataclasses import replace
from pathlib import Path
from pals.runtime.channel import EngineChannel
from tests.worlds import engine_info
channel = EngineChannel(Path("/run/pals-agent"), replace(engine_info(os.getpid()), boards=(0, 1), bank=sys.argv[1]), name="m-0")
sys.stdin.read()
"""
OPTIONS = "Environment='PALS_AGENT_OPTIONS=--mode auto --policy static --power-limit-w 250'\n"


@pytest.fixture(scope="module")
def node_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    if not can_box():
        pytest.skip("needs root, namespaces, cgroup v2 and systemd")
    with emulated_node(None) as node:
        (node.folder / "probe.py").write_text(PROBE)
        more = {"pals-capd": "ExecStartPre=/opt/py/bin/python3 /opt/emu/probe.py\n", "pals-agent": OPTIONS}
        with box(node, more) as made:
            uid, gid = (int(made.run("id", option, "pals")) for option in ("-u", "-g"))
            bank = Path(node.environ["PALS_EMU_BOARDS"])
            os.chown(bank, uid, gid)  # the agent opens emulated boards of its own user only
            bank.chmod(0o660)
            made.run("systemctl", "start", "pals-capd")
            yield made


@pytest.fixture
def leased(node_box: Box) -> Box:
    """capd runs, and every board is leased at 200 W for a minute."""
    assert until(lambda: node_box.show("pals-capd", "ActiveState") == "active" and Path(node_box.socket).exists())
    node_box.node.lower_all(node_box.socket)
    return node_box


def test_the_sandbox_leaves_the_boards_and_one_capability(node_box: Box) -> None:
    found = json.loads((node_box.node.folder / "probe.json").read_text())

    assert found == {
        "null": "done", "nvidiactl": "ENXIO", "nvidia0": "ENXIO",  # let through: no driver answers here
        "nvidia-uvm": "EPERM", "home": "EACCES", "etc": "EROFS", "setuid": "EPERM", "network": "EAFNOSUPPORT", "tmp": [],
        "CapEff": "0000000000200000", "CapBnd": "0000000000200000", "NoNewPrivs": "1", "Seccomp": "2",
    }  # fmt: skip


@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_boards_go_back_and_capd_starts_again_when_it_is_killed_or_hangs(leased: Box, signal: str) -> None:
    restarts = int(leased.show("pals-capd", "NRestarts"))

    leased.run("systemctl", "kill", "--signal", signal, "pals-capd")
    assert until(lambda: leased.node.limits_w() == leased.node.found_w, 6.0)
    assert until(lambda: int(leased.show("pals-capd", "NRestarts")) == restarts + 1)
    assert until(lambda: leased.show("pals-capd", "ActiveState") == "active")
    assert "capd-release: boards stand at their exit policy" in leased.log("pals-capd")


def test_boards_go_back_when_capd_is_stopped(leased: Box) -> None:
    leased.run("systemctl", "stop", "pals-capd")

    assert leased.node.limits_w() == leased.node.found_w
    assert leased.run("stat", "-c", "%a %U", "/var/lib/pals-capd", "/run/pals").split() == [
        "700",
        "root",
        "755",
        "root",
    ]
    leased.run("systemctl", "start", "pals-capd")


def test_an_agent_without_privilege_steers_through_capd_and_is_put_right_when_killed(node_box: Box) -> None:
    node_box.run("systemctl", "restart", "pals-capd")
    node_box.run("systemctl", "start", "pals-agent")  # makes the folder; there is no engine yet
    bank = f"/opt/emu/{Path(node_box.node.environ['PALS_EMU_BOARDS']).name}"
    (node_box.node.folder / "engine.py").write_text(ENGINE)
    as_pals = "setpriv --reuid pals --regid pals --clear-groups /opt/py/bin/python3 /opt/emu/engine.py"
    node_box.run("sh", "-c", f"{{ sleep 60 | {as_pals} {bank}; }} >/opt/emu/engine.log 2>&1 &")

    assert until(lambda: node_box.node.limits_w() == (250.0, 250.0)), node_box.log("pals-agent")
    node_box.run("systemctl", "kill", "--signal", "KILL", "pals-agent")
    assert until(lambda: node_box.node.limits_w() == node_box.node.found_w, 4.5)  # the lease of 3 s ended
    assert until(lambda: node_box.node.limits_w() == (250.0, 250.0))  # started again
    node_box.run("systemctl", "stop", "pals-agent")
    assert node_box.node.limits_w() == node_box.node.found_w
    assert node_box.run("ls", "/var/lib/pals").count("journal-") == 2
