"""How NVIDIA's kernel benchmarks (aiconfigurator) deal tokens to experts: what a measured MoE row was really given.

Two laws of expert load (balanced, truncated power law) in two generations of the collector: until vLLM 0.14 it filled
the most loaded experts first and padded the hottest rank to whole tokens, from 0.17 on it fills the least loaded.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pals.plant.experts import ExpertLoad, counted_load

Counts = NDArray[np.int64]
DRAWS = 3  # orders of experts averaged over


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
        by_rank = (_fill_most if old else _fill_least)(counts, tokens * top_k, tokens, ranks, rng)
        hottest = by_rank[np.argmax(by_rank.sum(axis=1))]
        draws.append(counted_load(_whole_tokens(hottest, top_k) if old else hottest))
    return ExpertLoad(*(np.mean(field, axis=0) for field in zip(*draws, strict=True)))


def balanced_counts(experts: int, top_k: int, tokens: int) -> Counts:
    """Tokens of each expert where tokens are dealt to evenly spaced experts in turn, shape (experts,)."""
    stride = -(-experts // top_k)
    first = np.arange(tokens) if tokens >= stride else np.arange(tokens) * stride / tokens
    chosen = (first[:, None] + np.arange(top_k) * stride) % experts
    return np.bincount(chosen.astype(np.int64).ravel(), minlength=experts)


def power_law_counts(experts: int, top_k: int, tokens: int, exponent: float, rng: np.random.Generator) -> Counts:
    """Rounded tokens of each expert, density x^−exponent on [1, 0.8·tokens], or [0.01, 2] where experts outnumber
    assignments; stratified draws in random order."""
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    u = rng.permutation((np.arange(experts) + 0.5) / experts)
    q = 1.0 - exponent
    weights = ((high**q - low**q) * u + low**q) ** (1.0 / q)
    return np.round(weights / weights.sum() * tokens * top_k).astype(np.int64)


def _fill_least(counts: Counts, total: int, most: int, ranks: int, rng: np.random.Generator) -> Counts:
    """At most `most` tokens an expert; what is missing goes to each rank's least loaded experts, rank by rank."""
    by_rank = np.minimum(counts, most).reshape(ranks, -1)
    missing = total - int(by_rank.sum())
    shares = [abs(missing) // ranks + (r < abs(missing) % ranks) for r in range(ranks)]
    for row, share in zip(by_rank, shares, strict=True):
        while share:
            level = row.min() if missing > 0 else row.max()
            chosen = np.flatnonzero(row == level)[:share]
            row[chosen] += 1 if missing > 0 else -1
            share -= len(chosen)
    return by_rank


def _fill_most(counts: Counts, total: int, most: int, ranks: int, rng: np.random.Generator) -> Counts:
    """What is missing goes to the most loaded experts in turn (among equals in random order), a surplus from the least."""
    order = np.lexsort((rng.random(len(counts)), -counts))
    missing = total - int(counts.sum())
    while missing:
        step = 1 if missing > 0 else -1
        eligible = order if missing > 0 else order[::-1][counts[order[::-1]] > 0]
        chosen = eligible[: abs(missing)]
        counts[chosen] += step
        missing -= step * len(chosen)
    return counts.reshape(ranks, -1)


def _whole_tokens(counts: Counts, top_k: int) -> Counts:
    """Pad a rank's assignments to a multiple of the experts its tokens use, one each in turn."""
    extra = -int(counts.sum()) % min(top_k, len(counts))
    padded = counts.copy()
    padded[:extra] += 1
    return padded
