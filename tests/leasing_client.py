"""A small process that leases all boards through capd at watts that change all the time; `--hostile`: it also misbehaves.

Standard library only, so that it is up within a twentieth of a second: `python -S tests/leasing_client.py SOCKET LOW_W HIGH_W SEED [--hostile]`.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from typing import Any

EVERY_S = 0.3


class Talk:
    """One connection to capd."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(1.0)
        self.sock.connect(path)
        self.answers = self.sock.makefile("rb")
        self.hello = self.ask(op="hello")
        self.seq = 0

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one reply."""
        return self.say(json.dumps(request).encode() + b"\n")

    def say(self, line: bytes) -> dict[str, Any]:
        """The same with bytes that need be no request."""
        self.sock.sendall(line)
        answer = self.answers.readline()
        if not answer:
            raise ConnectionError("capd closed the connection")
        reply: dict[str, Any] = json.loads(answer)
        return reply

    def lease(self, uuid: str, watts: float, clock_mhz: int, **otherwise: Any) -> dict[str, Any]:
        """Ask for a board."""
        self.seq += 1
        request = {
            "op": "set", "uuid": uuid, "watts": watts, "sm_clock_mhz": [210, clock_mhz], "ttl_s": 1.0,
            "epoch": self.hello["epoch"], "seq": self.seq, "reason": "chaos", **otherwise,
        }  # fmt: skip
        return self.ask(**request)

    def close(self) -> None:
        """Let go."""
        self.answers.close()
        self.sock.close()


def steer(path: str, low_w: float, high_w: float, rng: random.Random, *, hostile: bool) -> None:
    """Lease until the connection breaks."""
    talk = Talk(path)
    boards = [b["uuid"] for b in talk.hello["boards"]]
    while True:
        for uuid in boards:
            told = talk.lease(uuid, rng.randint(int(low_w), int(high_w)), rng.choice([705, 1005, 1305]))
            if told.get("error") == "stale":
                return
        end_s = time.monotonic() + EVERY_S
        if hostile:
            misbehave(path, talk, boards, rng)
        time.sleep(max(0.0, end_s - time.monotonic()))


def misbehave(path: str, talk: Talk, boards: list[str], rng: random.Random) -> None:
    """One of the things that a broken or hostile client does; each must be refused, and none may move a board."""
    uuid, kind = rng.choice(boards), rng.randrange(9)
    if kind == 0:
        refused(talk.say(b"\xff\x00 set everything\n"))
    elif kind == 1:
        refused(talk.lease(uuid, 1e6, 1005))
    elif kind == 2:
        refused(talk.lease(uuid, 150.0, 1005, ttl_s=1e6))
    elif kind == 3:
        refused(talk.lease(uuid, 150.0, 1005, epoch=0))
    elif kind == 4:
        refused(talk.lease(uuid, 150.0, 1005, seq=0))
    elif kind == 5:
        refused(talk.lease("GPU-nobody", 150.0, 1005))
    elif kind == 6:
        refused(talk.ask(op="budget", watts=1.0, boards=boards))
    elif kind == 7:  # half a request, and gone
        other = Talk(path)
        other.sock.sendall(b'{"op":"set","uuid":"' + uuid.encode())
        other.close()
    else:  # asks and never listens
        other = Talk(path)
        other.sock.setblocking(False)
        try:
            for _ in range(200):
                other.sock.send(b'{"op":"read"}\n' * 20)
        except OSError:
            pass
        other.close()


def refused(told: dict[str, Any]) -> None:
    """End where capd accepted what it must not: the test sees a client that died."""
    if told["ok"]:
        sys.exit(f"accepted: {told}")


def main() -> None:
    """Lease for ever, through every end of capd."""
    path, low_w, high_w, seed = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    rng = random.Random(seed)
    while True:
        try:
            steer(path, low_w, high_w, rng, hostile="--hostile" in sys.argv)
        except (OSError, ValueError):  # capd is away, or a half line came
            time.sleep(0.05)


if __name__ == "__main__":
    main()
