"""The emulated boards of a run directory: the first server makes them, others join, the last one removes them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pals.cli.agent import BANK_FILE
from pals.core.errors import ConfigError
from pals.plant.boards import BoardBank
from pals.plant.specs import BoardSpec
from pals.runtime.channel import process_alive

OWNERS_FILE = "emulated-boards.owners"  # a line each: process id, its boards


@contextmanager
def shared_bank(
    folder: Path, spec: BoardSpec, count: int, boards: tuple[int, ...], *, seed: int, writable: bool
) -> Iterator[Path]:
    """The bank of `folder`, made or joined by this process, which uses `boards` of it, for the length of the context.

    Raises:
        ConfigError: the bank there is another one, or a living server uses one of `boards`; nothing was changed.
    """
    bank, owners = folder / BANK_FILE, folder / OWNERS_FILE
    with _locked(folder):
        others = _living(owners)
        if others and bank.exists():
            _check_same(bank, spec, count, writable, next(iter(others)))
            _check_free(boards, others)
        else:
            BoardBank.create(bank, spec, count, seed=seed, writable=writable).close()
        _write(owners, {**others, os.getpid(): boards})
    try:
        yield bank
    finally:
        with _locked(folder):
            left = {pid: used for pid, used in _living(owners).items() if pid != os.getpid()}
            if left:
                _write(owners, left)
            else:
                bank.unlink(missing_ok=True)
                owners.unlink(missing_ok=True)


def owner_of(folder: Path) -> int | None:
    """A living server that has the emulated boards of this run directory; None where there is none."""
    return next(iter(_living(folder / OWNERS_FILE)), None)


def _check_same(bank: Path, spec: BoardSpec, count: int, writable: bool, owner: int) -> None:
    with closing(BoardBank.open(bank)) as there:
        if (there.spec.name, there.count, there.writable) != (spec.name, count, writable):
            raise ConfigError(
                f"another emulated server (process {owner}) has {there.count}x{there.spec.name}"
                f"{'' if there.writable else ' --unprivileged'} in {bank.parent}; a second one joins the same boards (--emulate "
                f"{there.count}x{there.spec.name}) or sets PALS_RUN_DIR to another folder. Nothing was started"
            )


def _check_free(boards: tuple[int, ...], others: dict[int, tuple[int, ...]]) -> None:
    for pid, used in others.items():
        if both := sorted(set(boards) & set(used)):
            raise ConfigError(
                f"another emulated server (process {pid}) uses boards {', '.join(map(str, both))} already; choose others, e.g. "
                "--boards 4,5,6,7, or set PALS_RUN_DIR to another folder. Nothing was started"
            )


def _living(owners: Path) -> dict[int, tuple[int, ...]]:
    """Servers that live, with their boards; a damaged line is nobody's."""
    try:
        lines = owners.read_text().splitlines()
    except OSError:  # none, or the folder is closed to us
        return {}
    rows = [line.split() for line in lines]
    known = {int(r[0]): tuple(int(i) for i in r[1:]) for r in rows if r and all(word.isdigit() for word in r)}
    return {pid: boards for pid, boards in known.items() if process_alive(pid)}


def _write(owners: Path, servers: dict[int, tuple[int, ...]]) -> None:
    fresh = owners.with_suffix(".new")
    fresh.write_text("".join(f"{' '.join(map(str, (pid, *boards)))}\n" for pid, boards in servers.items()))
    fresh.replace(owners)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
