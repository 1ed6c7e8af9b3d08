"""Kernel times: physics every board and data type must obey, and the arithmetic of experts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.plant import kernels
from pals.plant.experts import BLOCKS, ExpertLoad, counted_load, distinct_experts, expected_load
from pals.plant.kernels import BoardKernels, KernelTime, board_kernels

BOARDS = [name for name in kernels.constants_file() if not name.startswith("_")]
TOKENS = np.array([1, 2, 8, 32, 64, 256, 1024, 4096, 16384])


def every(family: str) -> list[tuple[str, str]]:
    return [(b, t) for b in BOARDS for t in getattr(board_kernels(b), family)]


def mixtral(board: BoardKernels, dtype: str, tokens: np.ndarray, *, tp: int = 1, ranks: int = 1) -> KernelTime:
    load = expected_load(8, 2, tokens, ranks=ranks)
    sizes = {"hidden": 4096, "inter": 14336 // tp, "experts": 8, "top_k": 2, "ranks": ranks}
    return kernels.moe(board.moe[dtype], load, tokens=tokens, **sizes)


def adds_up(t: KernelTime) -> None:
    """Fixed time and the p-norm of the two bounds are the whole; nothing is negative; useful FLOPs fit into core work."""
    for part in t:
        assert np.all(np.isfinite(part)) and np.all(part >= 0)
    assert kernels.seconds(t) == pytest.approx(t.total_s, rel=1e-6)
    assert np.all(t.total_s >= t.fixed_s + np.maximum(t.memory_s, t.core_s) * (1 - 1e-9))
    assert np.all(t.total_s <= t.fixed_s + t.memory_s + t.core_s + 1e-12)
    assert np.all(t.tensor_s <= t.core_s * (1 + 1e-9))


def never_falls(seconds: np.ndarray, slack: float = 1e-9) -> None:
    assert np.all(np.diff(seconds) >= -slack * seconds[1:]), seconds


@pytest.mark.parametrize(("board", "dtype"), every("gemm"))
def test_a_larger_matrix_product_is_never_faster(board: str, dtype: str) -> None:
    c = board_kernels(board).gemm[dtype]
    for m, n, k in ((TOKENS, 4096, 4096), (64, TOKENS, 4096), (64, 4096, TOKENS)):
        t = kernels.gemm(c, m, n, k)
        adds_up(t)
        never_falls(t.total_s)


@pytest.mark.parametrize("board", BOARDS)
def test_a_product_reads_its_weights_and_keeps_within_the_boards_peaks(board: str) -> None:
    known = board_kernels(board)
    given_ = kernels.constants_file()[board]["given"]
    t = kernels.gemm(known.gemm["bfloat16"], np.array([1, 8192]), 16384, 16384)

    assert t.total_s[0] > 2 * 16384**2 / known.hbm_bytes_s
    assert t.total_s[1] > 2 * 8192 * 16384**2 / (given_["sms"] * given_["sm_flops_s"])


@pytest.mark.parametrize(("board", "dtype"), every("gemm"))
def test_shards_of_a_tensor_parallel_layer_are_never_slower_than_the_whole(board: str, dtype: str) -> None:
    c = board_kernels(board).gemm[dtype]
    for tokens in (1, 64, 4096):
        wide = kernels.gemm(c, tokens, 28672 // np.array([8, 4, 2, 1]), 4096)
        deep = kernels.gemm(c, tokens, 4096, 14336 // np.array([8, 4, 2, 1]))
        never_falls(wide.total_s)
        never_falls(deep.total_s)


@pytest.mark.parametrize(("board", "dtype"), every("moe"))
def test_experts_take_longer_with_more_tokens_and_less_on_more_boards(board: str, dtype: str) -> None:
    known = board_kernels(board)
    t = mixtral(known, dtype, TOKENS)
    adds_up(t)
    never_falls(t.total_s)
    assert np.all(mixtral(known, dtype, TOKENS, tp=4).total_s <= t.total_s)


@pytest.mark.parametrize(("board", "dtype"), every("moe"))
def test_a_layer_takes_longer_the_more_experts_its_tokens_touch(board: str, dtype: str) -> None:
    touched = np.array([8.0, 16.0, 32.0, 64.0, 128.0])
    load = ExpertLoad(touched, np.full(5, 128.0), np.repeat(touched[:, None], len(BLOCKS), 1) * np.array(BLOCKS))
    t = kernels.moe(
        board_kernels(board).moe[dtype], load, tokens=16, hidden=2048, inter=768, experts=128, top_k=8, tuned=False
    )
    never_falls(t.total_s)


@pytest.mark.parametrize(("board", "dtype"), every("generation"))
def test_decode_attention_grows_with_sequences_context_and_heads(board: str, dtype: str) -> None:
    c = board_kernels(board).generation[dtype]
    sizes = {"batch": 16, "kv_tokens": 2048, "heads": 32, "kv_heads": 8, "head_dim": 128}
    for name, values in (("batch", TOKENS[:7]), ("kv_tokens", TOKENS), ("kv_heads", np.array([1, 2, 4, 8, 16]))):
        t = kernels.generation_attention(c, **{**sizes, name: values})
        adds_up(t)
        never_falls(t.total_s, slack=0.02)  # splits of the KV are powers of two: one more token may use them better


@pytest.mark.parametrize(("board", "dtype"), every("context"))
def test_prefill_attention_grows_with_the_chunk_and_with_what_is_cached(board: str, dtype: str) -> None:
    c = board_kernels(board).context[dtype]
    sizes = {"batch": 1, "tokens": 512, "cached": 0, "heads": 32, "kv_heads": 8, "head_dim": 128}
    for name, values in (("batch", np.arange(1, 9)), ("tokens", TOKENS[3:]), ("cached", np.append(0, TOKENS))):
        t = kernels.context_attention(c, **{**sizes, name: values})
        adds_up(t)
        never_falls(t.total_s, slack=0.02)  # the tail of idle SMs appears where tiles outnumber them


def test_a_window_bounds_what_attention_reads() -> None:
    c = board_kernels("h100-sxm5-80gb")
    sizes = {"batch": 8, "heads": 32, "kv_heads": 8, "head_dim": 128, "window": 1024}
    near, far = kernels.generation_attention(
        c.generation["bfloat16"], kv_tokens=np.array([1024, 65536]), **sizes
    ).total_s
    assert near == far


def test_one_launch_of_a_chunk_and_decodes_costs_at_least_either() -> None:
    c = board_kernels("rtx-pro-6000").context["bfloat16"]
    heads = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    both, chunk = (
        kernels.mixed_attention(c, prefill_tokens=512, cached=1024, decodes=d, kv_tokens=4096, **heads) for d in (32, 0)
    )
    decodes = kernels.mixed_attention(c, prefill_tokens=1, cached=0, decodes=32, kv_tokens=4096, **heads)
    adds_up(both)
    assert both.total_s >= max(chunk.total_s, decodes.total_s)


@pytest.mark.parametrize("board", ["a100-sxm4-80gb", "h100-sxm5-80gb", "h200-sxm5-141gb", "b200-sxm-180gb"])
def test_a_collective_takes_longer_for_more_bytes_and_nothing_on_one_board(board: str) -> None:
    known = board_kernels(board)
    for kind in ("all_reduce", "nccl_all_reduce", "all_gather", "reduce_scatter", "alltoall"):
        never_falls(kernels.collective(known, kind, ranks=4, message_bytes=2.0 ** np.arange(8, 30)).total_s)
        assert kernels.collective(known, kind, ranks=1, message_bytes=1e6).total_s == 0
    fast, plain = (
        kernels.collective(known, k, ranks=4, message_bytes=65536) for k in ("all_reduce", "nccl_all_reduce")
    )
    assert fast.total_s <= plain.total_s


@given(st.floats(1.0, 5.0), st.sampled_from(BOARDS), st.integers(1, 8192))
@settings(max_examples=40, deadline=None)
def test_a_lower_clock_slows_a_kernel_by_at_most_the_ratio_of_the_clocks(
    slower: float, board: str, tokens: int
) -> None:
    t = kernels.gemm(board_kernels(board).gemm["bfloat16"], tokens, 4096, 4096)
    assert t.total_s * (1 - 1e-9) <= kernels.seconds(t, slower) <= t.total_s * slower * (1 + 1e-9)


def test_merged_kernels_take_the_sum_of_theirs_and_still_follow_the_clock() -> None:
    board = board_kernels("h100-sxm5-80gb")
    parts = [
        kernels.gemm(board.gemm["bfloat16"], TOKENS, 6144, 4096),
        mixtral(board, "bfloat16", TOKENS),
        kernels.elementwise(board.elementwise["bfloat16"], TOKENS * 65536.0),
    ]
    layer = kernels.merge(*parts)
    adds_up(layer)
    assert layer.total_s == pytest.approx(sum(p.total_s for p in parts), rel=1e-6)
    apart = sum(kernels.seconds(p, 1.4) for p in parts)
    assert kernels.seconds(layer, 1.4) == pytest.approx(apart, rel=0.05)
    assert kernels.times(layer, 32).total_s == pytest.approx(32 * layer.total_s)


def test_benchmark_loops_are_never_faster_than_the_kernel_at_its_top_clock() -> None:
    c = board_kernels("h200-sxm5-141gb").gemm["bfloat16"]
    t = kernels.gemm(c, TOKENS, 8192, 8192)
    measured = kernels.in_a_loop(c, t)
    assert np.all(measured >= t.total_s * (1 - 1e-9))
    assert measured[-1] > 1.1 * t.total_s[-1]  # a saturated product is held back by the 700 W limit
    assert measured[0] == pytest.approx(t.total_s[0])


def test_distinct_experts_follow_their_formula() -> None:
    tokens = np.array([0, 1, 8, 64, 4096])
    assert distinct_experts(64, 8, tokens, cv=0.0) == pytest.approx(64 * (1 - (1 - 8 / 64) ** tokens))
    skewed = distinct_experts(64, 8, tokens, cv=0.7)
    assert skewed[0] == 0 and np.all(skewed[2:4] < distinct_experts(64, 8, tokens, cv=0.0)[2:4])
    assert 38.3 == pytest.approx(distinct_experts(64, 8, 8, cv=0.7), rel=0.05)  # OLMoE's routing log, batch 8


@given(
    st.sampled_from([(8, 2), (64, 8), (128, 8), (256, 8)]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_expected_load_pads_within_reason_and_the_hottest_rank_has_at_least_its_share(
    model: tuple[int, int], ranks: int, cv: float
) -> None:
    experts, top_k = model
    load = expected_load(experts, top_k, TOKENS, ranks=ranks, cv=cv)
    pairs = load.assignments[:, None]

    assert np.all(load.slots >= pairs * (1 - 1e-9))
    assert np.all(load.slots <= pairs + load.touched[:, None] * np.array(BLOCKS))
    assert np.all(np.diff(load.touched) >= 0) and np.all(load.touched <= experts / ranks + 1e-9)
    if cv == 0:
        assert load.assignments == pytest.approx(TOKENS * top_k / ranks)
    elif ranks > 1:
        assert np.all(load.assignments >= 0.9 * TOKENS * top_k / ranks)


def test_expected_slots_agree_with_drawn_routing() -> None:
    rng = np.random.default_rng(7)
    p = 8 / 64
    for tokens in (4, 64, 700):
        drawn = [counted_load(rng.binomial(tokens, p, 64)) for _ in range(200)]
        expected = expected_load(64, 8, tokens, cv=0.0)
        assert expected.touched[0] == pytest.approx(np.mean([d.touched for d in drawn]), rel=0.02)
        assert expected.slots[0] == pytest.approx(np.mean([d.slots[0] for d in drawn], axis=0), rel=0.05)


def test_counts_of_experts_are_padded_to_blocks_on_the_hottest_rank() -> None:
    load = counted_load(np.array([1, 0, 17, 130]), ranks=2)
    assert (load.touched[0], load.assignments[0]) == (2, 147)
    assert load.slots[0].tolist() == [32 + 144, 32 + 160, 64 + 192, 128 + 256]


def test_an_unknown_board_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="h100-sxm5-80gb"):
        board_kernels("h101")
    with pytest.raises(ConfigError):
        board_kernels("_formats")
