"""A window of expert counts as a picture's data: each layer's load by expert, over the layer's mean, and its figures. Unknown is never zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pals.core.experts import (
    ExpertCounts,
    ExpertSummary,
    FloatArray,
    hottest_over_mean,
    popularity_variation,
    ranks_of_experts,
    top_share,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """One layer; what is None is not known, in an unknown layer for the reason `why`."""

    name: str  # short: its number, where the names differ in nothing else
    load: FloatArray | None  # (experts,): an expert's choices over the layer's mean
    distinct_per_step: float | None
    variation: float | None
    top_fifth_share: float | None
    hottest_rank_over_mean: float | None
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPicture:
    """One engine's window."""

    engine: str
    emulated: bool
    summary: ExpertSummary
    layers: tuple[LayerLoad, ...]
    ranks: int
    placement: str | None
    reference: str  # what drift is measured from
    drift_by_chance: float | None  # what sampling alone gives where nothing drifted; None where drift is not known


def picture_of(
    window: ExpertCounts,
    summary: ExpertSummary,
    *,
    engine: str,
    emulated: bool = False,
    reference: ExpertCounts | None = None,
    reference_told: str = "",
) -> ExpertPicture:
    """The picture of `window`, whose numbers are `summary`; drift in it is from `reference`."""
    chance = None
    if reference is not None and summary.drift is not None:
        chance = drift_by_chance(summary.experts, window.tokens * window.top_k, reference.tokens * window.top_k)
    return ExpertPicture(
        engine=engine, emulated=emulated, summary=summary, layers=_layers(window, summary), ranks=window.ranks,
        placement=window.placement, reference=reference_told, drift_by_chance=chance,
    )  # fmt: skip


def drift_by_chance(experts: int, choices: int, reference_choices: int) -> float:
    """Jensen-Shannon distance of two samples of one popularity: sqrt((E - 1) (1/n + 1/m) / (8 ln 2)), for choices that are many.

    From the divergence's second-order term, sum of (p - q)^2 / (8 m ln 2), and the mean of chi-squared, E - 1.
    """
    return math.sqrt((experts - 1) * (1.0 / choices + 1.0 / reference_choices) / (8.0 * math.log(2.0)))


def binned(load: FloatArray, each: int) -> FloatArray:
    """Means of `each` neighbouring experts; the last of the rest."""
    starts = np.arange(0, len(load), each)
    return np.add.reduceat(load, starts) / np.diff(np.append(starts, len(load)))


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """Layers' names without the parts between dots that all share: "3" of "model.layers.3.mlp.experts"."""
    parts = [name.split(".") for name in names]
    shortest = min((len(p) for p in parts), default=0)
    if len(names) < 2:
        return tuple(next((word for word in p if word.isdigit()), name) for p, name in zip(parts, names, strict=True))
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({p[-1 - i] for p in parts}) > 1), shortest - head)
    short = tuple(".".join(p[head : len(p) - tail]) for p in parts)
    return short if all(short) and len(set(short)) == len(set(names)) else tuple(names)


def _layers(window: ExpertCounts, summary: ExpertSummary) -> tuple[LayerLoad, ...]:
    ranks = None
    if summary.hottest_rank_over_mean is not None and window.placement is not None:
        ranks = ranks_of_experts(summary.experts, window.ranks, window.placement)
    steady = summary.variation is not None
    distinct = window.distinct if window.steps > 0 else None
    made = []
    for i, (name, known) in enumerate(zip(short_names(window.layers), window.known, strict=True)):
        if not known:
            made.append(_unknown(name, _why(window, i)))
            continue
        counts = window.routed[i]
        made.append(
            LayerLoad(
                name=name,
                load=counts / counts.mean(),
                distinct_per_step=None if distinct is None else float(distinct[i] / window.steps),
                variation=popularity_variation(counts) if steady else None,
                top_fifth_share=top_share(counts) if steady else None,
                hottest_rank_over_mean=None if ranks is None else hottest_over_mean(counts, ranks),
            )
        )
    return tuple(made)


def _unknown(name: str, why: str) -> LayerLoad:
    return LayerLoad(
        name=name, load=None, distinct_per_step=None, variation=None, top_fifth_share=None, hottest_rank_over_mean=None,
        why=why,
    )  # fmt: skip


def _why(window: ExpertCounts, i: int) -> str:
    """Why a layer is not known."""
    if window.layers[i] in window.bypassed:
        return "its kernel chooses experts itself, past the router"
    return "no token was processed" if window.tokens == 0 else "its router's counter did not follow the tokens"
