"""Which experts a simulated model's tokens choose: who is popular in which layer, and what a worker that counts would have counted.

All layers share one popularity curve, the one that step times are computed from; a seed says which expert stands where on it. So the
coefficient of variation alone decides how many experts a step touches, and a swap of experts changes who is popular and no time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pals.core.architecture import ModelShape
from pals.core.experts import Counts, ExpertCounts
from pals.plant.experts import popularity

FloatArray = NDArray[np.float64]
_EXCHANGES = 20  # rounds in which choices beyond an expert's share find others at random


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Popularity of the experts in each layer."""

    top_k: int
    cv: float  # coefficient of variation of the popularity, as the step model takes it
    order: NDArray[np.int64]  # (layers, experts): the expert at each rank of popularity, the most popular first

    @classmethod
    def drawn(cls, *, layers: int, experts: int, top_k: int, cv: float, seed: int = 0) -> Routing:
        """Every layer's own order, from the seed."""
        ranks = np.tile(np.arange(experts), (layers, 1))
        return cls(top_k=top_k, cv=cv, order=np.random.default_rng(seed).permuted(ranks, axis=1))

    @property
    def layers(self) -> int:
        """That choose experts."""
        return len(self.order)

    @property
    def experts(self) -> int:
        """Of a layer."""
        return int(self.order.shape[1])

    @property
    def _curve(self) -> FloatArray:
        """The chance that a token uses the expert at each rank."""
        return np.sort(np.array(popularity(self.experts, self.top_k, self.cv)))[::-1]

    def popularity(self) -> FloatArray:
        """The chance that a token uses each expert, shape (layers, experts); sums to `top_k` a layer."""
        return self._by_expert(_filled(self._curve, self.top_k))

    def _by_expert(self, by_rank: FloatArray) -> FloatArray:
        placed = np.empty(self.order.shape)
        np.put_along_axis(placed, self.order, np.broadcast_to(by_rank, self.order.shape), axis=1)
        return placed

    def expected_counts(self, tokens: float) -> FloatArray:
        """Tokens of `tokens` that choose each expert, shape (layers, experts)."""
        return tokens * self.popularity()

    def sampled_counts(self, tokens: int, rng: np.random.Generator) -> Counts:
        """The same, drawn: each layer sums to tokens × `top_k`, and no expert has more than `tokens`."""
        chosen = rng.multinomial(tokens * self.top_k, self.popularity() / self.top_k).astype(np.int64, copy=False)
        for row in chosen:
            _hand_on(row, tokens, rng)
        return chosen

    def distinct(self, tokens: NDArray[np.int64]) -> FloatArray:
        """Experts that steps of so many tokens touch in a layer, expected; what step times are computed from."""
        return np.asarray(np.sum(1.0 - np.power.outer(1.0 - self._curve, tokens), axis=0))

    def distinct_variance(self, tokens: NDArray[np.int64]) -> FloatArray:
        """Variance of that: of independent experts, less what they owe each other because a token uses exactly `top_k`."""
        p = self._curve[:, None]
        untouched = (1.0 - p) ** tokens
        own, spread = np.sum(untouched * (1.0 - untouched), axis=0), float(np.sum(p * (1.0 - p)))
        shared = tokens * np.sum(untouched * p, axis=0) ** 2
        return np.asarray(np.maximum(0.0, own - shared / max(spread, 1e-12)))

    def with_cv(self, cv: float) -> Routing:
        """The same experts in the same order, more or less unequal."""
        return self if cv == self.cv else replace(self, cv=cv)

    def swapped(self, begin: float = 0.0, end: float = 0.5) -> Routing:
        """The most popular experts change places with the least popular ones, in every layer.

        Args:
            begin: share of the more popular half at which the swap begins, 0 is its most popular expert.
            end: share at which it ends; 1 turns the whole order around.
        """
        pairs = self.experts // 2
        first, last = round(begin * pairs), round(end * pairs)
        ranks = np.arange(self.experts)
        ranks[first:last] = self.experts - 1 - np.arange(first, last)
        ranks[self.experts - last : self.experts - first] = np.arange(first, last)[::-1]
        return replace(self, order=self.order[:, ranks])


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTally:
    """What a worker has counted since its start; drawn when it is asked, not in the step, and never changed: `after` is the next."""

    routing: Routing
    names: tuple[str, ...]  # of the layers
    sums: (
        Counts  # (layers, experts + 1): tokens that chose each expert, and last the experts touched, summed over steps
    )
    seed: int
    steps: int = 0
    tokens: int = 0
    draws: int = 0

    def after(self, steps_by_tokens: NDArray[np.int64]) -> RoutingTally:
        """Counts after so many further steps of each number of tokens, from 0 on; they went by the present routing."""
        tokens = np.flatnonzero(steps_by_tokens)
        if not len(tokens):
            return self
        steps, routing = steps_by_tokens[tokens], self.routing
        rng, every = np.random.default_rng((self.seed, self.draws)), int(steps @ tokens)
        mean, deviation = steps @ routing.distinct(tokens), np.sqrt(steps @ routing.distinct_variance(tokens))
        touched = np.rint(mean + deviation * rng.standard_normal(routing.layers))
        fewest, most = steps.sum() * routing.top_k, steps @ np.minimum(tokens * routing.top_k, routing.experts)
        more = np.column_stack([routing.sampled_counts(every, rng), np.clip(touched, fewest, most).astype(np.int64)])
        return replace(
            self, sums=self.sums + more, steps=self.steps + int(steps.sum()), tokens=self.tokens + every,
            draws=self.draws + 1,
        )  # fmt: skip

    def counts(self, time_s: float, *, ranks: int = 1, placement: str | None = "linear") -> ExpertCounts:
        """As a reader of a worker's counts gets them."""
        return ExpertCounts.alike(
            time_s=time_s, span_s=None, steps=self.steps, tokens=self.tokens, layers=self.names,
            top_k=self.routing.top_k, routed=self.sums[:, :-1], distinct=self.sums[:, -1], ranks=ranks,
            placement=placement,
        )  # fmt: skip


