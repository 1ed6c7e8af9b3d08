"""How long one GPU kernel takes: HBM bytes against tensor work in tiles and waves, a few fitted constants a board.

Every kernel is a `KernelTime`: seconds bound by HBM, seconds bound by the SM clock (stated at the top clock), and a fixed
latency; the first two overlap in a p-norm. Constants: kernel_constants.json; derivations and errors: docs/models/kernels.md.

A decoder layer on `tp` boards, `t` tokens in the step (of them `b` decoding sequences), is the sum of

    gemm(hidden -> (heads + 2·kv_heads)·head_dim / tp)      qkv; n is the sharded side
    context_attention and/or generation_attention           heads/tp query heads, max(1, kv_heads/tp) KV heads
    gemm(heads·head_dim/tp -> hidden)                       output projection; k is the sharded side
    gemm(hidden -> 2·inter/tp), gemm(inter/tp -> hidden)    gate-up and down, or: moe(inter=inter/tp)
    elementwise: bytes t·8·hidden (a norm with its residual), t·6·inter/tp (activation), t·4·(heads + kv_heads)·head_dim/tp (rotary)
    2 × all_reduce(bytes = t·hidden·2)                      tp > 1

and a step adds gemm(hidden -> vocab/tp) over the rows that are sampled. `merge` adds kernels up and keeps the form, so
`seconds(merge(...), slower=f_top/f)` is the layer at another clock. All arguments may be arrays; they broadcast.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pals.core.errors import ConfigError
from pals.plant.experts import BLOCKS, ExpertLoad

FloatArray = NDArray[np.float64]

GEMM_TILES = (
    (16, 64),
    (32, 64),
    (64, 64),
    (16, 128),
    (32, 128),
    (64, 128),
    (128, 64),
    (128, 128),
    (128, 256),
    (256, 128),
)
GEMM_SPLITS = (1, 2, 4, 8, 16)  # parts of k computed by different SMs and added up
MOE_COLUMNS = (64, 128, 256)
KV_SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
K_STEP = 64  # elements of the inner dimension a tile advances by
KV_TILE = 64


class KernelTime(NamedTuple):
    """Seconds of one kernel (or a `merge` of several), at the top SM clock; arrays of one shape."""

    total_s: FloatArray
    memory_s: FloatArray  # HBM at the achievable bandwidth; does not follow the SM clock
    core_s: FloatArray  # issue, L2 feed and tensor work of the tiles; grows as 1/clock
    fixed_s: FloatArray  # launch and latency; does not follow the SM clock
    tensor_s: FloatArray  # within core_s: what the useful FLOPs take at the achievable tensor rate
    overlap_p: FloatArray  # total = fixed + (memory^p + core^p)^(1/p)


class GemmConstants(NamedTuple):
    """Constants of matrix products of one board and data type."""

    sms: float
    tile_flops_s: float  # one SM's tensor rate inside a tile at the top clock
    hbm_bytes_s: float  # achievable
    feed_bytes_s: float  # operands into one SM from L2
    wave_s: float  # prologue and epilogue of a wave of tiles
    split_s: float  # adding up partial sums of a split k
    fixed_s: float
    overlap_p: float
    weight_bytes: float  # per element, with scales
    activation_bytes: float
    quantise_row_s: float  # quantising the activations before the product, a row; 0 where they stay 16-bit
    quantise_bytes_s: float
    binding_share: float  # tensor share from which on the board's default power limit lowers the clock in a loop
    droop: float  # exponent of the clock in tensor power beyond the voltage floor, inverted
    host_s: float  # launch floor of the measuring loop, fewer than 64 rows; 0: the loop was a CUDA graph
    host_large_s: float  # the same from 64 rows on


class MoeConstants(NamedTuple):
    """Constants of one layer of routed experts (two grouped matrix products, sorting, activation, weighted sum)."""

    sms: float
    tile_flops_s: float
    hbm_bytes_s: float
    feed_bytes_s: float
    wave_s: float
    fixed_s: float
    sort_s: float  # sorting tokens by expert, left out for few tokens on a full set of experts
    masked_s: float  # the same with the experts of other ranks masked out
    pass_bytes_s: float  # activation, quantisation and sum of the experts' outputs
    overlap_p: float
    weight_bytes: float
    activation_bytes: float
    untuned: float  # factor on the work of a tile where the engine ships no tuned configuration for these experts
    l2_bytes: float  # expert weights that stay in L2 between runs of a measuring loop
    l2_bytes_s: float
    unaligned: float  # factor on operand feed where a dimension is no multiple of 16
    binding_share: float
    droop: float


class GenerationConstants(NamedTuple):
    """Constants of decode attention (one query token a sequence, KV split among SMs)."""

    sms: float
    tile_flops_s: float
    hbm_bytes_s: float
    item_s: float  # one (sequence, KV head, split) item
    token_s: float  # reading one KV token of 128 16-bit elements by one SM
    combine_s: float
    splits_single: float  # 1: KV is split also where a KV head serves one query head; 0: not (FlashAttention 2)
    fixed_s: float
    overlap_p: float
    kv_bytes: float  # per element
    l2_bytes: float  # KV that stays in L2 between runs of a measuring loop
    l2_bytes_s: float


class ContextConstants(NamedTuple):
    """Constants of prefill attention (causal, in query tiles)."""

    sms: float
    tile_flops_s: float
    hbm_bytes_s: float
    softmax_s: float  # exponentials of one query and key
    item_s: float  # prologue and epilogue of one query tile
    tail: float  # of the longest tile, for which SMs idle at the end where there are more tiles than SMs
    query_tile: float  # rows of a tile
    packed: float  # 1: the query heads of a KV head share a tile; 0: a tile holds one head
    splits: float  # share of the SMs that a split of the keys may fill; 0: never split
    diagonal: float  # extra keys a query tile works on: masked part of the diagonal, softmax warm-up
    fixed_s: float
    overlap_p: float
    kv_bytes: float
    resident: float  # tiles an SM works on at once; heads of one KV head that run together read its KV once
    binding_share: float
    droop: float


class ElementwiseConstants(NamedTuple):
    """Constants of kernels that move data and compute next to nothing: norms, activation, rotary, embedding."""

    fixed_s: float
    hbm_bytes_s: float
    l2_bytes: float  # what the kernel before has left in L2
    l2_bytes_s: float


class CollectiveConstants(NamedTuple):
    """Two protocols of one collective; the faster one runs."""

    low_s: float
    low_rank_s: float
    low_bytes_s: float
    high_s: float
    high_rank_s: float
    high_bytes_s: float
    most_bytes: float  # larger messages go to the plain collective of NCCL
    direct: float  # 1: the low-latency protocol sends everything to everybody (one shot)


class BoardKernels(NamedTuple):
    """All kernel constants of one board type, by data type."""

    name: str
    hbm_bytes_s: float  # of the data sheet
    gemm: dict[str, GemmConstants]
    moe: dict[str, MoeConstants]
    generation: dict[str, GenerationConstants]
    context: dict[str, ContextConstants]
    elementwise: dict[str, ElementwiseConstants]
    collective: dict[str, CollectiveConstants]  # custom_all_reduce, all_reduce, all_gather, reduce_scatter, alltoall


@cache
def board_kernels(name: str) -> BoardKernels:
    """Constants of a board, named as in board_specs.json.

    Raises:
        ConfigError: no kernels were fitted for this board.
    """
    data = constants_file()
    if name.startswith("_") or name not in data:
        known = ", ".join(k for k in data if not k.startswith("_"))
        raise ConfigError(f"no kernel constants of {name!r}; known boards: {known}")
    return kernels_from(name, data[name])


def constants_file() -> dict[str, Any]:
    """What kernel_constants.json holds."""
    return dict(json.loads((files("pals.plant") / "kernel_constants.json").read_text()))


def kernels_from(name: str, board: dict[str, Any]) -> BoardKernels:
    """Constants of one board's part of the file."""

    def family(key: str, kind: Any) -> Any:
        return {t: kind(**{f: float(v[f]) for f in kind._fields}) for t, v in board.get(key, {}).items()}

    return BoardKernels(
        name, float(board["hbm_bytes_s"]), family("gemm", GemmConstants), family("moe", MoeConstants),
        family("generation", GenerationConstants), family("context", ContextConstants),
        family("elementwise", ElementwiseConstants), family("collective", CollectiveConstants),
    )  # fmt: skip


