"""The clock and boards that a run in one process hands to the emulated executor and to the plugin inside vLLM.

vLLM builds scheduler and executor itself; what both are given is its configuration. So the world travels as vLLM's
own `additional_config`, which takes any object that can say its hash. Without one, the clock is the wall's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pals.runtime.clock import Clock, WallClock

if TYPE_CHECKING:
    from pals.plant.boards import BoardBank


@dataclass(frozen=True, kw_only=True)
class EmulatedWorld:
    """One clock and one set of emulated boards."""

    clock: Clock
    bank: BoardBank

    def compute_hash(self) -> str:
        """What vLLM asks of an `additional_config`: its compiled code does not depend on the world."""
        return "pals-emulated-world"


def world_of(vllm_config: Any) -> EmulatedWorld | None:
    """The world in a vLLM configuration, or None in an ordinary engine."""
    given = getattr(vllm_config, "additional_config", None)
    return given if isinstance(given, EmulatedWorld) else None


def clock_of(vllm_config: Any) -> Clock:
    """The clock an engine of this configuration lives by."""
    world = world_of(vllm_config)
    return world.clock if world is not None else WallClock()


@contextmanager
def emulating(name: str, folder: Path, bank: Path, routing: str = "", *, experts: bool | None = None) -> Iterator[None]:
    """The environment that vLLM and the plugin read in this process; as it was afterwards.

    `routing` is a schedule's text; `experts`: whether they are counted, None: as asked for outside.
    """
    before = dict(os.environ)
    os.environ |= {
        "PALS_EMU": "1",
        "PALS_EMU_BOARDS": str(bank),
        "PALS_EMU_ROUTING": routing,
        "PALS_RUN_DIR": str(folder),
        "PALS_MODEL_NAME": name,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",  # ids draw the texts
        "PALS_EXPERTS": os.environ.get("PALS_EXPERTS", "0") if experts is None else str(int(experts)),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
