"""The record of what is ours: on disk before the first change, so that whoever comes after a crash can undo it.

It is of one boot: limits do not survive a reboot. One that cannot be understood is not guessed at: nothing is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

FORMAT = "pals-capd-state/1"
NOT_KNOWN = (
    "what an earlier capd wrote is not known: no board is written. Check the limits (nvidia-smi -q -d POWER), set them by hand "
    "where they are too low, remove the file and restart capd"
)


class UnreadableError(Exception):
    """There is a record, and it cannot be read or understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What is ours, by UUID (see `Ledger.mine`), and the budget a client set."""

    boards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    budget_w: float | None = None
    budget_of: tuple[str, ...] = ()
    budget_uid: int | None = None


class Record(Protocol):
    """Where the state is kept."""

    def load(self) -> State:
        """What an earlier capd of this boot left. Raises `UnreadableError`."""
        ...

    def save(self, state: State, *, sure: bool) -> None:
        """Keep it; `sure`: it is on the disk when this returns. Raises `OSError`."""
        ...


class FileRecord:
    """One JSON file, replaced atomically."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._path, self._boot_id = path, boot_id

    def load(self) -> State:
        """What an earlier capd of this boot left; empty where there is none.

        Raises:
            UnreadableError: it cannot be read or understood.
        """
        try:
            text = self._path.read_text(encoding="utf-8")
            data = json.loads(text)
            return parse(data) if data["boot_id"] == self._boot_id else State()
        except FileNotFoundError:
            return State()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UnreadableError(
                f"the state file {self._path} cannot be understood ({type(e).__name__}: {e}), so {NOT_KNOWN}"
            ) from e

    def save(self, state: State, *, sure: bool) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written; the one before is still there.
        """
        data = {
            "format": FORMAT, "boot_id": self._boot_id, "boards": state.boards, "budget_w": state.budget_w,
            "budget_of": list(state.budget_of), "budget_uid": state.budget_uid,
        }  # fmt: skip
        fresh = self._path.with_name(f".{self._path.name}.new")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            json.dump(data, f, allow_nan=False)
            f.flush()
            if sure:
                os.fsync(f.fileno())
        fresh.replace(self._path)
        if sure:
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def parse(data: Any) -> State:
    """A state from what JSON said.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r}")
    boards = {}
    for uuid, left in data["boards"].items():
        if not isinstance(left["locked"], bool):
            raise TypeError(f"locked {left['locked']!r}")
        boards[str(uuid)] = {
            "found_w": _watts(left["found_w"]), "written_w": [_watts(w) for w in _list(left["written_w"])],
            "locked": left["locked"],
        }  # fmt: skip
    budget_w = None if data["budget_w"] is None else _watts(data["budget_w"])
    budget_uid = data["budget_uid"]
    if budget_uid is not None and (isinstance(budget_uid, bool) or not isinstance(budget_uid, int)):
        raise TypeError(f"budget_uid {budget_uid!r}")
    budget_of = tuple(str(u) for u in _list(data["budget_of"]))
    return State(boards=boards, budget_w=budget_w, budget_of=budget_of, budget_uid=budget_uid)


def _watts(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e7:  # neither is NaN
        raise ValueError(f"{value!r} are no watts")
    return float(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def boot_id() -> str:
    """What the kernel calls this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
