"""The rows of a sweep that is under way, kept in a file of JSON lines so that Ctrl-C loses only the point being measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pals.core.errors import ConfigError, ProfileMismatchError
from pals.core.load import Mix
from pals.core.quantities import Fingerprint
from pals.models.engine_facts import EngineFacts
from pals.models.row import ProfileRow

FORMAT = "pals-sweep/2"


class PartialRows:
    """The rows measured so far; the file's first line says of what and under which mixes."""

    def __init__(self, path: Path, fingerprint: Fingerprint, facts: EngineFacts, mixes: Sequence[Mix]) -> None:
        """Read the file, or begin it.

        Raises:
            ConfigError: it is damaged.
            ProfileMismatchError: it holds another sweep; it was left alone.
        """
        self._path = path
        self.rows: list[ProfileRow] = []
        head = {
            "format": FORMAT,
            "fingerprint": asdict(fingerprint),
            "facts": asdict(facts),
            "mixes": [asdict(mix) for mix in mixes],
        }
        if path.exists():
            self._read(json.loads(json.dumps(head)))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")

    def _read(self, head: dict[str, Any]) -> None:
        """Take the rows; a last line that was cut off in the middle of its write is cut off the file too."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            found = json.loads(lines[0])
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                raise ValueError("its first line is no head of a sweep")
            whole = [line for line in lines[1:] if line.endswith("\n")]
            self.rows = [ProfileRow(**json.loads(line)) for line in whole]
        except (OSError, IndexError, KeyError, TypeError, ValueError) as e:
            raise ConfigError(
                f"{self._path} is damaged ({e}); it was left alone. Remove it to start the sweep anew"
            ) from e
        if told := _differences(found, head):
            raise ProfileMismatchError(
                f"{self._path} holds rows of another sweep; it was left alone:\n  "
                + "\n  ".join(told)
                + "\nRemove it, or choose another --out"
            )
        if len(whole) < len(lines) - 1:
            self._path.write_text("".join([lines[0], *whole]), encoding="utf-8")

    def add(self, row: ProfileRow) -> None:
        """Keep one row, at once."""
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row.to_dict()) + "\n")
        self.rows.append(row)

    def discard(self) -> None:
        """Remove the file, once the profile is written."""
        self._path.unlink(missing_ok=True)


def _differences(found: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What the file says and what is so here, field by field."""
    told = []
    for part in ("fingerprint", "facts"):
        before, now = found.get(part) or {}, here[part]
        told += [f"{key}: {before.get(key)!r} before, {now[key]!r} now" for key in now if before.get(key) != now[key]]
    if found.get("mixes") != here["mixes"]:
        told.append(f"mixes: {found.get('mixes')!r} before, {here['mixes']!r} now")
    return told
