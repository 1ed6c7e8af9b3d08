"""A process of another user, which says to capd what it is told: `python -S tests/capd_user.py SOCKET UID GID`, a line at a time.

Everything is imported as root, since the interpreter may lie where no other user may look.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys


def main() -> None:
    """Become that user, then pass lines of standard input on, and the answers back; an empty one where capd hung up."""
    path, uid, gid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except PermissionError:
        print("no permission", flush=True)
        return
    print("connected", flush=True)
    answers = sock.makefile("rb")
    for line in sys.stdin.buffer:
        with contextlib.suppress(BrokenPipeError):  # turned away; why lies in the socket
            sock.sendall(line)
        sys.stdout.buffer.write(answers.readline() or b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