# -- adding up --------------------------------------------------------------------------------------------------------


def seconds(t: KernelTime, slower: ArrayLike = 1.0) -> FloatArray:
    """Seconds of a kernel at a lower clock; `slower` = top clock / clock."""
    return _seconds(t.memory_s, t.core_s * np.asarray(slower), t.fixed_s, t.overlap_p)


def merge(*kernels: KernelTime) -> KernelTime:
    """Kernels one after another, as one that takes their sum at the top clock; its overlap_p is chosen so."""
    total, memory, core, fixed, tensor = (
        np.asarray(sum(np.asarray(k[i]) for k in kernels), dtype=np.float64) for i in range(5)
    )
    return KernelTime(total, memory, core, fixed, tensor, _overlap_that_gives(total - fixed, memory, core))


def times(t: KernelTime, count: ArrayLike) -> KernelTime:
    """The same kernel `count` times, one after another."""
    n = np.asarray(count, dtype=np.float64)
    return KernelTime(*(np.asarray(part) * n for part in t[:5]), t.overlap_p)


def elementwise(c: ElementwiseConstants, moved_bytes: ArrayLike) -> KernelTime:
    """A kernel that reads and writes `moved_bytes`: out of L2 where they fit, from HBM beyond."""
    moved = np.asarray(moved_bytes, dtype=np.float64)
    near = _from_l2(moved, c.l2_bytes)
    none = np.zeros_like(moved)
    fixed = np.where(moved > 0, c.fixed_s, 0.0)
    return _kernel((moved - near) / c.hbm_bytes_s, near / c.l2_bytes_s, fixed, none, 1.0)


