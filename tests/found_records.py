"""Records of found limits as a killed or a living agent leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

DEAD_PID = 2**22 + 1  # above what the kernel gives


def write_record(
    record: Path,
    boards: Mapping[str, tuple[float, Sequence[float]]],
    *,
    pid: int = DEAD_PID,
    started: int = 1,
    locked: bool = False,
) -> None:
    """`boards`: by UUID the limit found and the limits written, W."""
    told = {u: {"found_w": f, "written_w": list(w), "clock_locked": locked} for u, (f, w) in boards.items()}
    record.write_text(json.dumps({"format": "pals-limits-found/2", "pid": pid, "started": started, "boards": told}))
