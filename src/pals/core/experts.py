"""What the routing of a window says: experts touched, popularity, ranks out of balance, drift. Unknown is None with a reason, never zero.

Counts are cumulative since the engine started; a window is the difference of two of them. Only routing to logical experts is counted, so
replicas that a load balancer adds change nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals.core.routing import chance_distances, distances, popularity_parts

Counts = NDArray[np.int64]
FloatArray = NDArray[np.float64]

PLACEMENTS = ("linear", "round_robin")
#: Below this many choices an expert, on average, sampling alone makes a coefficient of variation of a tenth.
LEAST_CHOICES_PER_EXPERT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCounts:
    """Routing since the start of the engine, or of a window of it."""

    time_s: float  # monotonic clock; of the window's end
    span_s: float | None  # what the counts cover; None: since a start that was not told
    layers: tuple[str, ...]
    layer_steps: Counts  # (layers,): a layer's own, for pipeline stages publish each at its own time
    layer_tokens: Counts  # (layers,): tokens that went through the layer
    top_k: int  # experts a token chooses in a layer
    routed: Counts  # (layers, experts): tokens that chose the expert
    distinct: Counts | None  # (layers,): experts touched, summed over steps; None: not known
    ranks: int = 1  # that share the experts
    placement: str | None = "linear"  # which experts a rank holds, one of PLACEMENTS; None: not known, they move
    bypassed: tuple[str, ...] = ()  # layers whose kernel chooses experts itself, past the router

    def __post_init__(self) -> None:
        if self.routed.ndim != 2 or len(self.routed) != len(self.layers):
            raise ValueError(f"counts of shape {self.routed.shape} do not fit {len(self.layers)} layers")
        for name in ("layer_steps", "layer_tokens", "distinct"):
            value = getattr(self, name)
            if value is not None and value.shape != (len(self.layers),):
                raise ValueError(f"{name} of shape {value.shape} does not fit {len(self.layers)} layers")
        if self.placement is not None and self.placement not in PLACEMENTS:
            raise ValueError(f"placement {self.placement!r} is none of {', '.join(PLACEMENTS)}")

    @staticmethod
    def alike(*, steps: int, tokens: int, layers: tuple[str, ...], **facts: Any) -> ExpertCounts:
        """Counts of layers that all saw the same steps and tokens."""
        everywhere = np.ones(len(layers), np.int64)
        return ExpertCounts(layer_steps=steps * everywhere, layer_tokens=tokens * everywhere, layers=layers, **facts)

    def since(self, earlier: ExpertCounts) -> ExpertCounts:
        """The window between `earlier` and these.

        Raises:
            ValueError: they are not of the same run of the same engine, in this order.
        """
        same = self.layers == earlier.layers and self.routed.shape == earlier.routed.shape
        if not same or self.time_s < earlier.time_s or (self.layer_tokens < earlier.layer_tokens).any():
            raise ValueError("these counts do not follow the earlier ones: the engine was started anew")
        known = self.distinct is not None and earlier.distinct is not None
        return ExpertCounts(
            time_s=self.time_s, span_s=self.time_s - earlier.time_s, layers=self.layers, top_k=self.top_k,
            layer_steps=self.layer_steps - earlier.layer_steps, layer_tokens=self.layer_tokens - earlier.layer_tokens,
            routed=self.routed - earlier.routed,
            distinct=self.distinct - earlier.distinct if known else None,  # type: ignore[operator]
            ranks=self.ranks, placement=self.placement, bypassed=self.bypassed,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Forward passes, of the layer that saw most."""
        return int(self.layer_steps.max(initial=0))

    @property
    def tokens(self) -> int:
        """Tokens that went through the layer that saw most."""
        return int(self.layer_tokens.max(initial=0))

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which layers were counted: choices were seen, and not more than the tokens can have made."""
        chosen: Counts = self.routed.sum(axis=1)
        return np.logical_and(chosen > 0, chosen <= self.layer_tokens * self.top_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSummary:
    """A window in few numbers; means over the layers that are known. None: not known, `unknown` says why by the field's name."""

    time_s: float
    span_s: float | None
    steps: int
    tokens: int
    experts: int
    top_k: int
    layers: int
    layers_known: int
    distinct_per_step: float | None  # experts touched in a layer and step
    variation: float | None  # coefficient of variation of the experts' popularity
    top_fifth_share: float | None  # of all choices, the share of the most popular 20 % of experts
    hottest_rank_over_mean: float | None  # tokens of the busiest rank over the ranks' mean; 1.0: balanced
    drift: float | None  # Jensen-Shannon distance from the reference, 0 to 1
    unknown: dict[str, str]
    drift_by_chance: float | None = None  # the distance that counts so few have anyway
    drift_from: str | None = None  # what the reference is: "profile" or "start"
    popularity: tuple[float, ...] | None = None  # by equal parts of the experts of all layers, see `core/routing.py`


