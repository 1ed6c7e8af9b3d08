"""The parameters of a profile in people's words: what each stands for, what the fit made of it, what it was expected to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pals.models.fitted import Fitted
from pals.models.parameters import ANCHORS, NAMES, PARAMETERS, values_by_name
from pals.models.physics import TILE_TOKENS, Base

FAR_SDS = 3.0  # of a prior, beyond which a parameter is told apart: the prior was wrong, or the fit bends it to something else


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterFacts:
    """One parameter; `amount` is what it comes to in `unit`, None where the value itself says it."""

    name: str
    meaning: str
    value: float
    prior_value: float
    prior_low: float  # a standard deviation below
    prior_high: float
    moved_prior_sds: float
    learnt_ratio: float  # of the prior's standard deviation, how much the rows took away: 0 nothing, 1 all
    amount: float | None
    unit: str
    is_factor: bool
    used: bool  # it has a part in this model on these boards
    far: bool  # moved by more than FAR_SDS


class _Words(NamedTuple):
    """`of` is what the factor 1 comes to in `unit`; None: the value stands for itself."""

    meaning: str
    unit: str = ""
    of: Callable[[Base], float] | None = None


_MEANINGS: dict[str, _Words] = {
    "weights": _Words("memory time: dense weights, a step", "ms", lambda b: 1e3 * b.weights_s),
    "experts": _Words("memory time: one more distinct expert", "ms", lambda b: 1e3 * b.expert_s),
    "kv": _Words("memory time: KV cache, a token", "ns", lambda b: 1e9 * b.kv_s),
    "token_core": _Words("SM time: products of a token", "µs", lambda b: 1e6 * b.token_s),
    "sequence_core": _Words("SM time: output row and sampling of a sequence", "µs", lambda b: 1e6 * b.sequence_s),
    "tile_core": _Words(f"SM time: an expert's tile of {TILE_TOKENS:.0f} tokens", "µs", lambda b: 1e6 * b.tile_s),
    "pair_core": _Words("SM time: prefill attention, query × key pair", "ns", lambda b: 1e9 * b.pair_s),
    "fixed": _Words("latencies of a step", "ms", lambda b: 1e3 * b.fixed_s),
    "fixed_core": _Words("of these latencies, share that follows the clock"),
    "fixed_busy": _Words("how busy a board is during them, 0..1"),
    "kv_core": _Words("SM time of attention over its memory time"),
    "launch": _Words("host time to launch a step without CUDA graph", "ms", lambda b: 1e3 * b.launch_s),
    "link": _Words("links between boards, a token", "µs", lambda b: 1e6 * b.link_s),
    "host_sequence": _Words("host time of a sequence and step", "µs", lambda _: 10.0),
    "overlap": _Words("overlap of memory and SM (1: none, high: full)"),
    "popularity_cv": _Words("popularity of experts, coefficient of variation"),
    "static": _Words("static power of a board", "W", lambda b: b.static_w),
    "busy": _Words("power of a busy board at the top clock", "W", lambda b: b.busy_w),
    "tensor": _Words("power of tensor cores at the top clock", "W", lambda b: b.tensor_w),
    "decode_tensor": _Words("tensor power of decode over prefill"),
    "memory_w": _Words("power of memory traffic at full rate", "W", lambda b: b.memory_w),
    "knee": _Words("voltage knee", "GHz", lambda b: b.knee_ghz),
    "voltage": _Words("rise of the voltage above the knee"),
    "aim": _Words("share of the limit that firmware stays below it"),
    "apart": _Words("limit acts on: 0 mean of steps, 1 each kind"),
    "gap_steps": _Words("steps a slot stands empty between two requests"),
    "tpot_spread": _Words("spread of TPOT through others' prefill"),
    "tpot_floor": _Words("TPOT p95 over p50 where nothing disturbs"),
    "ttft": _Words("TTFT over the model's"),
    "crowding": _Words("how much longer TTFT is where steps are full of prompts"),
    **{f"correction_{2 ** int(a)}": _Words(f"correction of steps of {2 ** int(a)} tokens") for a in ANCHORS},
}
_OF_EXPERTS = frozenset({"experts", "tile_core", "popularity_cv"})


def parameters_of(model: Fitted) -> tuple[ParameterFacts, ...]:
    """Every parameter, in the model's order."""
    values = values_by_name(model.x)
    learnt = 1.0 - np.sqrt(np.diag(model.covariance))
    return tuple(
        _facts(i, values[name], float(model.x[i]), float(learnt[i]), model.base) for i, name in enumerate(NAMES)
    )


def _facts(i: int, value: float, moved_sds: float, learnt: float, base: Base) -> ParameterFacts:
    prior, words = PARAMETERS[i], _MEANINGS[PARAMETERS[i].name]
    at = [prior.mean + sds * prior.sd for sds in (-1.0, 0.0, 1.0)]
    low, middle, high = (float(np.exp(v)) if prior.log else v for v in at)
    unit_amount = words.of(base) if words.of else None
    used = not (prior.name in _OF_EXPERTS and base.experts == 0) and not (prior.name == "link" and base.link_s == 0)
    return ParameterFacts(
        name=prior.name, meaning=words.meaning, value=value, prior_value=middle, prior_low=low, prior_high=high,
        moved_prior_sds=moved_sds, learnt_ratio=min(1.0, max(0.0, learnt)),
        amount=None if unit_amount is None else value * unit_amount, unit=words.unit, is_factor=prior.log, used=used,
        far=abs(moved_sds) > FAR_SDS,
    )  # fmt: skip
