"""Which experts a batch of tokens touches: popularity, distinct experts, padded slots, and the hottest rank.

An expert used by at least one token costs the reading of its weights; each expert's tokens are padded to blocks of the
grouped matrix product; under expert parallelism the step waits for the rank with the most work. Derivation and checks:
docs/models/kernels.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

EXPERT_CV = 0.3  # popularity of experts, coefficient of variation, where nothing is known of the model's routing
LEAST_CV = 1e-6  # below it, all experts alike: the gamma draw's shape would leave the range of numbers
BLOCKS = (16, 32, 64, 128)  # rows of one tile of the grouped matrix product that kernels choose from


class ExpertLoad(NamedTuple):
    """Work of the hottest rank in one layer; arrays of shape (cases,), `slots` of shape (cases, len(BLOCKS))."""

    touched: FloatArray  # distinct experts with at least one token
    assignments: FloatArray  # (token, expert) pairs
    slots: FloatArray  # rows after padding each expert's tokens to blocks of BLOCKS


@lru_cache(maxsize=64)
def popularity(experts: int, top_k: int, cv: float) -> tuple[float, ...]:
    """Probability that a token uses each expert; gamma weights of a fixed seed, inclusion capped at 1."""
    if cv < LEAST_CV:
        return (top_k / experts,) * experts
    weights = np.random.default_rng(0).gamma(1 / cv**2, cv**2, experts)
    return tuple(np.minimum(1.0, top_k * weights / weights.sum()))


def distinct_experts(experts: int, top_k: int, tokens: ArrayLike, cv: float = EXPERT_CV) -> FloatArray:
    """Expected number of experts that `tokens` independent tokens touch in one layer: Σ(1 − (1 − p_e)^B)."""
    p = np.array(popularity(experts, top_k, cv))
    return np.asarray(np.sum(1.0 - np.power.outer(1.0 - p, tokens), axis=0))


def expected_load(experts: int, top_k: int, tokens: ArrayLike, *, ranks: int = 1, cv: float = EXPERT_CV) -> ExpertLoad:
    """Expected work of the hottest of `ranks` ranks, each holding experts/ranks consecutive experts.

    Args:
        experts: routed experts of the layer.
        top_k: experts a token uses.
        tokens: independently routed tokens, shape (cases,).
        ranks: of expert parallelism; `tokens` counts the tokens of all of them.
        cv: coefficient of variation of the popularity.
    """
    p = np.array(popularity(experts, top_k, cv)).reshape(ranks, -1)
    hottest = p[np.argmax(p.sum(axis=1))]
    count = np.atleast_1d(np.asarray(tokens, dtype=np.float64))[:, None]
    mean, variance = count * hottest, count * hottest * (1.0 - hottest)
    some = 1.0 - (1.0 - hottest) ** count
    blocks = [_expected_blocks(mean, variance, some, b) * b for b in BLOCKS]
    return ExpertLoad(some.sum(axis=1), mean.sum(axis=1), np.stack([np.sum(b, axis=1) for b in blocks], axis=1))


def _expected_blocks(mean: FloatArray, variance: FloatArray, some: FloatArray, block: int) -> FloatArray:
    """E⌈C/b⌉ = P(C > 0) + Σ_j P(C > j·b), each term by the normal approximation; C/b + ½ where C spans many blocks."""
    spread = np.sqrt(np.maximum(variance, 1e-12))
    blocks = some.copy()
    for j in range(1, 9):
        z = (mean - j * block - 0.5) / spread
        blocks += np.minimum(some, 1.0 / (1.0 + np.exp(-1.702 * np.clip(z, -30, 30))))
    return np.asarray(np.maximum(np.where(mean > 6.0 * block, mean / block + 0.5, blocks), mean / block))


def counted_load(counts: NDArray[np.int64], ranks: int = 1) -> ExpertLoad:
    """Work of the hottest rank where the tokens of each expert are known, shape (experts,); arrays of shape (1,)."""
    by_rank = counts.reshape(ranks, -1)
    hottest = by_rank[np.argmax(by_rank.sum(axis=1))]
    slots = [[float(np.sum(-(-hottest // b)) * b) for b in BLOCKS]]
    return ExpertLoad(np.array([float(np.count_nonzero(hottest))]), np.array([float(hottest.sum())]), np.array(slots))
