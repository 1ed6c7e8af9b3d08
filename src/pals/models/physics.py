"""How long a step takes and what it draws, by the SM clock: steps with and without prefill; pure numpy.

t(f) = c · [memory^p + (core · f_top / f)^p]^(1/p) + fixed · (1 − s + s · f_top / f) + links + host, memory = dense weights + distinct experts + KV
cache, core = tokens, sequences, experts' tiles and prefill attention, c a small correction by tokens of the step. P(f) = static +
g(f) · (busy + tensor) + memory, weighted by shares of time; g = f · v(f)² with v flat below a knee. Derivation: docs/models/profile.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.load import Load, Mix
from pals.core.routing import touched
from pals.models.board_priors import BoardPrior, prior_of
from pals.models.engine_facts import EngineFacts
from pals.models.parameters import ANCHORS, Values

FloatArray = NDArray[np.float64]

CLOCKS = 16  # of the grid on which curves are kept
BELOW_FLOOR = (
    0.4  # under a limit that the lowest clock exceeds, firmware skips cycles: clocks in effect down to this share of it
)
TYPICAL_BYTES = 16e9  # weights of a model whose sizes are unknown
GRAPH_TOKENS = (
    512  # vLLM captures CUDA graphs for steps up to so many tokens; larger ones are launched kernel by kernel
)
SHARP = 8.0  # of the soft minima and maxima between regimes
MOST_PIECES = 9  # steps that one prompt may take
TILE_TOKENS = 16.0  # rows of an expert's smallest tile


class Base(NamedTuple):
    """What sizes and datasheets say of one board of the group; seconds at the top clock. Parameters multiply these."""

    weights_s: float
    expert_s: float  # one distinct expert in every MoE layer
    kv_s: float  # one KV token
    token_s: float  # products of one token
    sequence_s: float  # output matrix and sampling of one sequence
    tile_s: float  # products of one expert's smallest tile, all MoE layers
    pair_s: float  # one query × key pair
    fixed_s: float  # latencies of a step
    launch_s: float  # host time to launch a step that no CUDA graph holds, hidden while the boards work
    link_s: float  # one token between the boards
    experts: int
    top_k: int
    static_w: float
    busy_w: float
    tensor_w: float
    memory_w: float
    knee_ghz: float
    voltage_per_ghz: float
    voltage_per_ghz2: float
    clock_ghz: FloatArray  # grid, rising, shape (CLOCKS,)
    step_tokens: int
    boards: int
    popularity: tuple[float, ...] | None = None  # of experts under the profile, by parts; None: by the fitted variation
    now: tuple[float, ...] | None = None  # of experts now; None: as then
    then: tuple[float, ...] | None = (
        None  # what `now` is held against: the profile's experts count as many times more; None: they are `now`
    )

    def under(self, load: Load) -> Base:
        """With the routing that a load brings, as far as it is known."""
        if load.popularity is None or self.experts == 0:
            return self
        return self._replace(now=load.popularity, then=None if self.popularity is not None else load.popularity_then)


def base_of(facts: EngineFacts) -> Base:
    """From sizes, datasheet and family."""
    prior, _ = prior_of(facts.board)
    top_w = max(prior.default_limit_w, facts.max_limit_w)
    low, high = BELOW_FLOOR * facts.min_sm_clock_mhz / 1000.0, facts.max_sm_clock_mhz / 1000.0
    dynamic_w = top_w - prior.static_w
    return Base(
        **_work_times(facts, prior),
        static_w=prior.static_w,
        busy_w=0.35 * dynamic_w,
        tensor_w=0.65 * dynamic_w,
        memory_w=0.3 * dynamic_w,
        knee_ghz=prior.knee_ghz,
        voltage_per_ghz=prior.voltage_per_ghz,
        voltage_per_ghz2=prior.voltage_per_ghz2,
        clock_ghz=np.geomspace(low, high, CLOCKS),
        step_tokens=facts.step_tokens,
        boards=facts.boards,
        popularity=facts.popularity,
    )


def _work_times(facts: EngineFacts, prior: BoardPrior) -> dict[str, Any]:
    """Seconds of each class of work, were datasheets reached."""
    tp, shape = facts.tensor_parallel, facts.shape
    bandwidth = tp * prior.memory_bytes_s
    if shape is None:
        flops = prior.flops * tp
        return {
            "weights_s": TYPICAL_BYTES / bandwidth, "expert_s": 0.0, "kv_s": 1.3e5 / bandwidth, "token_s": TYPICAL_BYTES / flops,
            "sequence_s": 1e9 / flops, "tile_s": 0.0, "pair_s": 5e5 / flops, "fixed_s": 2.6e-3, "launch_s": 1.3e-2,
            "link_s": 2e6 / prior.link_bytes_s if facts.boards > 1 else 0.0, "experts": 0, "top_k": 0,
        }  # fmt: skip
    flops = prior.flops * tp * (prior.eight_bit if shape.ffn_format.startswith("fp8") else 1.0)
    active = shape.dense_params - shape.head_params + shape.moe_layers * shape.top_k * shape.expert_params
    return {
        "weights_s": shape.dense_bytes / bandwidth,
        "expert_s": shape.moe_layers * shape.expert_bytes / bandwidth,
        "kv_s": shape.kv_bytes_per_token * tp / min(tp, shape.kv_heads) / bandwidth,
        "token_s": 2.0 * active / flops,
        "sequence_s": 2.0 * shape.head_params / flops,
        "tile_s": 2.0 * TILE_TOKENS * shape.moe_layers * shape.expert_params / flops,
        "pair_s": 4.0 * shape.attention_width * shape.layers / (prior.flops * tp),
        "fixed_s": 50e-6 * shape.layers + 1e-3,
        "launch_s": 400e-6 * shape.layers,
        "link_s": 8.0 * shape.layers * shape.hidden / prior.link_bytes_s if facts.boards > 1 else 0.0,
        "experts": shape.experts,
        "top_k": shape.top_k,
    }


class Work(NamedTuple):
    """Batches that repeat; arrays of shape (batches,)."""

    sequences: FloatArray  # running
    prompt_tokens: FloatArray  # mean of a request
    output_tokens: FloatArray
    prefill_per_output: FloatArray
    context_tokens: FloatArray  # of each decoding sequence
    spread: FloatArray  # half width of the laws of lengths
    distinct: FloatArray  # experts of a decode step and layer; NaN: from the popularity


def work_of(
    sequences: FloatArray, mix: Mix, *, context_tokens: float | None = None, distinct: float | None = None
) -> Work:
    """Work of so many sequences of a mix, shape (batches,)."""
    n = np.asarray(sequences, float)
    like = np.ones_like(n)
    return Work(
        sequences=n,
        prompt_tokens=like * mix.prompt_tokens,
        output_tokens=like * mix.output_tokens,
        prefill_per_output=like * mix.prefill_per_output,
        context_tokens=like * (mix.context_tokens if context_tokens is None else context_tokens),
        spread=like * mix.spread,
        distinct=like * (np.nan if distinct is None else distinct),
    )


class Steps(NamedTuple):
    """How the steps of a batch are made up; arrays of shape (batches,)."""

    yields: FloatArray  # output tokens of a step, mean
    starts: FloatArray  # requests that begin in a step, mean
    share: FloatArray  # of steps that prefill
    prefill: FloatArray  # tokens of a step that prefills, mean
    large: FloatArray  # what a request sees prefilled up to its own first token, 95th percentile; it may take several steps
    full: FloatArray  # prefill tokens of a step that has room for no more
    own: FloatArray  # as `large`, the mean


def steps_of(v: Values, b: Base, w: Work) -> Steps:
    """From the closed form of a busy engine: a request ends after its output and one pipeline gap, and another begins."""
    gap = v.gap_steps * (1.0 - 1.0 / np.maximum(1.0, w.sequences))
    free = w.sequences * w.output_tokens / (w.output_tokens + gap)
    room = (b.step_tokens - np.minimum(free, 0.5 * b.step_tokens)) / w.prefill_per_output  # a step computes no more
    yields = free * (1.0 + (free / room) ** SHARP) ** (-1.0 / SHARP)
    starts = yields * w.prefill_per_output / w.prompt_tokens
    cv2 = w.spread**2 / 3.0
    others = starts * (1.0 - 1.0 / np.maximum(1.0, w.sequences))
    own = w.prompt_tokens * (1.0 + others)
    large = own + 1.645 * w.prompt_tokens * np.sqrt(cv2 + others * (1.0 + cv2))
    full = b.step_tokens - np.minimum(yields, 0.5 * b.step_tokens)
    each = yields * w.prefill_per_output  # prefill tokens of a step, were they spread evenly
    chunk = w.prompt_tokens / _pieces(w.prompt_tokens / full, w.spread)
    together = -each / np.expm1(-each / chunk)  # those that come at once share a step
    prefill = together * (1.0 + (together / full) ** SHARP) ** (-1.0 / SHARP)
    return Steps(yields, starts, np.minimum(1.0, each / prefill), prefill, large, full, own)


def _pieces(steps: FloatArray, spread: FloatArray) -> FloatArray:
    """Mean of a length rounded up to whole steps; lengths are uniform about a mean of so many steps."""
    low, high = steps * (1.0 - spread), steps * (1.0 + spread)
    beyond = [np.clip((high - k) / np.maximum(1e-9, high - low), 0.0, 1.0) for k in range(1, MOST_PIECES)]
    return np.asarray(1.0 + np.sum(beyond, axis=0))


class Curves(NamedTuple):
    """Steps by clock of each batch: seconds and watts of one board, shape (batches, CLOCKS)."""

    decode_s: FloatArray
    prefill_s: FloatArray
    large_s: FloatArray  # a step with the 95th percentile of prefill tokens
    full_s: FloatArray  # a step filled with prefill
    decode_w: FloatArray
    prefill_w: FloatArray
    steps: Steps


def curves(v: Values, b: Base, w: Work) -> Curves:
    """Time and power of the kinds of step on the grid of clocks."""
    s = steps_of(v, b, w)
    k = len(w.sequences)
    all_kinds = Work(*(np.concatenate([a] * 4) for a in w))
    if np.ndim(v.weights):
        v = Values._make(np.concatenate([a] * 4) for a in v)
    prefill = np.concatenate([np.zeros(k), s.prefill, np.minimum(s.large, s.full), s.full])
    seconds, watts = step(v, b, all_kinds, prefill, np.concatenate([s.yields] * 4))
    kinds_s = seconds.reshape(4, k, CLOCKS)
    return Curves._make([*kinds_s, watts[:k], watts[k : 2 * k], s])


def step(v: Values, b: Base, w: Work, prefill: FloatArray, decode: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Seconds of a step and watts of one board, shape (batches, CLOCKS), for prefill tokens and decoding sequences."""
    slower = b.clock_ghz[-1] / b.clock_ghz
    total = prefill + decode
    used = distinct_experts(v, b, total)
    measured = np.isfinite(w.distinct) & (prefill <= 0)
    if measured.any():
        used = np.where(measured, w.distinct, used)
    kv_s = v.kv * b.kv_s * decode * w.context_tokens
    memory_s = v.weights * b.weights_s + v.experts * b.expert_s * used + kv_s
    prefill_s = (v.token_core * b.token_s + 0.5 * v.pair_core * b.pair_s * w.prompt_tokens) * prefill
    decode_s = (v.token_core * b.token_s + v.sequence_core * b.sequence_s) * decode + v.tile_core * b.tile_s * used
    decode_s = decode_s + v.kv_core * kv_s
    core_s = (prefill_s + decode_s)[:, None] * slower
    longer, shorter = np.maximum(memory_s[:, None], core_s), np.minimum(memory_s[:, None], core_s)
    kernels = longer * (1.0 + (shorter / longer) ** _column(v.overlap)) ** _column(1.0 / np.asarray(v.overlap))
    kernels = kernels * _column(np.exp(_correction(v, total)))
    fixed = _column(v.fixed * b.fixed_s) * (1.0 + _column(v.fixed_core) * (slower - 1.0))
    waits = v.link * b.link_s * total + v.host_sequence * 1e-5 * w.sequences
    seconds = kernels + fixed + _column(waits)
    launch_s = v.launch * b.launch_s * np.where(total > GRAPH_TOKENS, 1.0, 0.0)
    seconds = seconds * (1.0 + (_column(launch_s) / seconds) ** SHARP) ** (1.0 / SHARP)
    tensor_w = _column(v.tensor * b.tensor_w * (prefill_s + v.decode_tensor * decode_s)) * slower
    busy_w = _column(v.busy * b.busy_w) * (kernels + _column(v.fixed_busy) * fixed)
    memory_w = _column(v.memory_w * b.memory_w * memory_s)
    return seconds, _column(v.static * b.static_w) + (dynamic(v, b) * (busy_w + tensor_w) + memory_w) / seconds


