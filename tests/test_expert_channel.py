"""The file of a worker's expert counts: what was published is read whole, and nothing is left of workers that ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pals.core.experts import Counts
from pals.runtime.channel import find_engines
from pals.runtime.expert_channel import ExpertChannel, ExpertFacts, read_engine, read_worker


def facts(**more: object) -> ExpertFacts:
    given = {
        "pid": os.getpid(), "engine_pid": 1, "tensor_rank": 0, "data_rank": 0, "layers": ("a", "b"), "experts": 4,
        "top_k": 2, "ranks": 1, "placement": "linear", "bypassed": (),
    }  # fmt: skip
    return ExpertFacts(**given | more)  # type: ignore[arg-type]


def sums(tokens: int, *, skew: int = 0) -> Counts:
    """Even counts of two layers of four experts, `skew` moved from the last expert to the first; two experts touched a token."""
    row = [tokens // 2 + skew, tokens // 2, tokens // 2, tokens // 2 - skew, 2 * tokens]
    return np.array([row, row])


def test_what_a_worker_publishes_is_what_an_agent_reads(tmp_path: Path) -> None:
    channel = ExpertChannel(tmp_path, facts())
    assert read_worker(channel.path).counts is None
    size = channel.path.stat().st_size
    for step in (1, 2):
        channel.publish(time_s=5.0 * step, steps=step, tokens=8 * step, sums=sums(8 * step))
    read = read_worker(channel.path).counts
    assert read is not None
    assert (read.time_s, read.steps, read.tokens, read.layers) == (10.0, 2, 16, ("a", "b"))
    assert read.routed.tolist() == [[8, 8, 8, 8]] * 2
    assert read.distinct is not None
    assert read.distinct.tolist() == [32, 32]
    assert channel.path.stat().st_size == size
    assert channel.path.stat().st_mode & 0o077 == 0
    channel.close()
    assert not channel.path.exists()


def test_counts_of_another_shape_change_nothing(tmp_path: Path) -> None:
    channel = ExpertChannel(tmp_path, facts())
    with pytest.raises(ValueError, match="nothing was written"):
        channel.publish(time_s=1.0, steps=1, tokens=1, sums=np.zeros((2, 4), np.int64))
    assert read_worker(channel.path).counts is None


def test_a_block_that_its_writer_left_half_written_is_not_read(tmp_path: Path) -> None:
    channel = ExpertChannel(tmp_path, facts())
    channel.publish(time_s=1.0, steps=1, tokens=8, sums=sums(8))
    content = bytearray(channel.path.read_bytes())
    at = content.rindex(b"\x02" + bytes(7) + np.array([1.0]).tobytes())
    content[at] = 3
    channel.path.write_bytes(content)
    assert read_worker(channel.path).counts is None


def test_foreign_and_truncated_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.experts").write_bytes(b"something else, long enough to look at")
    with pytest.raises(ValueError, match="no expert counts"):
        read_worker(tmp_path / "x.experts")
    channel = ExpertChannel(tmp_path, facts())
    channel.path.write_bytes(channel.path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="does not fit"):
        read_worker(channel.path)
    assert read_engine(tmp_path, [1]) is None


def test_of_ranks_that_see_the_same_tokens_one_is_counted(tmp_path: Path) -> None:
    for rank in (1, 0):
        channel = ExpertChannel(tmp_path, facts(pid=100 + rank, tensor_rank=rank, ranks=2))
        channel.publish(time_s=1.0, steps=1, tokens=8, sums=sums(8))
    ExpertChannel(tmp_path, facts(pid=102, engine_pid=2)).publish(time_s=1.0, steps=1, tokens=80, sums=sums(80))
    one, both = read_engine(tmp_path, [1]), read_engine(tmp_path, [1, 2])
    assert one is not None
    assert (one.tokens, int(one.routed.sum()), one.ranks) == (8, 32, 2)
    assert both is not None
    assert (both.tokens, both.distinct) == (88, None)


def test_the_agents_sweep_removes_what_killed_workers_left(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, living = ExpertChannel(tmp_path, facts(pid=ended.pid)), ExpertChannel(tmp_path, facts())
    assert find_engines(tmp_path) == []
    assert (dead.path.exists(), living.path.exists()) == (False, True)
