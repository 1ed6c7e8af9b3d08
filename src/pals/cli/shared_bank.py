"""The emulated boards of a run directory: the first server makes them, others join, the last one removes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pals.cli.run_folder import BANK_FILE, OWNERS_FILE, folder_locked, living_owners
from pals.core.errors import ConfigError
from pals.plant.boards import BoardBank
from pals.plant.specs import BoardSpec
from pals.runtime.files import replace_file


@contextmanager
def shared_bank(
    folder: Path, spec: BoardSpec, count: int, boards: tuple[int, ...], *, seed: int, writable: bool
) -> Iterator[Path]:
    """The bank of `folder`, made or joined by this process, which uses `boards` of it, for the length of the context.

    Raises:
        ConfigError: the bank there is another one, or a living server uses one of `boards`; nothing was changed.
    """
    bank, owners = folder / BANK_FILE, folder / OWNERS_FILE
    with folder_locked(folder):
        others = living_owners(owners)
        if others and bank.exists():
            _check_same(bank, spec, count, writable, next(iter(others)))
            _check_free(boards, others)
        else:
            BoardBank.create(bank, spec, count, seed=seed, writable=writable).close()
        _write(owners, {**others, os.getpid(): boards})
    try:
        yield bank
    finally:
        with folder_locked(folder):
            left = {pid: used for pid, used in living_owners(owners).items() if pid != os.getpid()}
            if left:
                _write(owners, left)
            else:
                bank.unlink(missing_ok=True)
                owners.unlink(missing_ok=True)


def owner_of(folder: Path) -> int | None:
    """A living server that has the emulated boards of this run directory; None where there is none."""
    return next(iter(living_owners(folder / OWNERS_FILE)), None)


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


def _write(owners: Path, servers: dict[int, tuple[int, ...]]) -> None:
    lines = "".join(f"{' '.join(map(str, (pid, *boards)))}\n" for pid, boards in servers.items())
    replace_file(owners, lines.encode())
