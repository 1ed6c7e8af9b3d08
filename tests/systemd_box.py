"""A systemd of its own, in namespaces, that runs the units of deploy/ on emulated boards; the machine's own files are not touched."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.emulated_node import ROOT, EmulatedNode

UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--net", "--cgroup", "--kill-child")
CHARACTER_DEVICES = (
    "null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 nvidiactl:195:255 nvidia0:195:0 nvidia-uvm:511:0"
)
LAUNCHER = """#!/opt/py/bin/python3
import sys
sys.path[:0] = ["/opt/pals/checkout/src", "/opt/pals/checkout", "/opt/pals/site"]
from {module} import main
sys.exit(main())
"""
#: What a virtual environment in /opt/pals and real boards would make unnecessary.
DROP_IN = """[Unit]
DefaultDependencies=no
[Service]
Environment=LD_LIBRARY_PATH=/opt/py/lib:/opt/emu/{library} PALS_EMU_BOARDS=/opt/emu/{bank} PALS_EMU=1
Environment=PYTHONPATH=/opt/pals/checkout/src:/opt/pals/checkout:/opt/pals/site
ReadWritePaths=/opt/emu
StandardOutput=append:/opt/emu/{name}.log
StandardError=append:/opt/emu/{name}.log
"""
BOOT = """set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for folder in /run /var/lib /opt; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir -p /run/etc/upper /run/etc/work /run/lock /opt/py /opt/emu /opt/pals/bin /opt/pals/checkout /opt/pals/site
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work overlay /etc
mount --bind "$1" /opt/py; mount --bind "$2" /opt/pals/site; mount --bind "$3" /opt/pals/checkout; mount --bind "$4" /opt/emu
cp /opt/emu/bin/* /opt/pals/bin/
mount -t tmpfs -o mode=755 tmpfs /dev
for d in $5; do mknod -m 666 /dev/${d%%:*} c $(echo ${d#*:} | tr : ' '); done
mkdir -p /dev/pts /dev/shm /etc/pals /etc/sysusers.d
cp /opt/pals/checkout/deploy/systemd/capd.toml /etc/pals/
cp /opt/pals/checkout/deploy/systemd/pals.sysusers.conf /etc/sysusers.d/pals.conf
systemd-sysusers /etc/sysusers.d/pals.conf
hostname box
mount -t proc proc /proc
mount -o bind,ro /proc/sys /proc/sys
exec env -i container=box SYSTEMD_UNIT_PATH=/opt/emu/units PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=box.target --show-status=no --log-target=console
"""


def can_box() -> bool:
    """Whether namespaces, cgroup v2 and a systemd are to be had."""
    if os.geteuid() != 0 or not Path("/lib/systemd/systemd").exists() or _cgroup2() is None:
        return False
    try:
        return subprocess.run([*UNSHARE, "mount", "-t", "cgroup2", "none", "/mnt"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _cgroup2() -> Path | None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next((Path(m[1]) for m in mounts if m[2] == "cgroup2"), None)


@dataclass(frozen=True)
class Box:
    """A running one."""

    node: EmulatedNode
    pid: int  # of its process 1, as seen from outside

    @property
    def socket(self) -> str:
        """capd's socket, from outside."""
        return f"/proc/{self.pid}/root/run/pals/capd.sock"

    def run(self, *command: str) -> str:
        """Run a command inside; what it printed.

        Raises:
            AssertionError: it failed.
        """
        inside = ("nsenter", "--target", str(self.pid), "-m", "-p", "-u", "-i", "-n", "-C", "env", "-i")
        path = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LD_LIBRARY_PATH=/opt/py/lib")
        done = subprocess.run([*inside, *path, *command], capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout, done.stderr, self.log("pals-capd"))
        return done.stdout

    def show(self, unit: str, what: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", unit, "--value", f"--property={what}").strip()

    def log(self, unit: str) -> str:
        """What a unit wrote."""
        path = self.node.folder / f"{unit}.log"
        return path.read_text() if path.exists() else ""


@contextmanager
def box(node: EmulatedNode, drop_ins: dict[str, str]) -> Iterator[Box]:
    """Boot one over a node's boards; `drop_ins`: more lines of a unit, by its name."""
    _write_files(node, drop_ins)
    top = _cgroup2()
    assert top is not None
    group = top / f"pals-box-{os.getpid()}"
    group.mkdir()
    given = (sys.base_prefix, str(_site()), str(ROOT), str(node.folder), CHARACTER_DEVICES)
    enter = f'echo $$ > {group}/cgroup.procs; exec "$@"'
    command = ["sh", "-c", enter, "sh", *UNSHARE, "bash", "-c", BOOT, "bash", *given]
    with (node.folder / "boot.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            made = Box(node, _first_child(process.pid))
            while not Path(f"/proc/{made.pid}/root/run/systemd/private").exists():
                assert process.poll() is None, (node.folder / "boot.log").read_text()
                time.sleep(0.05)
            yield made
        finally:
            process.kill()
            process.wait()
            _remove(group)


def _write_files(node: EmulatedNode, drop_ins: dict[str, str]) -> None:
    units, programs = node.folder / "units", node.folder / "bin"
    units.mkdir()
    programs.mkdir()
    (units / "box.target").write_text("[Unit]\nDefaultDependencies=no\n")
    library = Path(node.environ["LD_LIBRARY_PATH"].split(":")[0]).relative_to(node.folder)
    bank = Path(node.environ["PALS_EMU_BOARDS"]).relative_to(node.folder)
    for name in ("pals-capd", "pals-agent"):
        folder = units / f"{name}.service.d"
        folder.mkdir()
        (units / f"{name}.service").write_text((ROOT / f"deploy/systemd/{name}.service").read_text())
        (folder / "box.conf").write_text(DROP_IN.format(library=library, bank=bank, name=name) + drop_ins.get(name, ""))
    for program, module in (
        ("pals-capd", "pals_capd.main"),
        ("capd-release", "pals_capd.release"),
        ("pals", "pals.cli.main"),
    ):
        (programs / program).write_text(LAUNCHER.format(module=module))
        (programs / program).chmod(0o755)


def _site() -> Path:
    import pynvml

    return Path(pynvml.__file__).parent


def _first_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    end_s = time.monotonic() + 10
    while not (told := children.read_text().split()):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    return int(told[0])


def _remove(group: Path) -> None:
    end_s = time.monotonic() + 10
    while group.exists() and time.monotonic() < end_s:
        for folder in sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        with suppress(OSError):  # its processes are still ending
            group.rmdir()
        time.sleep(0.02)
