"""Who refuses requests at an engine, and how many: one slot of its channel for each API server, claimed once, then its alone."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from pathlib import Path

from pals.runtime.blocks import Block

_SLOT = struct.Struct("<2d")  # process, requests refused
_STRIDE, SLOTS = 32, 64


class Refusals:
    """All slots of one channel, in the order in which they were claimed."""

    def __init__(self, mapped: mmap.mmap, offset: int) -> None:
        self._slots = [Block(mapped, offset + i * _STRIDE, _SLOT) for i in range(SLOTS)]

    @property
    def servers(self) -> int:
        """API servers that have come and can refuse requests."""
        return len(self._counts())

    @property
    def total(self) -> int:
        """Requests refused so far, by all of them."""
        return int(sum(self._counts()))

    def _counts(self) -> list[float]:
        """What each has refused."""
        counts = list[float]()
        for slot in self._slots:
            if not slot.written:
                break
            values = slot.read()
            counts.append(0.0 if values is None else values[1])
        return counts

    def claim(self, path: Path) -> RefusalCounter:
        """A slot of its own for this process; `path` is the channel, locked meanwhile.

        Raises:
            OSError: the channel is gone, or all slots are taken.
        """
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            for slot in self._slots:
                if not slot.written:
                    return RefusalCounter(slot)
        finally:
            os.close(handle)
        raise OSError(f"{path}: {SLOTS} API servers are here already; this one refuses nobody")


class RefusalCounter:
    """One slot, as its owner writes it."""

    def __init__(self, slot: Block) -> None:
        self._slot, self._refused = slot, 0
        self._write()

    def add(self) -> None:
        """One more request was refused."""
        self._refused += 1
        self._write()

    def _write(self) -> None:
        self._slot.write((float(os.getpid()), float(self._refused)))