def _column(x: Any) -> FloatArray:
    """One value a batch, beside the clocks."""
    return np.asarray(x, dtype=float)[..., None]


def _correction(v: Values, tokens: FloatArray) -> FloatArray:
    """Of the logarithm of kernels' time, linear between anchors in log2 of the step's tokens."""
    at = np.minimum(np.log2(np.maximum(1.0, tokens)), ANCHORS[-1])
    if v.corrections.ndim == 1:
        return np.asarray(np.interp(at, ANCHORS, v.corrections))
    above = np.clip(np.searchsorted(ANCHORS, at, side="right"), 1, len(ANCHORS) - 1)
    part = (at - ANCHORS[above - 1]) / (ANCHORS[above] - ANCHORS[above - 1])
    rows = np.arange(len(at))
    low = v.corrections[rows, above - 1]
    return np.asarray(low + part * (v.corrections[rows, above] - low))


def distinct_experts(v: Values, b: Base, tokens: FloatArray) -> FloatArray:
    """Distinct experts of a layer that so many tokens touch: sum of 1 − (1 − p)^tokens over the popularity, counted or log-normal.

    Where only a change of the popularity was counted, the fitted figure changes as the counted ones do.
    """
    if b.experts == 0:
        return np.zeros_like(tokens)

    def by(parts: tuple[float, ...]) -> FloatArray:
        return touched(parts, experts=b.experts, top_k=b.top_k, tokens=tokens)

    if b.now is not None and b.then is None:
        return by(b.now)
    if b.popularity is not None:
        return by(b.popularity)
    spread = np.sqrt(np.log1p(np.asarray(v.popularity_cv) ** 2))
    weight = np.exp(_column(spread) * _NODES)
    p = np.minimum(0.999, weight / _column(weight @ _WEIGHTS) * b.top_k / b.experts)
    fitted = np.asarray(b.experts * (-np.expm1(tokens[:, None] * np.log1p(-p)) @ _WEIGHTS))
    if b.now is None or b.then is None:
        return fitted
    return np.asarray(np.minimum(b.experts, fitted * by(b.now) / by(b.then)))


