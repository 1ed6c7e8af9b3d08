"""Where an engine's records go: each outlet by itself; one that cannot take a record is given up, and control goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from pals.runtime.files import keep_whole_lines, replace_file
from pals.runtime.journal import Journal, JournalHeader, encode
from pals.runtime.processes import process_started
from pals.runtime.tick import TickRecord


class Outlet:
    """One place records go to. What the operating system refuses (a full disk) is said once, and the place is left alone."""

    def __init__(
        self, what: str, take: Callable[[TickRecord], None], give_up: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        self._what, self._take, self._give_up, self._say = what, take, give_up, say
        self._open = True

    def take(self, record: TickRecord) -> None:
        """Pass one record on, while the outlet is in use."""
        if not self._open:
            return
        try:
            self._take(record)
        except OSError as e:
            self._open = False
            with contextlib.suppress(OSError):
                self._give_up()
            self._say(f"{self._what}: {e.strerror}; it is given up, control goes on without it")


def journal_outlet(journal: Journal, say: Callable[[str], None]) -> Outlet:
    """Records to a journal; given up, the file keeps its whole lines."""

    def give_up() -> None:
        close_quietly(journal)
        keep_whole_lines(journal.path)

    return Outlet(f"the journal {journal.path} cannot be written", journal.append, give_up, say)


def close_quietly(journal: Journal) -> None:
    """Close a journal whose last line may not fit on the disk."""
    with contextlib.suppress(OSError):
        journal.close()


class StatusFile:
    """An engine's newest record, for `pals status`; replaced atomically each tick, removed at the end."""

    def __init__(self, path: Path, name: str, header: JournalHeader, *, writer: str) -> None:
        self.path = path
        told = {k: v for k, v in encode(header).items() if k != "profile_json"}
        pid = os.getpid()
        self._fixed = {"agent_pid": pid, "agent_started": process_started(pid), "name": name, "header": told}
        if writer:
            self._fixed["writer"] = writer

    def write(self, record: TickRecord) -> None:
        """Replace the file."""
        replace_file(self.path, json.dumps({**self._fixed, "record": encode(record)}).encode())

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