def merge(parts: Sequence[ExpertCounts]) -> ExpertCounts:
    """One engine's counts from those of its workers: layers of pipeline stages side by side, tokens of data-parallel ranks added.

    Workers that saw the same tokens (tensor parallelism) must not be among them twice. The time is that of the oldest part.

    Raises:
        ValueError: no part, or parts that are not of one model.
    """
    if not parts:
        raise ValueError("no counts to merge")
    first = parts[0]
    if any((p.top_k, p.routed.shape[1]) != (first.top_k, first.routed.shape[1]) for p in parts):
        raise ValueError("these workers serve different models")
    layers = tuple(dict.fromkeys(name for p in parts for name in p.layers))
    row = {name: i for i, name in enumerate(layers)}
    routed = np.zeros((len(layers), first.routed.shape[1]), np.int64)
    distinct, sources, steps, tokens = np.zeros((4, len(layers)), np.int64)
    for p in parts:
        rows = [row[name] for name in p.layers]
        routed[rows] += p.routed
        sources[rows] += 1
        tokens[rows] += p.layer_tokens
        steps[rows] = np.maximum(steps[rows], p.layer_steps)
        if p.distinct is not None:
            distinct[rows] += p.distinct
    # Where ranks' tokens are added, what they touch together is not the sum of what each touches.
    alone = int(sources.max(initial=0)) <= 1
    spans = [p.span_s for p in parts if p.span_s is not None]
    return ExpertCounts(
        time_s=min(p.time_s for p in parts), span_s=min(spans) if len(spans) == len(parts) else None,
        layers=layers, layer_steps=steps, layer_tokens=tokens, top_k=first.top_k, routed=routed,
        distinct=distinct if alone and all(p.distinct is not None for p in parts) else None,
        ranks=first.ranks, placement=first.placement,
        bypassed=tuple(dict.fromkeys(name for p in parts for name in p.bypassed)),
    )  # fmt: skip


def summarise(
    window: ExpertCounts, *, reference: ExpertCounts | None = None, least_per_expert: float = LEAST_CHOICES_PER_EXPERT
) -> ExpertSummary:
    """The window's numbers; drift is from `reference`, an earlier window or a whole run of the same model."""
    known, experts = window.known, window.routed.shape[1]
    routed, unknown = window.routed[known], dict[str, str]()
    nothing = _why_nothing(window)
    few = nothing or _too_few(window, least_per_expert)
    steady = [(popularity_variation(c), top_share(c)) for c in routed] if few is None else []
    distinct = _distinct(window, nothing, unknown)
    hottest = _hottest(window, few, unknown)
    drift, by_chance = None, None
    if reference is None or few is not None:
        unknown["drift"] = few or "there is no reference yet"
    elif why_not := _why_no_drift(window, reference, least_per_expert):
        unknown["drift"] = why_not
    else:
        drift, by_chance = _drift(window, reference)
    if few is not None:
        unknown |= {"variation": few, "top_fifth_share": few}
    if not known.all():
        unknown["layers_known"] = nothing or _why_uncounted(window)
    return ExpertSummary(
        time_s=window.time_s, span_s=window.span_s, steps=window.steps, tokens=window.tokens,
        experts=experts, top_k=window.top_k, layers=len(window.layers), layers_known=int(known.sum()),
        distinct_per_step=distinct,
        variation=float(np.mean([v for v, _ in steady])) if steady else None,
        top_fifth_share=float(np.mean([s for _, s in steady])) if steady else None,
        hottest_rank_over_mean=hottest, drift=drift, unknown=unknown, drift_by_chance=by_chance,
        popularity=popularity_parts(routed) if few is None else None,
    )  # fmt: skip


def popularity_variation(counts: Counts) -> float:
    """Coefficient of variation of one layer's counts: 0 where all experts are chosen alike, sqrt(E - 1) where one is."""
    return float(counts.std() / counts.mean())


def top_share(counts: Counts, share: float = 0.2) -> float:
    """Share of one layer's choices that the most popular `share` of its experts got; at least one expert."""
    top = max(1, round(share * len(counts)))
    return float(np.sort(counts)[-top:].sum() / counts.sum())


def expected_distinct(counts: Counts, *, top_k: int, tokens: float) -> float:
    """Experts of one layer that `tokens` tokens touch together, from their popularity: the sum of 1 - (1 - p)^tokens.

    p is an expert's chance to be among a token's `top_k`; tokens are taken as independent, which real ones of one sequence are not.
    """
    chance = np.minimum(1.0, top_k * counts / counts.sum())
    return float((1.0 - (1.0 - chance) ** tokens).sum())


