"""A popularity in sixteen numbers says what a batch touches; a stored reference says what drifted, and chance is told from drift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.experts import ExpertCounts, jensen_shannon_distance, summarise
from pals.core.load import Load
from pals.core.routing import chance_distances, distances, popularity_parts, touched
from pals.core.routing_reference import RoutingReference
from pals.models.fitted import Fitted, fit
from pals.models.parameters import NAMES, values_of
from pals.models.physics import base_of, distinct_experts
from tests.profile_world import CHAT, FACTS, MIXES, model, points, rows_at

EXPERTS, TOP_K, LAYERS = 128, 8, 6


def weights(law: str, cv: float, rng: np.random.Generator) -> np.ndarray:
    """Of experts, by layer."""
    if law == "gamma":
        return rng.gamma(1 / cv**2, cv**2, (LAYERS, EXPERTS)) + 1e-9
    return rng.lognormal(0.0, np.sqrt(np.log1p(cv**2)), (LAYERS, EXPERTS))


def chosen(layer: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """The `TOP_K` experts of each token, drawn without replacement: the largest of log weight plus Gumbel noise."""
    noisy = np.log(layer) + rng.gumbel(size=(tokens, len(layer)))
    return np.argpartition(-noisy, TOP_K, axis=1)[:, :TOP_K]


def counts_of(routed: np.ndarray, *, tokens: int, time_s: float = 10.0, layers: tuple[str, ...] = ()) -> ExpertCounts:
    names = layers or tuple(f"layer {i}" for i in range(len(routed)))
    return ExpertCounts.alike(
        time_s=time_s, span_s=10.0, steps=100, tokens=tokens, layers=names, top_k=TOP_K, routed=routed, distinct=None
    )  # fmt: skip


@pytest.mark.parametrize("law", ["gamma", "log-normal"])
@pytest.mark.parametrize("cv", [0.3, 0.7, 1.2])
def test_experts_touched_follow_from_counts_within_two_percent_of_what_batches_really_touch(
    law: str, cv: float
) -> None:
    rng = np.random.default_rng(3)
    layers = weights(law, cv, rng)
    seen = [chosen(layer, 12800, rng) for layer in layers]
    routed = np.array([np.bincount(s.ravel(), minlength=EXPERTS) for s in seen])
    base = (
        base_of(FACTS)._replace(experts=EXPERTS, top_k=TOP_K).under(Load(mix=CHAT, popularity=popularity_parts(routed)))
    )
    for batch in (1, 8, 32, 128):
        fresh = [chosen(layer, max(6400, 8 * batch), rng).reshape(-1, batch * TOP_K) for layer in layers]
        truth = float(np.mean([[len(np.unique(step)) for step in steps[:800]] for steps in fresh]))
        told = distinct_experts(values_of(np.zeros(len(NAMES))), base, np.array([float(batch)]))
        assert told[0] == pytest.approx(truth, rel=0.02), (law, cv, batch)


def test_one_variation_does_not_say_how_many_are_touched() -> None:
    """Why parts are kept: two laws of one variation differ by more than a tenth."""
    rng = np.random.default_rng(0)
    parts = [popularity_parts(weights(law, 1.5, rng)) for law in ("gamma", "log-normal")]
    a, b = (float(touched(p, experts=EXPERTS, top_k=TOP_K, tokens=64.0)) for p in parts)
    assert abs(a - b) > 0.1 * b


def test_the_mean_of_parts_is_one_and_few_experts_are_split_exactly() -> None:
    parts = popularity_parts([[1, 3, 0, 4]])
    assert np.mean(parts) == pytest.approx(1.0)
    assert parts == (0.0,) * 4 + (0.5,) * 4 + (1.5,) * 4 + (2.0,) * 4
    assert float(touched((1.0,), experts=8, top_k=2, tokens=1.0)) == pytest.approx(2.0)


@given(st.lists(st.integers(0, 10_000), min_size=8, max_size=40).filter(lambda c: sum(c) > 0), st.floats(1.0, 500.0))
def test_more_tokens_touch_more_and_no_popularity_touches_more_than_an_even_one(
    counts: list[int], tokens: float
) -> None:
    parts, experts = popularity_parts([counts]), len(counts)
    few, more = touched(parts, experts=experts, top_k=2, tokens=[tokens, 2.0 * tokens])
    assert np.mean(parts) == pytest.approx(1.0, rel=1e-3)
    assert 0.0 < few <= more + 1e-9 <= experts + 2e-9
    assert few <= float(touched((1.0,), experts=experts, top_k=2, tokens=tokens)) * 1.001


def test_layers_at_once_have_the_distances_they_have_alone() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 50, (2, 4, 16))
    assert distances(a, b) == pytest.approx([jensen_shannon_distance(x, y) for x, y in zip(a, b, strict=True)])


def test_two_samples_of_one_popularity_are_as_far_apart_as_chance_says() -> None:
    rng = np.random.default_rng(2)
    p = rng.gamma(2.0, 0.5, EXPERTS)
    a, b = (rng.multinomial(n, p / p.sum(), 50) for n in (12_800, 50_000))
    assert distances(a, b).mean() == pytest.approx(chance_distances(a, b).mean(), rel=0.1)


def test_a_stored_reference_is_small_and_says_the_same_drift() -> None:
    rng = np.random.default_rng(4)
    layers, names = rng.gamma(1.0, 1.0, (48, EXPERTS)), tuple(f"model.layers.{i}.mlp.experts" for i in range(48))
    routed = np.array([rng.multinomial(4_000_000, w / w.sum()) for w in layers])
    whole = counts_of(routed, tokens=500_000, layers=names)
    stored = RoutingReference.of(whole)
    assert stored is not None
    assert len(stored.shares) + sum(len(n) + 3 for n in stored.layers) < 900
    other = np.array([rng.multinomial(160_000, np.roll(w, 5) / w.sum()) for w in layers])
    same = np.array([rng.multinomial(160_000, w / w.sum()) for w in layers])
    for window in (other, same):
        now = counts_of(window, tokens=20_000, layers=names)
        by_all, by_some = (summarise(now, reference=r).drift for r in (whole, stored.counts()))
        assert by_some == pytest.approx(by_all, abs=0.03)


def test_a_reference_of_layers_that_were_not_counted_is_none() -> None:
    assert RoutingReference.of(counts_of(np.zeros((2, 4), np.int64), tokens=10)) is None
    with pytest.raises(ValueError, match="do not fit"):
        RoutingReference(layers=("a", "b"), tokens=1, top_k=1, shares="AAAA")
    with pytest.raises(ValueError, match="no base64"):
        RoutingReference(layers=("a",), tokens=1, top_k=1, shares="?")


def even_and_skewed() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (1.0,) * 16, popularity_parts([[1, 1, 1, 1, 1, 1, 1, 9]])


def test_a_popularity_that_is_counted_replaces_the_fitted_one_and_fewer_experts_make_shorter_steps() -> None:
    fitted, at = model(), points((400.0,), (4,))
    even, skewed = even_and_skewed()

    def step_s(load: Load, of: Fitted = fitted) -> float:
        return float(of.forecast(at, load).step_s.value[0])

    assert step_s(Load(mix=CHAT, popularity=skewed)) < step_s(Load(mix=CHAT, popularity=even))
    assert step_s(Load(mix=CHAT, popularity=skewed, popularity_then=skewed)) == pytest.approx(step_s(Load(mix=CHAT)))
    changed = step_s(Load(mix=CHAT, popularity=skewed, popularity_then=even))
    assert changed < step_s(Load(mix=CHAT))


def test_a_profile_that_knows_its_routing_predicts_steps_under_another_one() -> None:
    """The world's popularity is skewed while it is measured and even later; without counts the steps would be too short."""
    even, skewed = even_and_skewed()
    measured_under = replace(FACTS, popularity=skewed)
    rows = rows_at(points(), noise=0.003, facts=measured_under)
    fitted, later = fit(rows, MIXES, measured_under), Load(mix=CHAT, popularity=even)
    at = points((200.0, 400.0), (4, 8))
    truth = np.array([1.0 / r.steps_per_s for r in rows_at(at, facts=replace(FACTS, popularity=even))])
    informed, blind = (fitted.forecast(at, load).step_s.value for load in (later, Load(mix=CHAT)))
    assert np.abs(informed / truth - 1.0).max() < 0.02
    assert (blind / truth - 1.0).min() < -0.05


def test_a_load_refuses_a_popularity_that_is_none() -> None:
    with pytest.raises(ValueError, match="popularity"):
        Load(mix=CHAT, popularity=(0.0, 0.0))
