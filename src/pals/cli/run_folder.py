"""What lies in a run directory: whose emulated boards, and what processes left that were killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pals.cli.main import say
from pals.core.errors import ConfigError
from pals.runtime.agent import FOUND_RECORD, STATUS_FILES
from pals.runtime.channel import find_engines, open_channels
from pals.runtime.found import left_by_dead_agent
from pals.runtime.group import EngineGroup
from pals.runtime.processes import process_alive, process_started

BANK_FILE = "emulated-boards.bank"
OWNERS_FILE = "emulated-boards.owners"  # a line each: process id, its boards
SOCKETS = "ipc-"  # and the process id: folders for vLLM's sockets
SOCKETS_PATH_MAX = 60  # vLLM adds a slash and 36 characters; a Unix socket's path holds 107
EMULATED_UUID = "GPU-00000000-"  # how the UUIDs of emulated boards begin


def bank_of(engines: Sequence[EngineGroup]) -> Path | None:
    """The emulated boards these engines say they run on; None: real boards.

    Raises:
        ConfigError: no engine, or some run on other boards than the rest.
    """
    if not engines:
        raise ConfigError("no running engine to steer. Nothing was written")
    first = engines[0].info.bank
    if others := [e for e in engines if e.info.bank != first]:
        raise ConfigError(
            f"{engines[0].told()} runs on {boards_told(first)}, {others[0].told()} on {boards_told(others[0].info.bank)}; one "
            "agent steers one kind. Nothing was written: steer one with --engine PID, or start them with different PALS_RUN_DIR"
        )
    if first == "":
        raise ConfigError(
            f"{engines[0].told()} runs on emulated boards of its own, which nobody else can open (PALS_EMU without "
            "PALS_EMU_BOARDS). Nothing was written: start it with `pals serve MODEL --emulate BOARDS`"
        )
    return Path(first) if first is not None else None


def boards_told(bank: str | None) -> str:
    """Emulated or real, for messages."""
    return "real boards" if bank is None else f"emulated boards ({bank or 'of its own'})"


def emulated_bank(folder: Path, *, left_too: bool = False) -> Path | None:
    """The emulated boards that a living process of this run directory uses, else those PALS_EMU_BOARDS names; None: real ones.

    `left_too`: also those that a killed server left, for whoever looks for such things.
    """
    told = {c.info.bank for c in open_channels(folder) if c.alive()} if os.path.isdir(folder) else set()
    if told == {None}:  # a real engine's word counts more than a file
        return None
    named = os.environ.get("PALS_EMU_BOARDS")
    mine = [folder / BANK_FILE] if left_too or living_owners(folder / OWNERS_FILE) else []
    banks = [*(Path(b) for b in sorted(filter(None, told))), *mine, *([Path(named)] if named else [])]
    return next((bank for bank in banks if os.path.exists(bank)), None)  # False where the folder is closed to us


def living_owners(owners: Path) -> dict[int, tuple[int, ...]]:
    """Servers with emulated boards that live, with their boards; a damaged line is nobody's."""
    try:
        lines = owners.read_text().splitlines()
    except (OSError, UnicodeDecodeError):  # none, or the folder is closed to us
        return {}
    rows = [line.split() for line in lines]
    known = {int(r[0]): tuple(int(i) for i in r[1:]) for r in rows if r and all(word.isdigit() for word in r)}
    return {pid: boards for pid, boards in known.items() if process_alive(pid)}


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Alone among the processes that make, join or remove emulated boards here."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def put_back(folder: Path, mend: Callable[[Path, Path | None], int]) -> int:
    """`mend` what a dead agent left, on the boards that its record names: emulated ones tell by their UUIDs.

    Raises:
        PalsError: as `mend`.
    """
    record, bank = folder / FOUND_RECORD, folder / BANK_FILE
    left = left_by_dead_agent(record)
    if not left or not all(uuid.startswith(EMULATED_UUID) for uuid in left):
        return mend(folder, None)  # where there is nothing to write, it takes the record away
    if bank.exists():
        return mend(folder, bank)
    named = os.environ.get("PALS_EMU_BOARDS")
    if named and os.path.exists(named):
        return mend(folder, Path(named))
    record.unlink(missing_ok=True)  # its boards were emulated, and are gone
    return 0


def read_status(path: Path) -> dict[str, Any] | None:
    """What an agent wrote of an engine; None where it is gone, being replaced, or not such a file."""
    with contextlib.suppress(OSError, ValueError):
        told = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(told, dict) and isinstance(told.get("agent_pid"), int) and isinstance(told.get("name"), str):
            return told
    return None


def agent_lives(told: dict[str, Any]) -> bool:
    """Whether the agent that wrote this lives; another process with its id is not it."""
    pid, started = told["agent_pid"], told.get("agent_started")
    return process_alive(pid) and started in (None, process_started(pid))


def remove_stale_status(folder: Path) -> None:
    """Remove the status files of agents that were killed, and what is no status file."""
    for path in folder.glob(STATUS_FILES):
        told = read_status(path)
        if told is None or not agent_lives(told):
            path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in `folder`: channels, status files, sockets, emulated boards without a server."""
    find_engines(folder)  # removes those of dead engines
    remove_stale_status(folder)
    for sockets in folder.glob(f"{SOCKETS}*"):
        pid = sockets.name.removeprefix(SOCKETS)
        if pid.isdigit() and not process_alive(int(pid)):
            shutil.rmtree(sockets, ignore_errors=True)
    for left in folder.glob(".*.new"):  # half-written replacements: .name.pid.new
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not process_alive(int(pid)):
            left.unlink(missing_ok=True)
    with folder_locked(folder):
        bank, owners = folder / BANK_FILE, folder / OWNERS_FILE
        used = {c.info.bank for c in open_channels(folder)}
        if not living_owners(owners) and str(bank.absolute()) not in used:
            if bank.exists():
                say(f"removed emulated boards that a killed server left in {folder}")
            bank.unlink(missing_ok=True)
            owners.unlink(missing_ok=True)
    _forget_emulated(folder)


def _forget_emulated(folder: Path) -> None:
    record = folder / FOUND_RECORD
    with contextlib.suppress(ConfigError):
        left = left_by_dead_agent(record)
        if left and all(u.startswith(EMULATED_UUID) for u in left) and not (folder / BANK_FILE).exists():
            record.unlink(missing_ok=True)