def in_a_loop(c: GemmConstants | MoeConstants | ContextConstants, t: KernelTime) -> FloatArray:
    """Seconds as a benchmark reads them that repeats the kernel at the default power limit.

    Tensor power grows with share·f·v² ≈ share·f^(1/droop): beyond `binding_share` the governor lowers the clock, so core
    work slows by (share/binding_share)^droop.
    """
    share = np.divide(t.tensor_s, t.total_s, out=np.zeros_like(t.total_s), where=t.total_s > 0)
    return seconds(t, np.maximum(1.0, share / c.binding_share) ** c.droop)


def on_the_host(c: GemmConstants, m: ArrayLike, total_s: FloatArray) -> FloatArray:
    """Seconds of a loop without CUDA graphs: never faster than the host launches."""
    return np.maximum(total_s, np.where(np.asarray(m) < 64, c.host_s, c.host_large_s))


def _kernel(
    memory: FloatArray, core: FloatArray, fixed: ArrayLike, tensor: FloatArray, overlap_p: ArrayLike
) -> KernelTime:
    p, f = np.broadcast_to(overlap_p, memory.shape), np.broadcast_to(fixed, memory.shape)
    return KernelTime(_seconds(memory, core, f, p), memory, core, np.asarray(f), tensor, np.asarray(p))


def _seconds(memory: FloatArray, core: FloatArray, fixed: FloatArray, p: FloatArray) -> FloatArray:
    most, least = np.maximum(memory, core), np.minimum(memory, core)
    ratio = np.divide(least, most, out=np.zeros_like(most), where=most > 0)
    return np.asarray(fixed + most * (1.0 + ratio**p) ** (1.0 / p))


def _overlap_that_gives(total: FloatArray, memory: FloatArray, core: FloatArray) -> FloatArray:
    """The p with (memory^p + core^p)^(1/p) = total, between 1 and 64, by bisection in 1/p."""
    low, high = np.full(np.shape(total), 1.0 / 64.0), np.ones(np.shape(total))
    for _ in range(30):
        middle = 0.5 * (low + high)
        under = _seconds(memory, core, np.zeros_like(total), 1.0 / middle) < total
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return np.asarray(2.0 / (low + high))


def _from_l2(moved: FloatArray, l2_bytes: float) -> FloatArray:
    """Bytes that a repeated pass finds in L2: all of a set that fits, none of one that evicts itself."""
    return np.asarray(moved / (1.0 + (moved / l2_bytes) ** 4))


def _columns(*values: ArrayLike) -> tuple[tuple[int, ...], list[FloatArray]]:
    """Broadcast shape, and each value as a column of shape (cases, 1)."""
    arrays = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in values))
    return arrays[0].shape, [a.reshape(-1, 1) for a in arrays]


def _fastest(
    shape: tuple[int, ...], memory: FloatArray, core: FloatArray, fixed: float, tensor: FloatArray, p: float
) -> KernelTime:
    """The candidate of each row (case) that takes least; what libraries' heuristics and autotuners aim at."""
    memory = np.broadcast_to(memory, core.shape)
    best = np.argmin(_seconds(memory, core, np.zeros(1), np.full(1, p)), axis=1)
    row = np.arange(len(best))
    return _kernel(memory[row, best].reshape(shape), core[row, best].reshape(shape), fixed, tensor.reshape(shape), p)


