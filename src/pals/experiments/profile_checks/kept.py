"""Rows and results kept as JSON, one file a case, so that an evaluation goes on where it was stopped.

Whatever was computed by other code is computed anew: each file names the digest of the sources that decide it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[2]  # src/pals
MEASURING = tuple(f"profiler/{name}.py" for name in ("costs", "load", "plan", "visit", "window"))
TRUTH = (
    "plant", "core/architecture.py", "core/load.py", "core/quantities.py", "models/row.py", *MEASURING, "experiments/simulated_*.py",
    "experiments/profile_checks/combination.py",
)  # fmt: skip
SWEPT = (*TRUTH, "models", "profiler")
JUDGING = tuple(  # what only shows results is not among them
    f"experiments/profile_checks/{name}.py"
    for name in ("case", "cost", "judge", "own", "question", "regret", "rivals", "score", "silicon", "splits", "world")
)
READING = tuple(f"experiments/plant_checks/{name}.py" for name in ("measured", "serving_cases", "sweeps"))
JUDGED = (*SWEPT, *JUDGING, *READING)


@cache
def digest_of(*patterns: str) -> str:
    """Of all sources and constants under these folders or patterns of `src/pals`."""
    found = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(SOURCES.glob(pattern if "." in pattern else f"{pattern}/**/*")):
            if path.suffix in (".py", ".json") and path.is_file() and "data" not in path.parts:
                found.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def read_kept(path: Path, patterns: Sequence[str]) -> dict[str, Any] | None:
    """What is kept there; None: nothing, or made by other code."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("digest") != digest_of(*patterns):
        return None
    return data


def keep(path: Path, patterns: Sequence[str], data: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.new")
    fresh.write_text(json.dumps({"digest": digest_of(*patterns), **data}) + "\n", encoding="utf-8")
    fresh.replace(path)