_hermite = np.polynomial.hermite_e.hermegauss(7)
_NODES: FloatArray = _hermite[0]
_WEIGHTS: FloatArray = _hermite[1] / _hermite[1].sum()


def dynamic(v: Values, b: Base) -> FloatArray:
    """f · v(f)² relative to the top clock, on the grid; one row a batch where parameters are."""
    above = np.maximum(0.0, b.clock_ghz - _column(v.knee) * b.knee_ghz)
    volts = 1.0 + _column(v.voltage) * (b.voltage_per_ghz * above + b.voltage_per_ghz2 * above**2)
    g = b.clock_ghz * volts**2
    return np.asarray(g / g[..., -1:])


class Settled(NamedTuple):
    """Where candidates come to rest; arrays of shape (candidates,). Watts are of one board."""

    power_w: FloatArray
    natural_w: FloatArray
    clock_mhz: FloatArray
    decode_s: FloatArray
    prefill_s: FloatArray
    large_s: FloatArray
    full_s: FloatArray
    step_s: FloatArray


def settle(
    v: Values, b: Base, c: Curves, *, batch: NDArray[np.intp], limit_w: FloatArray, ceiling_mhz: FloatArray
) -> Settled:
    """Clocks of both kinds of step under a limit and a ceiling, and what follows.

    A limit holds either the mean of all steps, where they alternate faster than firmware reacts, or each kind by itself,
    where they last; `apart` says how much of the second.
    """
    if np.ndim(v.aim):
        v = v._replace(aim=v.aim[batch], apart=v.apart[batch])
    share_b = c.steps.share[:, None]
    mean_s = (1.0 - share_b) * c.decode_s + share_b * c.prefill_s
    mean_w = ((1.0 - share_b) * c.decode_s * c.decode_w + share_b * c.prefill_s * c.prefill_w) / mean_s
    goal_w = limit_w * (1.0 - v.aim)
    log_f = np.log(b.clock_ghz)
    ceiling = np.clip(np.log(ceiling_mhz / 1000.0), log_f[0], log_f[-1])
    at = log_f[0], log_f[1] - log_f[0]
    together = np.minimum(ceiling, _clock_at(log_f, mean_w[batch], goal_w))
    decode_f = np.minimum(ceiling, _clock_at(log_f, c.decode_w[batch], goal_w))
    prefill_f = np.minimum(ceiling, _clock_at(log_f, c.prefill_w[batch], goal_w))
    decode_f = together + v.apart * (decode_f - together)
    prefill_f = together + v.apart * (prefill_f - together)
    share = c.steps.share[batch]
    decode_i, prefill_i = _place(decode_f, *at), _place(prefill_f, *at)
    decode_s, decode_w = _at(c.decode_s, batch, *decode_i), _at(c.decode_w, batch, *decode_i)
    prefill_s, prefill_w = _at(c.prefill_s, batch, *prefill_i), _at(c.prefill_w, batch, *prefill_i)
    step_s = (1.0 - share) * decode_s + share * prefill_s
    power_w = ((1.0 - share) * decode_s * decode_w + share * prefill_s * prefill_w) / step_s
    power_w = np.minimum(power_w, np.maximum(goal_w, mean_w[batch, 0]))  # firmware holds the mean where any clock can
    return Settled(
        power_w=power_w,
        natural_w=mean_w[batch, -1],
        clock_mhz=1000.0 * np.exp(decode_f + share * prefill_s / step_s * (prefill_f - decode_f)),
        decode_s=decode_s,
        prefill_s=prefill_s,
        large_s=_at(c.large_s, batch, *prefill_i),
        full_s=_at(c.full_s, batch, *prefill_i),
        step_s=step_s,
    )


