"""What the hottest rank of expert parallelism has to do: the step waits for it, the others draw less meanwhile.

Ranks differ because experts differ in popularity, and because few tokens fall unevenly even where they do not.
Derivation: docs/models/step.md.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.plant.experts import expected_load, popularity

FloatArray = NDArray[np.float64]


class RankLoad(NamedTuple):
    """Work of the hottest rank in one layer, arrays of shape (cases,); `slots` of shape (cases, len(BLOCKS))."""

    touched: FloatArray  # distinct experts with at least one token
    assignments: FloatArray  # (token, expert) pairs
    slots: FloatArray  # rows after padding each expert's tokens to blocks of BLOCKS
    even: FloatArray  # mean rank's share of `touched`


@lru_cache(maxsize=128)
def rank_load(experts: int, top_k: int, tokens: tuple[float, ...], ranks: int, cv: float) -> RankLoad:
    """Expected work of the hottest of `ranks` ranks, each holding experts/ranks consecutive experts.

    The maximum of n ranks is taken as mean + z·σ, z the expected maximum of n normal draws (Blom), σ² the variance between
    the ranks' expectations plus that of a rank's own draw.
    """
    all_of = expected_load(experts, top_k, tokens, cv=cv)
    if ranks == 1:
        return RankLoad(all_of.touched, all_of.assignments, all_of.slots, np.ones(len(tokens)))
    p = np.array(popularity(experts, top_k, cv))
    count = np.asarray(tokens, dtype=np.float64)[:, None]
    used = 1.0 - (1.0 - p) ** count
    touched = _hottest(used, used * (1.0 - used), ranks, float(experts) / ranks)
    assigned = _hottest(count * p, count * p * (1.0 - p), ranks, np.inf)
    mean = np.maximum(all_of.touched / ranks, 1e-12)
    padding = (all_of.slots - all_of.assignments[:, None]) / ranks
    slots = assigned[:, None] + np.maximum(0.0, padding) * (touched / mean)[:, None]
    return RankLoad(touched, assigned, slots, np.where(touched > 0, mean / np.maximum(touched, 1e-12), 1.0))


def _hottest(mean: FloatArray, variance: FloatArray, ranks: int, most: float) -> FloatArray:
    """Expected maximum over ranks of sums over each rank's experts; both of shape (cases, experts)."""
    by_rank = np.array([part.sum(axis=1) for part in np.array_split(mean, ranks, axis=1)])
    own = np.array([part.sum(axis=1) for part in np.array_split(variance, ranks, axis=1)]).mean(axis=0)
    z = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    return np.asarray(np.minimum(most, by_rank.mean(axis=0) + z * np.sqrt(by_rank.var(axis=0) + own)))
