"""Blocks of doubles in a mapped file: one writer each, no lock; a sequence number is odd while its block is being written."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection, Sequence

SEQ = struct.Struct("<Q")


class Block:
    """A sequence-numbered block of doubles in the mapped file."""

    def __init__(self, mapped: mmap.mmap, offset: int, layout: struct.Struct) -> None:
        self._mapped, self._offset, self._layout = mapped, offset, layout
        self._seq: int = SEQ.unpack_from(mapped, offset)[0]
        self._seq += self._seq & 1  # a writer that died in the middle
        self._last: tuple[float, ...] | None = None  # what was read here last

    def write(self, values: list[float] | tuple[float, ...]) -> None:
        """Write all of it."""
        SEQ.pack_into(self._mapped, self._offset, self._seq + 1)
        self._layout.pack_into(self._mapped, self._offset + 8, *values)
        self._seq += 2
        SEQ.pack_into(self._mapped, self._offset, self._seq)

    def write_parts(self, parts: Sequence[tuple[int, struct.Struct, Collection[float]]]) -> None:
        """Write only some of the block: (offset in bytes, layout, values) each; the rest keeps its values."""
        SEQ.pack_into(self._mapped, self._offset, self._seq + 1)
        for at, layout, values in parts:
            layout.pack_into(self._mapped, self._offset + 8 + at, *values)
        self._seq += 2
        SEQ.pack_into(self._mapped, self._offset, self._seq)

    @property
    def written(self) -> bool:
        """Whether anybody has ever begun to write it."""
        return bool(SEQ.unpack_from(self._mapped, self._offset)[0])

    def read(self) -> tuple[float, ...] | None:
        """Return the values, or None when nothing was written yet.

        A writer may lose its processor in the middle of a write for longer than is worth waiting: then what was read before
        still holds; None where nothing was.
        """
        for _ in range(1000):
            before = SEQ.unpack_from(self._mapped, self._offset)[0]
            if before == 0:
                return None
            values = self._layout.unpack_from(self._mapped, self._offset + 8)
            if before % 2 == 0 and before == SEQ.unpack_from(self._mapped, self._offset)[0]:
                self._last = values
                return values
        return self._last
