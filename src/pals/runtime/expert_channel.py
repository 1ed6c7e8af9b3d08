"""Expert counts of one worker in a mapped file beside its engine's channel: written at most twice a second, read by the agent, no lock.

First JSON of `ExpertFacts`, once; then one block behind a sequence number that is odd while it is being written: time, steps and
tokens as doubles, then per layer its experts' counts and the sum of experts touched, as 64-bit integers. The size is fixed at the start.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pals.core.experts import Counts, ExpertCounts, merge
from pals.core.plain import decode
from pals.runtime.blocks import SEQ
from pals.runtime.files import own_folder, replace_file
from pals.runtime.processes import process_alive

MAGIC = b"PALSEX01"
SUFFIX = ".experts"
_FACTS_OFFSET = 16
_HEAD = 3  # doubles before the counts
_TRIES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts:
    """What a worker says of itself once."""

    pid: int
    engine_pid: int  # of the process that schedules, whose channel this belongs to
    tensor_rank: int
    data_rank: int
    layers: tuple[str, ...]
    experts: int
    top_k: int
    ranks: int  # that share the experts
    placement: str | None
    bypassed: tuple[str, ...]


class ExpertChannel:
    """The worker's end: creates the file, writes the counts, removes it."""

    def __init__(self, folder: Path, facts: ExpertFacts) -> None:
        self.path = own_folder(folder) / f"vllm-{facts.pid}{SUFFIX}"
        text = json.dumps(asdict(facts)).encode()
        self._block = _block_offset(len(text))
        size = self._block + SEQ.size + _counts_size(facts)
        replace_file(self.path, (MAGIC + SEQ.pack(len(text)) + text).ljust(size, b"\0"))
        self._mapped = _map(self.path)
        self._seq = 0
        self._shape = (len(facts.layers), facts.experts + 1)

    def publish(self, *, time_s: float, steps: int, tokens: int, sums: Counts) -> None:
        """Write the counts so far; `sums` has a row a layer: a column an expert, and last the sum of experts touched."""
        if sums.shape != self._shape:
            raise ValueError(f"counts of shape {sums.shape}, not {self._shape}; nothing was written")
        content = np.array((time_s, steps, tokens), "<f8").tobytes() + sums.astype("<i8", copy=False).tobytes()
        start = self._block + SEQ.size
        SEQ.pack_into(self._mapped, self._block, self._seq + 1)
        self._mapped[start : start + len(content)] = content
        self._seq += 2
        SEQ.pack_into(self._mapped, self._block, self._seq)

    def close(self) -> None:
        """Remove the file: the worker has ended, or counts no more."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._mapped.close()


class WorkerCounts(NamedTuple):
    """One worker's counts as last published; None: it has not published yet."""

    facts: ExpertFacts
    counts: ExpertCounts | None


def read_worker(path: Path) -> WorkerCounts:
    """What the worker behind `path` published last.

    Raises:
        OSError: the file is gone, or closed to us.
        ValueError: it is no file of this kind, or of another version.
    """
    mapped = _map(path, mmap.ACCESS_READ)
    try:
        facts, block = _facts(mapped, path)
        content = _consistent(mapped, block, _counts_size(facts))
    finally:
        mapped.close()
    if content is None:
        return WorkerCounts(facts, None)
    time_s, steps, tokens = np.frombuffer(content, "<f8", _HEAD)
    sums = np.frombuffer(content, "<i8", offset=8 * _HEAD).reshape(len(facts.layers), facts.experts + 1)
    everywhere = np.ones(len(facts.layers), np.int64)  # a worker's layers all take part in each of its steps
    counts = ExpertCounts(
        time_s=float(time_s), span_s=None, layers=facts.layers, top_k=facts.top_k,
        layer_steps=int(steps) * everywhere, layer_tokens=int(tokens) * everywhere,
        routed=sums[:, :-1], distinct=sums[:, -1], ranks=facts.ranks, placement=facts.placement, bypassed=facts.bypassed,
    )  # fmt: skip
    return WorkerCounts(facts, counts)


def read_engine(folder: Path, engine_pids: Collection[int]) -> ExpertCounts | None:
    """The counts of one engine (of several processes where it is data-parallel), from all its workers; None where none counts.

    Of workers that see the same tokens one is taken, that of the lowest tensor-parallel rank.
    """
    chosen = dict[tuple[int, tuple[str, ...]], WorkerCounts]()
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            worker = read_worker(path)
        except (OSError, ValueError):
            continue
        if worker.counts is None or worker.facts.engine_pid not in engine_pids:
            continue
        same = (worker.facts.engine_pid, worker.facts.layers)
        if same not in chosen or worker.facts.tensor_rank < chosen[same].facts.tensor_rank:
            chosen[same] = worker
    ordered = sorted(chosen.values(), key=lambda w: (w.facts.data_rank, w.facts.pid))
    return merge([w.counts for w in ordered if w.counts is not None]) if ordered else None


def sweep(folder: Path) -> None:
    """Remove the files of workers that have ended without doing so."""
    for path in folder.glob(f"*{SUFFIX}"):
        pid = path.stem.rpartition("-")[2]
        if pid.isdigit() and not process_alive(int(pid)):
            path.unlink(missing_ok=True)


def _map(path: Path, access: int = mmap.ACCESS_WRITE) -> mmap.mmap:
    """The whole file, not that of a file elsewhere that a link points to."""
    flags = os.O_RDONLY if access == mmap.ACCESS_READ else os.O_RDWR
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mmap.mmap(handle, 0, access=access)
    finally:
        os.close(handle)


def _facts(mapped: mmap.mmap, path: Path) -> tuple[ExpertFacts, int]:
    """What the worker said of itself, and where its block begins."""
    if len(mapped) < _FACTS_OFFSET or mapped[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} holds no expert counts (or of another PALS version)")
    size = SEQ.unpack_from(mapped, len(MAGIC))[0]
    told = json.loads(mapped[_FACTS_OFFSET : _FACTS_OFFSET + size])
    facts: ExpertFacts = decode(ExpertFacts, told)
    block = _block_offset(size)
    if len(mapped) != block + SEQ.size + _counts_size(facts):
        raise ValueError(f"{path} is {len(mapped)} bytes long, which does not fit what it says of itself")
    return facts, block


def _consistent(mapped: mmap.mmap, block: int, size: int) -> bytes | None:
    """The block's content, or None when nothing was written yet or a writer never finished."""
    for _ in range(_TRIES):
        before = SEQ.unpack_from(mapped, block)[0]
        if before == 0:
            return None
        content = mapped[block + SEQ.size : block + SEQ.size + size]
        if before % 2 == 0 and before == SEQ.unpack_from(mapped, block)[0]:
            return content
    return None


def _block_offset(facts_size: int) -> int:
    return (_FACTS_OFFSET + facts_size + 63) // 64 * 64


def _counts_size(facts: ExpertFacts) -> int:
    return 8 * (_HEAD + len(facts.layers) * (facts.experts + 1))
