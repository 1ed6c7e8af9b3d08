"""Runs a command as a systemd unit would: `python -m tests.unit_sandbox UNIT GID WRITABLE COMMAND…`, as root, without systemd.

It takes from the unit what the kernel alone can enforce: capabilities, no_new_privs, the system call filter, no writable and
executable memory, no network, a file system that is read-only but for one folder. Not done: device cgroup, /proc and /home.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CAPABILITIES = {"CAP_SYS_ADMIN": 21}
HIGHEST_CAPABILITY = 63
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 24, 38, 65, 1
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWNET = 0x00020000, 0x08000000, 0x40000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = 1, 32, 4096, 16384, 1 << 19
SCMP_ACT_ALLOW, SCMP_ACT_ERRNO_EPERM = 0x7FFF0000, 0x00050000 | errno.EPERM


def settings(unit: Path) -> dict[str, list[str]]:
    """All values of each key of a unit, in their order."""
    values: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, is_setting, value = line.partition("=")
        if is_setting and not line.startswith("#"):
            values.setdefault(key, []).append(value)
    return values


def allowed_calls(filters: list[str]) -> set[str]:
    """The system calls that `SystemCallFilter=` lines leave."""
    allowed = set[str]()
    for line in filters:
        calls = {call for word in line.removeprefix("~").split() for call in _calls(word)}
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    return allowed | set(_calls("@default"))


def _calls(word: str) -> Iterator[str]:
    if not word.startswith("@"):
        yield word
        return
    told = subprocess.run(["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True)
    for inner in told.stdout.splitlines()[1:]:
        if inner.strip() and not inner.strip().startswith("#"):
            yield from _calls(inner.strip())


def enter(unit: Path, gid: int, writable: Path) -> None:
    """Put this process, and all it starts, into the unit's sandbox.

    Raises:
        OSError: the kernel would not.
    """
    given = settings(unit)
    calls = allowed_calls(given["SystemCallFilter"])
    libc = ctypes.CDLL(None, use_errno=True)

    def done(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), "the sandbox cannot be made")

    done(libc.unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET))
    done(libc.mount(None, b"/", None, MS_REC | MS_SLAVE, None))
    done(libc.mount(bytes(writable), bytes(writable), None, MS_BIND, None))
    done(libc.mount(None, b"/", None, MS_REMOUNT | MS_BIND | MS_RDONLY, None))
    os.chdir("/")
    os.setgroups([])
    os.setgid(gid)
    os.umask(int(given["UMask"][0], 8))
    kept = {CAPABILITIES[name] for name in given["CapabilityBoundingSet"][0].split()}
    for capability in range(HIGHEST_CAPABILITY + 1):
        if capability not in kept:
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # those the kernel does not know cannot be dropped
    done(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _filter(calls)
    if given["MemoryDenyWriteExecute"] == ["yes"]:
        libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)  # since Linux 6.3


def _filter(calls: set[str]) -> None:
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(SCMP_ACT_ERRNO_EPERM)))
    for call in sorted(calls):
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # those of other architectures have none
            seccomp.seccomp_rule_add(rules, ctypes.c_uint32(SCMP_ACT_ALLOW), number, 0)
    if seccomp.seccomp_load(rules) != 0:
        raise OSError("the system call filter cannot be loaded")


def main() -> None:
    """Enter, then become the command."""
    unit, gid, writable, *command = sys.argv[1:]
    enter(Path(unit), int(gid), Path(writable))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