# -- matrix products --------------------------------------------------------------------------------------------------


def gemm(c: GemmConstants, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> KernelTime:
    """(m × k) · (k × n), weights n × k from HBM; includes quantising the activations where the data type needs it."""
    shape, (rows, cols, depth) = _columns(m, n, k)
    tiles = [(a, b, s) for a, b in GEMM_TILES for s in GEMM_SPLITS]
    tile_m, tile_n, split = (np.array(v, dtype=np.float64) for v in zip(*tiles, strict=True))
    waves = np.ceil(np.ceil(rows / tile_m) * np.ceil(cols / tile_n) * split / c.sms)
    feed = np.minimum(rows, tile_m) * c.activation_bytes + np.minimum(cols, tile_n) * c.weight_bytes
    step_s = np.maximum(2.0 * tile_m * tile_n / c.tile_flops_s, feed / c.feed_bytes_s)
    core = waves * (np.ceil(depth / split / K_STEP) * K_STEP * step_s + c.wave_s)
    core += (split > 1) * (c.split_s + rows * cols * 4.0 * split / (c.sms * c.feed_bytes_s))
    moved = rows * depth * c.activation_bytes + cols * depth * c.weight_bytes + rows * cols * 2.0
    tensor = 2.0 * rows * cols * depth / (c.sms * c.tile_flops_s)
    product = _fastest(shape, moved / c.hbm_bytes_s, core, c.fixed_s, tensor, c.overlap_p)
    if c.quantise_bytes_s <= 0:
        return product
    return merge(product, _quantise(c, rows.reshape(shape), depth.reshape(shape)))


def _quantise(c: GemmConstants, rows: FloatArray, depth: FloatArray) -> KernelTime:
    moved = rows * depth * (2.0 + c.activation_bytes)
    none = np.zeros_like(moved)
    return _kernel(moved / c.quantise_bytes_s, rows * c.quantise_row_s, 0.0, none, 1.0)


def moe(
    c: MoeConstants, load: ExpertLoad, *, tokens: ArrayLike, hidden: ArrayLike, inter: ArrayLike, experts: ArrayLike,
    top_k: ArrayLike, ranks: ArrayLike = 1, gated: ArrayLike = True, tuned: ArrayLike = True,
    resident: bool = False,
) -> KernelTime:  # fmt: skip
    """One layer of gated routed experts on the hottest rank.

    Args:
        c: constants of the board and data type.
        load: what the hottest rank has to do (`experts.expected_load`), one row a case.
        tokens: tokens of the step (all ranks).
        hidden: model width.
        inter: width of one expert on this board (already divided by tensor parallelism).
        experts: routed experts of the layer (all ranks).
        top_k: experts a token uses.
        ranks: of expert parallelism.
        gated: whether the first product is two matrices wide (SwiGLU); False: one (ReLU²).
        tuned: whether the engine ships a tuned kernel configuration (`has_tuned_experts`); without one the block is 16
            rows for at most as many tokens as experts, else 64.
        resident: True for a benchmark that reads the same few experts again and again out of L2.
    """
    shape, (t, h, i, e, k, r, wide, known, touched, pairs) = _columns(
        tokens, hidden, inter, experts, top_k, ranks, np.where(gated, 2.0, 1.0), tuned, load.touched, load.assignments
    )
    block = np.repeat(np.array(BLOCKS, dtype=np.float64), len(MOE_COLUMNS))
    columns = np.tile(np.array(MOE_COLUMNS, dtype=np.float64), len(BLOCKS))
    blocks = np.repeat(np.broadcast_to(load.slots, (t.size, len(BLOCKS))), len(MOE_COLUMNS), axis=1) / block
    feed = (block * c.activation_bytes + columns * c.weight_bytes) / c.feed_bytes_s
    step_s = (2.0 * block * columns / c.tile_flops_s + feed) * np.where(known > 0, 1.0, c.untuned)
    slow = np.where(i % 16 > 0, c.unaligned, 1.0)
    core = sum(
        np.maximum(1.0, slow * blocks * np.ceil(n / columns) / c.sms)
        * (np.ceil(depth / K_STEP) * K_STEP * step_s + c.wave_s)
        for n, depth in ((wide * i, h), (h, i))
    )
    core = np.where((known > 0) | (block == np.where(t <= e / r, 16.0, 64.0)), core, np.inf)
    per_expert = (wide + 1.0) * h * i
    tensor = 2.0 * pairs * per_expert / (c.sms * c.tile_flops_s)
    weights = touched * per_expert * c.weight_bytes
    near = _from_l2(weights, c.l2_bytes) if resident else np.zeros_like(weights)
    memory = (weights - near) / c.hbm_bytes_s + near / c.l2_bytes_s
    products = _fastest(shape, memory, core, c.fixed_s, tensor, c.overlap_p)
    passed = 2.0 * (t * k * ((2.0 * wide + 1.0) * i + 2.0 * h) + 2.0 * t * h)  # all rows, local or not
    if c.activation_bytes < 2:
        passed = passed + 3.0 * (pairs * i + t * h)
    sort = np.where(r > 1, c.masked_s, np.where(t * k * 4.0 > e, c.sort_s, 0.0))
    none = np.zeros(shape)
    return merge(products, _kernel((passed / c.pass_bytes_s).reshape(shape), none, sort.reshape(shape), none, 1.0))


def has_tuned_experts(board: str, local_experts: ArrayLike, inter: ArrayLike) -> NDArray[np.bool_]:
    """Whether vLLM ships a tuned configuration of its grouped product; True where the board's list is not known."""
    listed = constants_file()[board]["given"].get("tuned_experts")
    e, n = np.broadcast_arrays(np.asarray(local_experts), np.asarray(inter))
    if listed is None:
        return np.ones(e.shape, dtype=bool)
    return np.any([(e == a) & (n == b) for a, b in listed], axis=0)


# -- attention --------------------------------------------------------------------------------------------------------


def generation_attention(
    c: GenerationConstants, *, batch: ArrayLike, kv_tokens: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike,
    head_dim: ArrayLike, window: ArrayLike = 0, resident: bool = False,
) -> KernelTime:  # fmt: skip
    """Decode attention of `batch` sequences of `kv_tokens` tokens each; heads are those of one board.

    Args:
        c: constants of the board and KV data type.
        batch: sequences, one query token each.
        kv_tokens: KV tokens of a sequence (use the mean of a mixed batch).
        heads: query heads.
        kv_heads: KV heads.
        head_dim: elements of a head.
        window: sliding window in tokens, 0: none.
        resident: True for a benchmark that reads the same small KV again and again out of L2.
    """
    shape, (b, length, q, g, d, w) = _columns(batch, kv_tokens, heads, kv_heads, head_dim, window)
    length = np.where(w > 0, np.minimum(length, w), length)
    tiles = np.ceil(length / KV_TILE)
    split = np.minimum(np.array(KV_SPLITS, dtype=np.float64), np.where((q > g) | (c.splits_single > 0), tiles, 1.0))
    rows = np.maximum(64.0, np.ceil(q / g / 16.0) * 16.0)  # query heads of a KV head, padded to a tensor tile
    token_s = np.maximum(4.0 * rows * d / c.tile_flops_s, c.token_s * d / 128.0 * c.kv_bytes / 2.0)
    core = np.ceil(b * g * split / c.sms) * (c.item_s + np.ceil(tiles / split) * KV_TILE * token_s)
    core += (split > 1) * (c.combine_s + split * b * q * d * 4.0 / c.l2_bytes_s)
    kv = 2.0 * b * g * length * d * c.kv_bytes
    cold = np.maximum(0.0, kv - c.l2_bytes) if resident else kv
    memory = (cold + 4.0 * b * q * d) / c.hbm_bytes_s + (kv - cold) / c.l2_bytes_s
    tensor = 4.0 * b * q * length * d / (c.sms * c.tile_flops_s)
    return _fastest(shape, memory, core, c.fixed_s, tensor, c.overlap_p)


def context_attention(
    c: ContextConstants, *, batch: ArrayLike, tokens: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike,
    head_dim: ArrayLike, window: ArrayLike = 0, cached: ArrayLike = 0,
) -> KernelTime:  # fmt: skip
    """Causal prefill attention of `batch` chunks of `tokens` tokens each, after `cached` tokens that KV already holds."""
    shape, sizes = _columns(batch, tokens, heads, kv_heads, head_dim, window, cached)
    work, longest, moved, tensor = _context_work(c, *sizes, (c.packed > 0) | (sizes[1] == 1))
    core = np.maximum(work / c.sms, longest)
    return _fastest(shape, moved / c.hbm_bytes_s, core, c.fixed_s, tensor, c.overlap_p)


def mixed_attention(
    c: ContextConstants, *, prefill_tokens: ArrayLike, cached: ArrayLike, decodes: ArrayLike, kv_tokens: ArrayLike,
    heads: ArrayLike, kv_heads: ArrayLike, head_dim: ArrayLike,
) -> KernelTime:  # fmt: skip
    """One launch for a prefill chunk and `decodes` decoding sequences: a decode is a chunk of one token, unsplit."""
    shape, (t, past, b, kv, q, g, d) = _columns(prefill_tokens, cached, decodes, kv_tokens, heads, kv_heads, head_dim)
    none = np.zeros_like(t)
    prefill = _context_work(c, np.ones_like(t), t, q, g, d, none, past, c.packed > 0)
    decode = _context_work(c, b, np.ones_like(t), q, g, d, none, kv - 1.0, c.packed > 0)
    work, _, moved, tensor = (x + y for x, y in zip(prefill, decode, strict=True))
    core = np.maximum(work / c.sms, np.maximum(prefill[1], decode[1]))
    return _fastest(shape, moved / c.hbm_bytes_s, core, c.fixed_s, tensor, c.overlap_p)


def _context_work(
    c: ContextConstants, b: FloatArray, t: FloatArray, q: FloatArray, g: FloatArray, d: FloatArray, w: FloatArray,
    past: FloatArray, packed: Any,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:  # fmt: skip
    """SM-seconds of all query tiles, seconds of the longest one, bytes, and seconds of the useful FLOPs."""
    items = b * np.where(packed, g * np.ceil(t * q / g / c.query_tile), q * np.ceil(t / c.query_tile))
    mean, most = (np.where(w > 0, np.minimum(v, w), v) for v in ((t + 1.0) / 2.0 + past, t + past))
    key_s = c.query_tile * (4.0 * d / c.tile_flops_s + c.softmax_s)
    one, longest = ((np.ceil(v / KV_TILE) * KV_TILE + c.diagonal) * key_s + c.item_s for v in (mean, most))
    kv = 2.0 * b * (t + past) * g * d * c.kv_bytes
    at_once = np.clip(c.resident * c.sms / np.maximum(b * np.ceil(t / c.query_tile), 1.0), 1.0, q / g)
    moved = 4.0 * b * t * q * d + kv * np.where(packed, 1.0, q / g / at_once)
    parts = np.clip(np.floor(c.splits * c.sms / np.maximum(items, 1.0)), 1.0, np.ceil(most / KV_TILE))
    longest = (longest - c.item_s) / parts + c.item_s * (1.0 + (parts > 1))
    work = items * one + np.where(items > c.sms, c.tail * c.sms * longest, 0.0)
    return work, longest * (items > 0), moved, 4.0 * b * q * t * mean * d / (c.sms * c.tile_flops_s)


# -- between boards ---------------------------------------------------------------------------------------------------


def collective(b: BoardKernels, kind: str, *, ranks: ArrayLike, message_bytes: ArrayLike) -> KernelTime:
    """A collective among the boards of one node; it waits on links, not on the SM clock.

    Args:
        b: the board type.
        kind: "all_reduce" (the fast kernel of the serving engine where it fits), "nccl_all_reduce", "all_gather",
            "reduce_scatter" or "alltoall".
        ranks: boards that take part; 1 costs nothing.
        message_bytes: the whole (gathered) message.
    """
    n, r = np.broadcast_arrays(np.asarray(message_bytes, dtype=np.float64), np.asarray(ranks, dtype=np.float64))
    plain = two_protocols(b.collective["all_reduce" if kind == "nccl_all_reduce" else kind], n, r, kind)
    if kind == "all_reduce" and "custom_all_reduce" in b.collective:
        c = b.collective["custom_all_reduce"]
        plain = np.where(n < c.most_bytes, np.minimum(plain, two_protocols(c, n, r, kind)), plain)
    time = np.where((r > 1) & (n > 0), plain, 0.0)
    none = np.zeros_like(time)
    return _kernel(none, none, time, none, 1.0)


def two_protocols(c: CollectiveConstants, n: FloatArray, r: FloatArray, kind: str) -> FloatArray:
    """Seconds of an `n`-byte collective among `r` ranks by the faster of its two protocols."""
    wire = n * (r - 1.0) / r * (2.0 if kind.endswith("all_reduce") else 1.0)
    low = c.low_s + c.low_rank_s * r + (n * (r - 1.0) if c.direct else wire) / c.low_bytes_s
    return np.minimum(low, c.high_s + c.high_rank_s * r + wire / c.high_bytes_s)
