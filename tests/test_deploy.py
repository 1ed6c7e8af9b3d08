"""What is shipped in deploy/: units and container recipes name real options and paths, and give capd what it needs and no more."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # vLLM brings it; its stubs are not worth a dependency

from pals.cli.main import parser
from pals_capd import main as capd
from pals_capd import options, release
from pals_capd.audit import FileAudit
from pals_capd.policy import parse_policy
from tests.unit_sandbox import allowed_calls, settings

DEPLOY = Path(__file__).parent.parent / "deploy"
CAPD, AGENT = (DEPLOY / f"systemd/{name}.service" for name in ("pals-capd", "pals-agent"))
DOCS = (DEPLOY.parent / "docs/capd.md").read_text()
CONTAINERFILE = (DEPLOY / "container/Containerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "container/compose.yaml").read_text())["services"]["capd"]
KUBERNETES = {d["kind"]: d for d in yaml.safe_load_all((DEPLOY / "container/daemonset.yaml").read_text())}
POD = KUBERNETES["DaemonSet"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PLACES = (options.POLICY_FILE, options.SOCKET, options.STATE_FOLDER)
MOST_EXPOSED = 2.0
OFFLINE_SINCE = 250


def systemd_version() -> int:
    """The version of systemd-analyze; 0: there is none."""
    if not shutil.which("systemd-analyze"):
        return 0
    told = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    return int(told.split()[1])


analyzed = pytest.mark.skipif(
    systemd_version() < OFFLINE_SINCE,
    reason=f"systemd-analyze of systemd {OFFLINE_SINCE} or later is not installed here",
)


def command(unit: Path, key: str) -> list[str]:
    """The words of a unit's command line."""
    (line,) = settings(unit)[key]
    return shlex.split(line)


def accepted(words: list[str]) -> bool:
    """Whether capd's own parser knows all of these options; nothing is started."""
    return capd.main([*words, "policy"]) == 0


# --- units ---


@analyzed
@pytest.mark.parametrize("unit", [CAPD, AGENT], ids=lambda p: p.stem)
def test_the_exposure_of_a_unit_is_low(unit: Path) -> None:
    told = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)], capture_output=True, text=True
    ).stdout
    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
    assert score is not None, told
    assert float(score[1]) <= MOST_EXPOSED


