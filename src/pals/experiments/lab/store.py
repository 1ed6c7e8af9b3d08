"""Rows kept as JSON lines, one line a finished cell; a cell made by other sources counts as not run.

Any number of processes may append: each line is written whole, under a lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pals.experiments.lab.engines import locked
from pals.experiments.lab.experiment import Cell, Experiment, Row
from pals.experiments.lab.run import RUNNING
from pals.experiments.profile_checks.kept import digest_of

ROWS = "rows.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A finished cell."""

    cell: str  # its slug
    digest: str
    seconds: float  # wall time
    rows: list[Row]


def digest_of_cell(experiment: Experiment, cell: Cell) -> str:
    """Of everything that decides the cell's rows: the sources, and the cell itself."""
    return sha256(f"{digest_of(*RUNNING, *experiment.sources)} {cell!r}".encode()).hexdigest()[:16]


class Store:
    """The rows of one experiment in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ROWS

    def kept(self) -> Mapping[str, Kept]:
        """The newest line of each cell, by slug; a line that is torn or of another form does not count."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        found = dict[str, Kept]()
        for line in text.splitlines():
            kept = _read(line)
            if kept is not None:
                found[kept.cell] = kept
        return found

    def keep(self, kept: Kept) -> None:
        """Append one cell."""
        line = json.dumps({"cell": kept.cell, "digest": kept.digest, "seconds": kept.seconds, "rows": kept.rows})
        with locked(self.path.with_suffix(".lock")), self.path.open("ab") as f:
            torn = f.tell() > 0 and not self._ends_whole()
            f.write(b"\n" * torn + line.encode() + b"\n")

    def tidy(self) -> None:
        """Leave the newest line of each cell alone."""
        with locked(self.path.with_suffix(".lock")):
            fresh = self.path.with_suffix(f".{os.getpid()}.new")
            lines = [
                json.dumps({"cell": k.cell, "digest": k.digest, "seconds": k.seconds, "rows": k.rows})
                for k in self.kept().values()
            ]
            fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            fresh.replace(self.path)

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as f:
            f.seek(-1, os.SEEK_END)
            return f.read(1) == b"\n"


def _read(line: str) -> Kept | None:
    try:
        data: Any = json.loads(line)
        return Kept(cell=data["cell"], digest=data["digest"], seconds=float(data["seconds"]), rows=list(data["rows"]))
    except (ValueError, KeyError, TypeError):
        return None


def fresh_rows(store: Store, experiment: Experiment, cells: Sequence[Cell]) -> list[Row]:
    """The rows of those of `cells` that were run by the present sources, in their order."""
    kept = store.kept()
    return [
        row
        for cell in cells
        if (k := kept.get(cell.slug)) is not None and k.digest == digest_of_cell(experiment, cell)
        for row in k.rows
    ]