def ranks_of_experts(experts: int, ranks: int, placement: str) -> NDArray[np.int64]:
    """Which rank holds each expert, as vLLM places them; the first ranks hold one more where it does not divide."""
    if placement == "round_robin":
        return np.arange(experts) % ranks
    if placement != "linear":
        raise ValueError(f"placement {placement!r} is none of {', '.join(PLACEMENTS)}")
    each, more = divmod(experts, ranks)
    return np.repeat(np.arange(ranks), [each + (r < more) for r in range(ranks)])


def hottest_over_mean(counts: Counts, ranks: NDArray[np.int64]) -> float:
    """Choices that fall to the busiest rank over the mean of all ranks, of one layer."""
    load = np.bincount(ranks, weights=counts)
    return float(load.max() / load.mean())


def jensen_shannon_distance(a: Counts, b: Counts) -> float:
    """Distance of two layers' popularities: the square root of their Jensen-Shannon divergence to base 2; 0 alike, 1 disjoint."""
    p, q = a / a.sum(), b / b.sum()
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return float(np.sqrt(min(1.0, max(0.0, divergence))))


def _relative_entropy(p: FloatArray, q: FloatArray) -> float:
    some = p > 0
    return float((p[some] * np.log2(p[some] / q[some])).sum())


def _why_nothing(window: ExpertCounts) -> str | None:
    """Why no layer of the window is known; None where one is."""
    if window.tokens == 0:
        return "no token was processed"
    return None if window.known.any() else _why_uncounted(window)


def _why_uncounted(window: ExpertCounts) -> str:
    """Why some layers are not known though tokens went through."""
    missing = [name for name, known in zip(window.layers, window.known, strict=True) if not known]
    if not missing:
        return "the model has no layers with experts"
    chosen_inside = [name for name in missing if name in window.bypassed]
    if chosen_inside:
        return f"the kernel of {chosen_inside[0]} ({len(chosen_inside)} layers) chooses experts itself, past the router"
    return f"{window.tokens} tokens went through {missing[0]} ({len(missing)} layers) and its router's counter did not follow"


def _too_few(window: ExpertCounts, least_per_expert: float) -> str | None:
    need = int(np.ceil(least_per_expert * window.routed.shape[1] / window.top_k))
    return None if window.tokens >= need else f"{window.tokens} tokens are too few: {need} are needed"


def _distinct(window: ExpertCounts, nothing: str | None, unknown: dict[str, str]) -> float | None:
    if nothing is None and window.steps == 0:
        nothing = "no step was taken"
    if nothing is None and window.distinct is None:
        nothing = "ranks count their own tokens: what they touch together is not known"
    if nothing is not None:
        unknown["distinct_per_step"] = nothing
        return None
    assert window.distinct is not None
    known = window.known
    return float(np.mean(window.distinct[known] / window.layer_steps[known]))


def _hottest(window: ExpertCounts, few: str | None, unknown: dict[str, str]) -> float | None:
    if window.ranks == 1:
        few = "every rank holds all experts"
    elif window.placement is None:
        few = "a load balancer moves experts between ranks"
    if few is not None:
        unknown["hottest_rank_over_mean"] = few
        return None
    ranks = ranks_of_experts(window.routed.shape[1], window.ranks, window.placement or "")
    return float(np.mean([hottest_over_mean(c, ranks) for c in window.routed[window.known]]))


def _why_no_drift(window: ExpertCounts, reference: ExpertCounts, least_per_expert: float) -> str | None:
    other_experts = reference.routed.shape[1] != window.routed.shape[1]
    if other_experts or not set(reference.layers) & set(window.layers):
        return "the reference is of another model"
    if too_few := _too_few(reference, least_per_expert):
        return f"the reference's {too_few}"
    return None if _layers_of_both(window, reference) else "no layer is known in both"


def _layers_of_both(window: ExpertCounts, reference: ExpertCounts) -> list[tuple[int, int]]:
    """Rows of each layer that both know; the reference may hold some layers only."""
    row = {name: i for i, name in enumerate(reference.layers) if reference.known[i]}
    return [(i, row[name]) for i, name in enumerate(window.layers) if window.known[i] and name in row]


def _drift(window: ExpertCounts, reference: ExpertCounts) -> tuple[float, float]:
    """Mean distance over the layers that both know, and what of it is chance."""
    mine, theirs = (list(rows) for rows in zip(*_layers_of_both(window, reference), strict=True))
    a, b = window.routed[mine], reference.routed[theirs]
    return float(distances(a, b).mean()), float(chance_distances(a, b).mean())