def _clock_at(log_f: FloatArray, watts: FloatArray, goal_w: FloatArray) -> FloatArray:
    """Log clock at which a rising curve of watts, shape (candidates, CLOCKS), reaches its goal; the ends of the grid outside."""
    below = np.minimum(np.maximum((watts <= goal_w[:, None]).sum(axis=1) - 1, 0), len(log_f) - 2)
    rows = np.arange(len(watts))
    low, high = watts[rows, below], watts[rows, below + 1]
    part = np.minimum(np.maximum((goal_w - low) / np.maximum(high - low, 1e-9), 0.0), 1.0)
    return np.asarray(log_f[below] + part * (log_f[below + 1] - log_f[below]))


def _place(log_f: FloatArray, first: float, step_size: float) -> tuple[NDArray[np.intp], FloatArray]:
    """Grid point below each log clock, and how far it lies beyond."""
    at = (log_f - first) / step_size
    low = np.minimum(at.astype(np.intp), CLOCKS - 2)
    return low, at - low


def _at(curve: FloatArray, batch: NDArray[np.intp], low: NDArray[np.intp], part: FloatArray) -> FloatArray:
    """A curve of each candidate's batch there, linear between grid points."""
    here = curve[batch, low]
    return np.asarray(here + part * (curve[batch, low + 1] - here))
