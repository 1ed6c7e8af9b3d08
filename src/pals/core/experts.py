"""What the routing of a window says: experts touched, popularity, ranks out of balance, drift. Unknown is None with a reason, never zero.

Counts are cumulative since the engine started; a window is the difference of two of them. Only routing to logical experts is counted, so
replicas that a load balancer adds change nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    steps: int
    tokens: int  # through each layer
    layers: tuple[str, ...]
    top_k: int  # experts a token chooses in a layer
    routed: Counts  # (layers, experts): tokens that chose the expert
    distinct: Counts | None  # (layers,): experts touched, summed over steps; None: not known
    ranks: int = 1  # that share the experts
    placement: str | None = "linear"  # which experts a rank holds, one of PLACEMENTS; None: not known, they move
    bypassed: tuple[str, ...] = ()  # layers whose kernel chooses experts itself, past the router

    def __post_init__(self) -> None:
        if self.routed.ndim != 2 or len(self.routed) != len(self.layers):
            raise ValueError(f"counts of shape {self.routed.shape} do not fit {len(self.layers)} layers")
        if self.distinct is not None and self.distinct.shape != (len(self.layers),):
            raise ValueError(f"distinct experts of shape {self.distinct.shape} do not fit {len(self.layers)} layers")
        if self.placement is not None and self.placement not in PLACEMENTS:
            raise ValueError(f"placement {self.placement!r} is none of {', '.join(PLACEMENTS)}")

    def since(self, earlier: ExpertCounts) -> ExpertCounts:
        """The window between `earlier` and these.

        Raises:
            ValueError: they are not of the same run of the same engine, in this order.
        """
        same = self.layers == earlier.layers and self.routed.shape == earlier.routed.shape
        if not same or self.steps < earlier.steps or self.tokens < earlier.tokens or self.time_s < earlier.time_s:
            raise ValueError("these counts do not follow the earlier ones: the engine was started anew")
        known = self.distinct is not None and earlier.distinct is not None
        return ExpertCounts(
            time_s=self.time_s, span_s=self.time_s - earlier.time_s, steps=self.steps - earlier.steps,
            tokens=self.tokens - earlier.tokens, layers=self.layers, top_k=self.top_k,
            routed=self.routed - earlier.routed,
            distinct=self.distinct - earlier.distinct if known else None,  # type: ignore[operator]
            ranks=self.ranks, placement=self.placement, bypassed=self.bypassed,
        )  # fmt: skip

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which layers were counted: choices were seen, and not more than the tokens can have made."""
        chosen = self.routed.sum(axis=1)
        return (chosen > 0) & (chosen <= self.tokens * self.top_k)


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
    distinct, sources = np.zeros(len(layers), np.int64), np.zeros(len(layers), np.int64)
    for p in parts:
        rows = [row[name] for name in p.layers]
        routed[rows] += p.routed
        sources[rows] += 1
        if p.distinct is not None:
            distinct[rows] += p.distinct
    several = int(
        sources.max()
    )  # ranks whose tokens are added: what they touch together is not the sum of what each touches
    at_first = [p for p in parts if first.layers[:1] == p.layers[:1]]
    return ExpertCounts(
        time_s=min(p.time_s for p in parts), span_s=None if None in (spans := [p.span_s for p in parts]) else min(s for s in spans if s is not None),
        steps=max(p.steps for p in parts), tokens=sum(p.tokens for p in at_first),
        layers=layers, top_k=first.top_k, routed=routed,
        distinct=distinct if several == 1 and all(p.distinct is not None for p in parts) else None,
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
    drift, by_chance = _drift(window, reference, few, least_per_expert, unknown)
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
    return float(window.distinct[window.known].mean() / window.steps)


def _hottest(window: ExpertCounts, few: str | None, unknown: dict[str, str]) -> float | None:
    if window.ranks == 1:
        few = "every rank holds all experts"
    elif window.placement is None:
        few = "a load balancer moves experts between ranks"
    if few is not None or window.placement is None:
        unknown["hottest_rank_over_mean"] = few or ""
        return None
    ranks = ranks_of_experts(window.routed.shape[1], window.ranks, window.placement)
    return float(np.mean([hottest_over_mean(c, ranks) for c in window.routed[window.known]]))


def _drift(
    window: ExpertCounts,
    reference: ExpertCounts | None,
    few: str | None,
    least_per_expert: float,
    unknown: dict[str, str],
) -> tuple[float | None, float | None]:
    """Mean distance over the layers that both know, and what of it is chance; the reference may hold some layers only."""
    pairs: list[tuple[int, int]] = []
    if few is None and reference is None:
        few = "there is no reference yet"
    if few is None and reference is not None:
        row = {name: i for i, name in enumerate(reference.layers) if reference.known[i]}
        pairs = [(i, row[name]) for i, name in enumerate(window.layers) if window.known[i] and name in row]
        if reference.routed.shape[1] != window.routed.shape[1] or not set(reference.layers) & set(window.layers):
            few = "the reference is of another model"
        elif too_few := _too_few(reference, least_per_expert):
            few = f"the reference's {too_few}"
        elif not pairs:
            few = "no layer is known in both"
    if few is not None or reference is None:
        unknown["drift"] = few or ""
        return None, None
    mine, theirs = (list(rows) for rows in zip(*pairs, strict=True))
    a, b = window.routed[mine], reference.routed[theirs]
    return float(distances(a, b).mean()), float(chance_distances(a, b).mean())
