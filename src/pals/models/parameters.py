"""The unknowns of a profile: names, priors, and the vector of prior deviations that a fit moves."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class Parameter(NamedTuple):
    """One unknown: its prior."""

    name: str
    mean: float  # of the value, or of its logarithm
    sd: float
    log: bool = True


#: Tokens of a step, as powers of two, between which a correction of its kernels' time is interpolated.
ANCHORS: FloatArray = np.array([0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0])
CORRECTION_SD = 0.08

#: Means are factors on what sizes and datasheets say (`physics.Base`), sds relative, except where the comment says otherwise.
PARAMETERS: tuple[Parameter, ...] = (
    Parameter("weights", log(1.3), 0.3),  # HBM seconds of dense weights; 1 is the datasheet's bandwidth
    Parameter("experts", log(1.5), 0.4),  # of a distinct expert
    Parameter("kv", log(1.5), 0.6),  # of the KV cache
    Parameter("token_core", log(1.7), 0.4),  # SM seconds of a token's products; 1 is the datasheet's rate
    Parameter("sequence_core", log(2.0), 1.2),  # of a sequence's output row and sampling
    Parameter("tile_core", 0.0, 1.0),  # of a distinct expert's smallest tile
    Parameter("pair_core", log(2.0), 0.7),  # of a query × key pair
    Parameter("fixed", 0.0, 0.6),  # latencies
    Parameter("fixed_core", log(0.15), 0.8),  # share of them that follows the clock
    Parameter("fixed_busy", log(0.6), 0.4),  # how busy the board is meanwhile, 0..1
    Parameter("kv_core", log(0.5), 1.0),  # SM seconds of attention relative to its HBM seconds
    Parameter("launch", 0.0, 0.7),  # host time of a step without a CUDA graph
    Parameter("link", log(1.5), 0.8),
    Parameter("host_sequence", 0.0, 1.0),  # of 10 us a sequence
    Parameter("overlap", log(2.0), 0.5),  # p of the p-norm
    Parameter("popularity_cv", log(0.5), 0.4),  # of the experts, itself
    Parameter("static", -0.2, 0.3),
    Parameter("busy", 0.0, 0.4),
    Parameter("tensor", 0.3, 0.5),
    Parameter("decode_tensor", log(0.7), 0.6),  # tensor watts of decoding relative to prefill
    Parameter("memory_w", 0.0, 0.5),
    Parameter("knee", 0.0, 0.07),
    Parameter("voltage", 0.0, 0.2),
    Parameter("aim", 0.003, 0.006, False),  # share of the limit that firmware stays below it
    Parameter("apart", 0.6, 0.3, False),  # 0: the limit holds the mean of all steps, 1: each kind by itself
    Parameter("gap_steps", 0.0, 0.3),  # steps that a slot stands empty between two requests
    Parameter("tpot_spread", log(0.85), 0.25),  # of the chance that decoding meets prefill, relative to independence
    Parameter("tpot_floor", log(0.01), 0.7),  # p95 over the median where nothing disturbs
    Parameter("ttft", 0.0, 0.05),
    Parameter("crowding", log(0.25), 0.4),  # longer TTFT where steps are full of prompts, relative
    *(Parameter(f"correction_{2 ** int(a)}", 0.0, CORRECTION_SD, False) for a in ANCHORS),
)
NAMES = tuple(p.name for p in PARAMETERS)
MEANS = np.array([p.mean for p in PARAMETERS])
SDS = np.array([p.sd for p in PARAMETERS])
_LOGS = np.array([p.log for p in PARAMETERS])
_PLAIN = len(PARAMETERS) - len(ANCHORS)


class Values(NamedTuple):
    """Parameters as plain factors, in the order of PARAMETERS: numbers, or arrays of one value a batch."""

    weights: Any
    experts: Any
    kv: Any
    token_core: Any
    sequence_core: Any
    tile_core: Any
    pair_core: Any
    fixed: Any
    fixed_core: Any
    fixed_busy: Any
    kv_core: Any
    launch: Any
    link: Any
    host_sequence: Any
    overlap: Any
    popularity_cv: Any
    static: Any
    busy: Any
    tensor: Any
    decode_tensor: Any
    memory_w: Any
    knee: Any
    voltage: Any
    aim: Any
    apart: Any
    gap_steps: Any
    tpot_spread: Any
    tpot_floor: Any
    ttft: Any
    crowding: Any
    corrections: FloatArray  # of the logarithm, shape (anchors,) or (batches, anchors)


def values_of(x: FloatArray) -> Values:
    """The parameters behind deviations from the prior, in its standard deviations; a vector, or one row a batch."""
    raw = MEANS + SDS * x
    plain = np.where(_LOGS, np.exp(np.minimum(raw, 50.0)), raw)
    first = plain[:_PLAIN].tolist() if plain.ndim == 1 else list(plain.T[:_PLAIN])
    return Values._make([*first, plain[..., _PLAIN:]])


def values_by_name(x: FloatArray) -> dict[str, float]:
    """The same, each parameter by its name."""
    raw = MEANS + SDS * x
    return dict(zip(NAMES, np.where(_LOGS, np.exp(np.minimum(raw, 50.0)), raw).tolist(), strict=True))


def deviations_of(values: Mapping[str, float]) -> FloatArray:
    """The inverse of `values_of`, by name; what is missing stays at its prior.

    Raises:
        ValueError: an unknown name, or a value that cannot be (0 or less where it must be above).
    """
    raw = MEANS.copy()
    for name, value in values.items():
        if name not in NAMES:
            raise ValueError(f"parameter {name!r} is unknown")
        i = NAMES.index(name)
        if _LOGS[i] and value <= 0:
            raise ValueError(f"parameter {name} is {value:g}, not above 0")
        raw[i] = log(value) if _LOGS[i] else value
    return np.asarray((raw - MEANS) / SDS)