def tally_of(shape: ModelShape, cv: float, *, seed: int = 0, rank: int = 0) -> RoutingTally | None:
    """Nothing counted yet; None for a model without experts.

    Args:
        shape: the model.
        cv: coefficient of variation of the popularity.
        seed: of who is popular; the same for all ranks of one engine.
        rank: data-parallel, whose tokens are other tokens.
    """
    if not (shape.experts and shape.moe_layers):
        return None
    routing = Routing.drawn(layers=shape.moe_layers, experts=shape.experts, top_k=shape.top_k, cv=cv, seed=seed)
    first = shape.layers - shape.moe_layers  # where some layers have none, these come first in most models
    return RoutingTally(
        routing=routing, names=tuple(f"model.layers.{first + i}.mlp.experts" for i in range(shape.moe_layers)),
        sums=np.zeros((shape.moe_layers, shape.experts + 1), np.int64), seed=seed + 2**32 * (rank + 1),
    )  # fmt: skip


def _filled(curve: FloatArray, top_k: int) -> FloatArray:
    """The curve with what experts beyond a chance of 1 would have had given to the others, so that it sums to `top_k`."""
    chance = curve
    for _ in range(len(curve)):
        lacking = top_k - chance.sum()
        room = chance < 1.0
        if lacking <= 1e-9 or not room.any():
            break
        weight = np.where(room, chance + 1e-12, 0.0)
        chance = np.minimum(1.0, chance + lacking * weight / weight.sum())
    return np.asarray(chance * (top_k / chance.sum()))


def _hand_on(row: Counts, most: int, rng: np.random.Generator) -> None:
    """Choices of an expert beyond `most`, a token's second of the same expert, go to experts that have room; `row` is changed."""
    for _ in range(_EXCHANGES):
        over = int(np.maximum(row - most, 0).sum())
        if not over:
            return
        np.minimum(row, most, out=row)
        room = most - row
        row += rng.multinomial(over, room / room.sum())
    over = int(np.maximum(row - most, 0).sum())
    np.minimum(row, most, out=row)
    room = np.cumsum(most - row)
    row += np.diff(np.minimum(room, over), prepend=0)
