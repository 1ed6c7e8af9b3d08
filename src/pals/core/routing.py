"""Popularity of experts in a few numbers, what a batch touches by it, and how far two routings lie apart beyond chance.

A popularity is cut into equal parts of the experts, rising, each by its mean over the mean of all: a coefficient of variation alone
does not say how many experts a batch touches, for laws of one variation differ in how many experts are hardly used.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

PARTS = 16
DIGITS = 4  # significant; more is noise of counting


def popularity_parts(routed: ArrayLike, parts: int = PARTS) -> tuple[float, ...]:
    """The popularity of all experts of all layers, shape (layers, experts), by equal parts; layers count alike. The mean is 1."""
    counts = np.asarray(routed, dtype=float)
    shares = np.sort((counts / counts.mean(axis=1, keepdims=True)).ravel())
    below = np.concatenate([[0.0], np.cumsum(shares)])
    ends = np.interp(np.linspace(0.0, len(shares), parts + 1), np.arange(len(below)), below)
    means = np.diff(ends) * parts / len(shares)
    return tuple(float(f"{m:.{DIGITS}g}") for m in means)


def touched(parts: Sequence[float] | FloatArray, *, experts: int, top_k: int, tokens: ArrayLike) -> FloatArray:
    """Experts of a layer that so many tokens touch, as many numbers as `tokens`: the mean over parts of 1 - (1 - p)^tokens, for each expert.

    Tokens are taken as independent.
    """
    chance = np.minimum(0.999, np.asarray(parts) * top_k / experts)
    return np.asarray(
        -experts * np.expm1(np.multiply.outer(np.asarray(tokens, float), np.log1p(-chance))).mean(axis=-1)
    )


def distances(a: ArrayLike, b: ArrayLike) -> FloatArray:
    """Jensen-Shannon distance of two popularities, layer by layer, to base 2: 0 alike, 1 disjoint; shape (layers,)."""
    p, q = (np.asarray(x, float) / np.sum(x, axis=1, keepdims=True) for x in (a, b))
    middle = 0.5 * (p + q)
    divergence = 0.5 * (_relative_entropy(p, middle) + _relative_entropy(q, middle))
    return np.asarray(np.sqrt(np.clip(divergence, 0.0, 1.0)))


def _relative_entropy(p: FloatArray, q: FloatArray) -> FloatArray:
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log2(ratio)).sum(axis=1))


def chance_distances(a: ArrayLike, b: ArrayLike) -> FloatArray:
    """The distance to expect of two samples of one popularity, layer by layer: of counts so few, shape (layers,).

    Of small differences the divergence is sum (p - q)^2 / 8p nats, and a share counted n times has variance p (1 - p) / n.
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    seen = ((x + y) > 0).sum(axis=1)
    counted = 1.0 / x.sum(axis=1) + 1.0 / y.sum(axis=1)
    return np.asarray(np.sqrt(np.minimum(1.0, np.maximum(0, seen - 1) * counted / (8.0 * log(2.0)))))
