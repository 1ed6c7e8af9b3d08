"""How NVIDIA's kernel benchmarks (aiconfigurator) deal tokens to experts: what a measured MoE row was really given.

Two laws of expert load, balanced and truncated power law, drawn anew in each repetition. The collector of vLLM 0.14 dealt
what rounding left over to any expert, and ran the hottest rank alone, its assignments padded to whole tokens; later ones
deal it rank by rank.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pals.plant.experts import ExpertLoad, counted_load

Counts = NDArray[np.int64]
DRAWS = 5  # repetitions of the benchmark


@lru_cache(maxsize=65536)
def benchmark_load(law: str, experts: int, top_k: int, tokens: int, ranks: int, old: bool) -> ExpertLoad:
    """Work of the measured rank for a `distribution` of the tables: "balanced" or "power_law_<exponent>"."""
    if law == "balanced":
        return counted_load(balanced_counts(experts, top_k, tokens)[: experts // ranks])
    exponent = float(law.rsplit("_", 1)[1])
    draws = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        counts = power_law_counts(experts, top_k, tokens, exponent, rng)
        filled = _fill_least(counts, tokens * top_k, tokens, 1 if old else ranks, rng)
        by_rank = filled.reshape(ranks, -1)
        hottest = by_rank[np.argmax(by_rank.sum(axis=1))]
        draws.append(counted_load(_whole_tokens(hottest, top_k, rng) if old else hottest))
    return ExpertLoad(*(np.mean(field, axis=0) for field in zip(*draws, strict=True)))


def balanced_counts(experts: int, top_k: int, tokens: int) -> Counts:
    """Tokens of each expert where tokens are dealt to evenly spaced experts in turn, shape (experts,)."""
    stride = -(-experts // top_k)
    first = np.arange(tokens) if tokens >= stride else np.arange(tokens) * stride / tokens
    chosen = (first[:, None] + np.arange(top_k) * stride) % experts
    return np.bincount(chosen.astype(np.int64).ravel(), minlength=experts)


def power_law_counts(experts: int, top_k: int, tokens: int, exponent: float, rng: np.random.Generator) -> Counts:
    """Rounded tokens of each expert, density x^−exponent on [1, 0.8·tokens], or [0.01, 2] where experts outnumber
    assignments."""
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    u = rng.random(experts)
    q = 1.0 - exponent
    weights = ((high**q - low**q) * u + low**q) ** (1.0 / q)
    return np.asarray(np.round(weights / weights.sum() * tokens * top_k), dtype=np.int64)


def _fill_least(counts: Counts, total: int, most: int, groups: int, rng: np.random.Generator) -> Counts:
    """At most `most` tokens an expert; what is missing goes to the least loaded experts of each group alike."""
    grouped = np.minimum(counts, most).reshape(groups, -1)
    missing = total - int(grouped.sum())
    shares = [abs(missing) // groups + (r < abs(missing) % groups) for r in range(groups)]
    for row, share in zip(grouped, shares, strict=True):
        while share:
            level = row.min() if missing > 0 else row.max()
            chosen = rng.permutation(np.flatnonzero(row == level))[:share]
            row[chosen] += 1 if missing > 0 else -1
            share -= len(chosen)
    return grouped.ravel()


def _whole_tokens(counts: Counts, top_k: int, rng: np.random.Generator) -> Counts:
    """A rank's assignments padded to a multiple of the experts its tokens use, no expert twice by one token."""
    each = min(top_k, len(counts))
    tokens = -(-int(counts.sum()) // each)
    return _fill_least(counts, tokens * each, tokens, 1, rng)
