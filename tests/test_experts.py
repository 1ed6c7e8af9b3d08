"""Summaries of routing: what is measured is exact, what cannot be known is None with a reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.experts import (
    Counts,
    ExpertCounts,
    expected_distinct,
    hottest_over_mean,
    jensen_shannon_distance,
    merge,
    popularity_variation,
    ranks_of_experts,
    summarise,
    top_share,
)

counts_of_a_layer = st.lists(st.integers(0, 10**6), min_size=2, max_size=64).filter(any).map(np.array)


def counts(routed: Counts, *, tokens: int, top_k: int = 2, steps: int = 10, **more: object) -> ExpertCounts:
    layers = tuple(f"layers.{i}" for i in range(len(routed)))
    each = np.ones(len(routed), np.int64)
    given = {
        "time_s": 100.0, "span_s": None, "layers": layers, "layer_steps": steps * each, "layer_tokens": tokens * each,
        "distinct": 3 * steps * each,
    }  # fmt: skip
    return ExpertCounts(top_k=top_k, routed=np.asarray(routed), **given | more)  # type: ignore[arg-type]


def even(layers: int = 2, experts: int = 8, tokens: int = 8000) -> ExpertCounts:
    return counts(np.full((layers, experts), 2 * tokens // experts), tokens=tokens)


def test_experts_chosen_alike_have_no_variation_and_one_chosen_alone_has_most() -> None:
    assert popularity_variation(np.full(16, 5)) == 0.0
    assert popularity_variation(np.eye(16, dtype=np.int64)[3] * 9) == pytest.approx(np.sqrt(15))
    assert top_share(np.full(10, 7)) == pytest.approx(0.2)
    assert top_share(np.array([0, 0, 0, 0, 9])) == 1.0


@given(counts_of_a_layer, st.integers(2, 50))
def test_popularity_does_not_depend_on_how_many_tokens_were_counted(layer: Counts, times: int) -> None:
    assert popularity_variation(times * layer) == pytest.approx(popularity_variation(layer))
    assert top_share(times * layer) == pytest.approx(top_share(layer))
    assert max(1, round(0.2 * len(layer))) / len(layer) - 1e-9 <= top_share(layer) <= 1.0
    assert jensen_shannon_distance(layer, times * layer) == pytest.approx(0.0, abs=1e-6)


@given(st.integers(2, 40).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 999), min_size=n, max_size=n)] * 3)))
def test_drift_is_a_distance(lists: tuple[list[int], list[int], list[int]]) -> None:
    a, b, c = (np.array(x) + np.eye(len(x), dtype=np.int64)[i % len(x)] for i, x in enumerate(lists))
    assert 0.0 <= jensen_shannon_distance(a, b) <= 1.0
    assert jensen_shannon_distance(a, b) == pytest.approx(jensen_shannon_distance(b, a))
    both = jensen_shannon_distance(a, b) + jensen_shannon_distance(b, c)
    assert jensen_shannon_distance(a, c) <= both + 1e-6


def test_routing_without_an_expert_in_common_is_one_apart() -> None:
    assert jensen_shannon_distance(np.array([4, 0, 0]), np.array([0, 1, 1])) == pytest.approx(1.0)


@given(st.integers(1, 300), st.integers(1, 16), st.sampled_from(["linear", "round_robin"]))
def test_every_expert_has_a_rank_and_no_rank_holds_two_more_than_another(experts: int, ranks: int, how: str) -> None:
    placed = ranks_of_experts(experts, ranks, how)
    held = np.bincount(placed, minlength=ranks)
    assert (len(placed), placed.min() >= 0, len(held)) == (experts, True, ranks)
    assert held.max() - held.min() <= 1


@given(counts_of_a_layer, st.integers(1, 8))
def test_the_hottest_rank_is_never_below_the_mean(layer: Counts, ranks: int) -> None:
    ranks = min(ranks, len(layer))
    hottest = hottest_over_mean(layer, ranks_of_experts(len(layer), ranks, "linear"))
    assert 1.0 - 1e-9 <= hottest <= ranks + 1e-9


@given(counts_of_a_layer, st.integers(1, 8), st.floats(1.0, 500.0))
def test_more_tokens_touch_more_experts_never_more_than_were_chosen(layer: Counts, top_k: int, tokens: float) -> None:
    some = expected_distinct(layer, top_k=top_k, tokens=tokens)
    assert some <= expected_distinct(layer, top_k=top_k, tokens=tokens + 1.0) + 1e-9
    assert some <= np.count_nonzero(layer) + 1e-9


def test_the_formula_meets_independent_routing_within_two_per_cent() -> None:
    rng = np.random.default_rng(7)
    worth = rng.normal(size=64)
    for batch in (1, 4, 16, 64):  # the eight best of noisy scores: experts chosen without putting back
        chosen = np.argsort(worth + rng.gumbel(size=(400 * batch, 64)), axis=1)[:, -8:]
        popular = np.bincount(chosen.ravel(), minlength=64)
        touched = np.mean([len(np.unique(c)) for c in chosen.reshape(400, batch * 8)])
        assert expected_distinct(popular, top_k=8, tokens=batch) == pytest.approx(touched, rel=0.02)


def test_a_window_is_the_difference_and_an_engine_started_anew_has_none() -> None:
    earlier, later = (
        even(tokens=800),
        replace(even(tokens=8800), time_s=110.0, layer_steps=np.full(2, 30), distinct=np.full(2, 110)),
    )
    window = later.since(earlier)
    assert (window.tokens, window.steps, window.span_s) == (8000, 20, 10.0)
    assert summarise(window).distinct_per_step == pytest.approx((110 - 30) / 20)
    with pytest.raises(ValueError, match="started anew"):
        earlier.since(later)


def test_too_few_tokens_are_said_and_not_judged() -> None:
    summary = summarise(even(tokens=40), reference=even())
    assert (summary.variation, summary.top_fifth_share, summary.drift) == (None, None, None)
    assert summary.unknown["variation"] == "40 tokens are too few: 400 are needed"
    assert summary.distinct_per_step == 3.0  # a mean over steps needs no more than steps
    assert summarise(even(tokens=0), reference=even()).unknown["distinct_per_step"] == "no token was processed"


def test_a_layer_that_tokens_passed_uncounted_is_unknown_and_not_idle() -> None:
    routed = np.array([[2000] * 8, [0] * 8])
    half = summarise(counts(routed, tokens=8000, distinct=np.array([50, 0])))
    assert (half.layers, half.layers_known, half.variation, half.distinct_per_step) == (2, 1, 0.0, 5.0)
    assert "8000 tokens went through layers.1 (1 layers)" in half.unknown["layers_known"]
    none = summarise(counts(0 * routed, tokens=8000, bypassed=("layers.0", "layers.1")))
    assert (none.layers_known, none.variation, none.distinct_per_step) == (0, None, None)
    assert none.unknown["variation"] == "the kernel of layers.0 (2 layers) chooses experts itself, past the router"


def test_more_choices_than_the_tokens_can_have_made_are_not_believed() -> None:
    assert summarise(counts(np.full((1, 8), 5000), tokens=8000)).layers_known == 0


def test_ranks_out_of_balance_are_told_only_where_the_placement_is_known() -> None:
    routed = np.array([[3000] * 4 + [1000] * 4])
    spread = counts(routed, tokens=8000, ranks=2)
    assert summarise(spread).hottest_rank_over_mean == pytest.approx(1.5)
    assert summarise(replace(spread, placement="round_robin")).hottest_rank_over_mean == pytest.approx(1.0)
    moved = summarise(replace(spread, placement=None))
    assert (moved.hottest_rank_over_mean, moved.variation is None) == (None, False)
    assert moved.unknown["hottest_rank_over_mean"] == "a load balancer moves experts between ranks"


def test_drift_needs_a_reference_of_the_same_model() -> None:
    assert summarise(even(), reference=even()).drift == pytest.approx(0.0, abs=1e-6)
    assert summarise(even()).unknown["drift"] == "there is no reference yet"
    assert summarise(even(), reference=even(experts=16)).unknown["drift"] == "the reference is of another model"
    short = summarise(even(), reference=even(tokens=4)).unknown["drift"]
    assert short.startswith("the reference's 4 tokens are too few")


def test_stages_that_publish_at_their_own_times_are_each_judged_by_their_own_tokens() -> None:
    ahead = replace(even(tokens=8800), layers=("layers.2", "layers.3"))
    assert merge([even(), ahead]).known.all()


def test_pipeline_stages_stand_side_by_side_and_data_parallel_ranks_add_up() -> None:
    first, second = even(), replace(even(), layers=("layers.2", "layers.3"))
    stages = merge([first, second])
    assert (len(stages.layers), stages.tokens, summarise(stages).distinct_per_step) == (4, 8000, 3.0)
    added = merge([first, even(tokens=4000)])
    assert (added.tokens, int(added.routed.sum())) == (12000, 2 * 2 * 12000)
    assert summarise(added).unknown["distinct_per_step"].startswith("ranks count their own tokens")
    with pytest.raises(ValueError, match="different models"):
        merge([first, even(experts=16)])
