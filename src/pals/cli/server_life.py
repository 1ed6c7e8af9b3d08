"""A server's life: what signals mean from its start to its end, and an end that answers what was accepted."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pals.cli.main import say
from pals.engines.vllm_launcher import keep_small, stop
from pals.runtime.group import EngineGroup

AFTER_DRAIN_S = 15.0  # vLLM ends the drain itself; this long for what it does then
LOG_LOOK_S = 10.0


class Signals:
    """The first stops in order, the second is told that the drain goes on, the third drops what is left."""

    def __init__(self) -> None:
        self.ended = threading.Event()  # also set when the server ends by itself
        self.dropped = threading.Event()
        self.unfinished: Callable[[], int | None] = lambda: None  # requests; None: the server is not up yet
        self._seen = 0

    def arrived(self) -> None:
        """Take one signal; called for each."""
        self._seen += 1
        if self._seen == 2:
            say(f"stopping goes on in order{self._left(' ({}); once more drops them', '; once more ends it at once')}")
        elif self._seen > 2 and not self.dropped.is_set():
            say(f"stopping at once{self._left('; {} are dropped', '')}")
            self.dropped.set()

    def _left(self, known: str, unknown: str) -> str:
        left = self.unfinished()
        return unknown if left is None else known.format(requests_told(left))


def requests_told(count: int) -> str:
    """ "1 request" or "3 requests"."""
    return f"{count} request{'' if count == 1 else 's'}"


def unfinished_in(group: EngineGroup) -> int:
    """Requests that the engine has accepted and not answered, as it told last; also after its end."""
    return sum(s.running + s.waiting for s in (rank.last() for rank in group.ranks))


class Server:
    """The process that serves, and how it is ended."""

    def __init__(self, process: subprocess.Popen[bytes], signals: Signals, drain_s: float) -> None:
        self.process = process
        self.cut = 0  # accepted requests that got no full answer, known after `shut_down`
        self._signals, self._drain_s = signals, drain_s

    def watch(self) -> threading.Event:
        """Set `signals.ended` when the process ends by itself; the event returned says that it did."""
        gone = threading.Event()

        def wait() -> None:
            self.process.wait()
            if not self._signals.ended.is_set():
                gone.set()
                self._signals.ended.set()

        threading.Thread(target=wait, name="vllm-watch", daemon=True).start()
        return gone

    def shut_down(self) -> None:
        """Let vLLM answer what it accepted, then stop it; say what was cut."""
        asked = self.process.poll() is None
        left = self._signals.unfinished()
        if asked:
            told = "" if not left else f"; {requests_told(left)} accepted, answered first for up to {self._drain_s:g} s"
            say(f"stopping vLLM{told}")
        in_time = stop(self.process, self._drain_s + AFTER_DRAIN_S, self._signals.dropped)
        if asked:
            self.cut = self._signals.unfinished() or 0
        if self.cut:
            how = "dropped" if self._signals.dropped.is_set() else "cut off when the drain ended (--drain-s)"
            say(f"{requests_told(self.cut)} accepted and not fully answered: {how}")
        elif asked and not in_time:
            say("vLLM did not end by itself and was killed; no accepted request was open")


@contextmanager
def log_kept_small(path: Path) -> Iterator[None]:
    """Keep vLLM's log from filling the disk while the context lasts."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOG_LOOK_S):
            keep_small(path)

    thread = threading.Thread(target=look, name="vllm-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