@analyzed
@pytest.mark.parametrize("unit", [CAPD, AGENT], ids=lambda p: p.stem)
def test_systemd_understands_every_line_of_a_unit(unit: Path, tmp_path: Path) -> None:
    for name in ("pals", "pals-capd", "capd-release"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    installed = tmp_path / unit.name
    installed.write_text(unit.read_text().replace("/opt/pals/bin", str(tmp_path)))

    done = subprocess.run(["systemd-analyze", "verify", str(installed)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@analyzed
def test_a_line_that_systemd_does_not_understand_is_found(tmp_path: Path) -> None:
    broken = tmp_path / "broken.service"
    broken.write_text("[Service]\nExecStart=/bin/true\nProtectHoem=yes\n")

    done = subprocess.run(["systemd-analyze", "verify", str(broken)], capture_output=True, text=True)
    assert "ProtectHoem" in done.stderr


def test_the_commands_of_the_capd_unit_are_those_of_the_package(tmp_path: Path) -> None:
    start, stop = command(CAPD, "ExecStart"), command(CAPD, "ExecStopPost")

    assert [start[0], stop[0]] == ["/opt/pals/bin/pals-capd", "/opt/pals/bin/capd-release"]
    assert accepted(start[1:])
    assert (
        release.main([*stop[1:], "--state", str(tmp_path / "none")]) == 0
    )  # knows the options; no capd ever ran there
    with pytest.raises(SystemExit):
        accepted([*start[1:], "--polcy", "x"])


def test_the_command_of_the_agent_unit_is_that_of_the_package() -> None:
    words = command(AGENT, "ExecStart")
    assert (words[0], words[-1]) == ("/opt/pals/bin/pals", "$PALS_AGENT_OPTIONS")

    args = parser().parse_args(words[1:-1])
    assert (args.command, args.writer, args.mode) == (
        "agent",
        "capd",
        None,
    )  # nothing is written unless somebody says so


def test_the_paths_of_the_capd_unit_are_its_defaults_and_folders_that_systemd_makes() -> None:
    unit = settings(CAPD)
    given = dict(zip(*[iter(command(CAPD, "ExecStart")[1:])] * 2, strict=True))

    assert (given["--policy"], given["--socket"], given["--state"]) == PLACES
    assert (given["--group"], unit["User"], unit["Group"]) == ("pals", ["root"], ["pals"])
    assert [f"/var/lib/{unit['StateDirectory'][0]}", f"/run/{unit['RuntimeDirectory'][0]}"] == [
        options.STATE_FOLDER,
        str(Path(options.SOCKET).parent),
    ]
    for key in ("--policy", "--state"):
        assert given[key] in command(CAPD, "ExecStopPost")


def test_the_capd_unit_waits_long_enough_and_has_one_capability() -> None:
    unit = settings(CAPD)

    assert (unit["Type"], unit["NotifyAccess"], unit["CapabilityBoundingSet"]) == (
        ["notify"],
        ["main"],
        ["CAP_SYS_ADMIN"],
    )
    assert float(unit["WatchdogSec"][0].removesuffix("s")) >= capd.NOTIFY_EVERY_S * 5
    wait_s = float(command(CAPD, "ExecStopPost")[-1])
    assert wait_s < float(unit["TimeoutStopSec"][0])


@analyzed
def test_the_capd_unit_lets_no_call_through_that_only_root_needs() -> None:
    unit = settings(CAPD)
    calls = allowed_calls(unit["SystemCallFilter"])

    assert {"ioctl", "flock", "execve", "chown", "fsync"} <= calls
    assert (
        not {
            "setuid",
            "mount",
            "bpf",
            "init_module",
            "ptrace",
            "reboot",
            "pivot_root",
            "perf_event_open",
            "io_uring_setup",
        }
        & calls
    )
    assert unit["RestrictNamespaces"] == ["yes"]  # what the group leaves of unshare and setns


def test_the_policy_file_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    capd.main(["policy"])

    assert (DEPLOY / "systemd/capd.toml").read_text() == capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="systemd-sysusers is not installed here")
def test_the_sysusers_file_makes_the_user_and_group_that_units_and_policy_name(tmp_path: Path) -> None:
    unit_file = DEPLOY / "systemd/pals.sysusers.conf"
    command = ["systemd-sysusers", f"--root={tmp_path}", "--dry-run", str(unit_file)]

    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "Creating group 'pals'" in told
    assert "Creating user 'pals'" in told


# --- containers ---


def test_the_image_holds_capd_as_it_is_run(tmp_path: Path) -> None:
    sources = re.findall(r"^COPY (\S+) ", CONTAINERFILE, re.MULTILINE)
    pinned = re.search(r"nvidia-ml-py==(\S+)", CONTAINERFILE)

    assert sources == ["src/pals_capd", "deploy/container/entrypoint.sh"]
    assert all((DEPLOY.parent / s).exists() for s in sources)
    assert pinned is not None
    assert f"nvidia-ml-py=={pinned[1]}\n" in (DEPLOY.parent / "requirements/engine.lock").read_text()
    (tmp_path / "pals_capd").symlink_to(DEPLOY.parent / "src/pals_capd")  # the package needs nothing of PALS beside it
    for module in ("main", "release"):
        subprocess.run([sys.executable, "-S", "-m", f"pals_capd.{module}", "--help"], cwd=tmp_path, env={}, check=True)


def test_the_compose_file_gives_one_capability_and_no_network() -> None:
    assert (COMPOSE["cap_drop"], COMPOSE["cap_add"], COMPOSE["privileged"]) == (["ALL"], ["SYS_ADMIN"], False)
    assert (COMPOSE["network_mode"], COMPOSE["read_only"]) == ("none", True)
    assert "no-new-privileges:true" in COMPOSE["security_opt"]
    assert not {"pid", "devices", "cgroup", "ports"} & set(COMPOSE)
    assert COMPOSE["user"].startswith("0:${PALS_GID:?")


def test_the_daemon_set_gives_one_capability_and_no_network() -> None:
    given = CONTAINER["securityContext"]

    assert given["capabilities"] == {"drop": ["ALL"], "add": ["SYS_ADMIN"]}
    assert (given["privileged"], given["readOnlyRootFilesystem"], given["runAsUser"]) == (False, True, 0)
    assert not any(POD[key] for key in ("hostNetwork", "hostPID", "hostIPC", "automountServiceAccountToken"))
    assert POD.get("hostUsers", True)
    closed = KUBERNETES["NetworkPolicy"]["spec"]
    assert closed["podSelector"] == KUBERNETES["DaemonSet"]["spec"]["selector"]
    assert closed["podSelector"]["matchLabels"] == KUBERNETES["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    assert sorted(closed["policyTypes"]) == ["Egress", "Ingress"]
    assert not {"ingress", "egress"} & set(closed)


def test_the_daemon_set_takes_no_board_from_the_scheduler_and_never_runs_two_on_a_node() -> None:
    assert "nvidia.com/gpu" not in str(CONTAINER["resources"])
    assert KUBERNETES["DaemonSet"]["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"] == 0


@pytest.mark.parametrize("words", [COMPOSE["command"], CONTAINER["args"]], ids=["compose", "kubernetes"])
def test_the_options_of_the_containers_are_those_of_the_package(words: list[str]) -> None:
    assert accepted(words)


def test_the_containers_mount_what_capd_reads_and_writes() -> None:
    compose = [v.split(":") for v in COMPOSE["volumes"]]
    mounts: list[dict[str, Any]] = CONTAINER["volumeMounts"]
    volumes = {v["name"]: v for v in POD["volumes"]}
    folders = [str(Path(options.POLICY_FILE).parent), options.STATE_FOLDER, str(Path(options.SOCKET).parent)]

    assert [v[1] for v in compose] == [v[0] for v in compose] == folders
    assert [v[2:] for v in compose] == [["ro"], [], []]
    assert [m["mountPath"] for m in mounts] == [options.POLICY_FILE, *folders[1:]]
    assert [volumes[m["name"]]["hostPath"]["path"] for m in mounts[1:]] == folders[1:]
    assert mounts[0]["subPath"] in KUBERNETES["ConfigMap"]["data"]  # else a link, in a folder that others may write


def test_group_and_policy_of_the_daemon_set_need_no_names_of_the_node() -> None:
    assert CONTAINER["args"] == ["--group", str(CONTAINER["securityContext"]["runAsGroup"])]
    assert parse_policy(KUBERNETES["ConfigMap"]["data"]["capd.toml"], "ConfigMap").rights == {1000: "set"}


def test_docker_run_in_the_docs_says_what_the_compose_file_says() -> None:
    told = re.search(r"docker run -d (.*?)\n```", DOCS.replace("\\\n", " "), re.DOTALL)
    assert told is not None
    words = told[1].split()

    pairs = {
        "--user": "0:$PALS_GID", "--userns": COMPOSE["userns_mode"], "--cap-drop": "ALL", "--cap-add": "SYS_ADMIN",
        "--security-opt": "no-new-privileges", "--network": COMPOSE["network_mode"], "--memory": COMPOSE["mem_limit"],
        "--pids-limit": str(COMPOSE["pids_limit"]), "--oom-score-adj": str(COMPOSE["oom_score_adj"]), "--runtime": COMPOSE["runtime"],
        "--restart": COMPOSE["restart"], "--stop-timeout": COMPOSE["stop_grace_period"].removesuffix("s"),
    }  # fmt: skip
    assert {key: words[words.index(key) + 1] for key in pairs} == pairs
    assert [words[i + 1] for i, w in enumerate(words) if w == "-v"] == COMPOSE["volumes"]
    assert "--read-only" in words
    assert "--privileged" not in words


def test_the_docs_name_files_that_are_there_and_the_defaults() -> None:
    for path in re.findall(r"(?:deploy|tests)/[\w./-]+[\w]", DOCS):
        assert (DEPLOY.parent / path).exists(), path
    for place in PLACES:
        assert place in DOCS


# --- capd itself ---


def test_the_release_that_a_hanging_capd_starts_is_not_taken_from_the_working_directory(tmp_path: Path) -> None:
    planted = tmp_path / "pals_capd"
    planted.mkdir()
    (planted / "__init__.py").write_text("open('planted', 'w')\n")
    script = "import argparse, os, pals_capd.main as m; m.start_release(argparse.Namespace(policy='p', state='none', dry_run=False)); os.wait()"

    subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, check=True)
    assert not (tmp_path / "planted").exists()


def test_the_log_of_a_dry_run_is_shown_and_checked_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FileAudit(tmp_path / "audit.jsonl").write("real")
    FileAudit(tmp_path / "audit.dry-run.jsonl").write("dry")

    for options_given, event in ((["--dry-run"], "dry"), ([], "real")):
        assert capd.main(["audit", "--state", str(tmp_path), *options_given]) == 0
        assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()] == [event]
