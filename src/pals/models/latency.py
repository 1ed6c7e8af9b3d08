"""What requests wait, out of the steps they live through: time per output token and to the first token, at p50 and p95."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.models.parameters import Values
from pals.models.physics import Settled, Steps, Work

FloatArray = NDArray[np.float64]

CROWDED = 3.0  # power of the share of a step that prompts fill, by which first tokens wait longer


class Latencies(NamedTuple):
    """Of requests, seconds, shape (candidates,)."""

    tpot_p50_s: FloatArray
    tpot_p95_s: FloatArray
    ttft_p50_s: FloatArray  # of one that finds a free slot
    ttft_p95_s: FloatArray


_OWN_Z = np.array([-1.645, -0.674, 0.0, 0.674, 1.645])  # quantiles of a request's own prefill step ...
_OWN_WEIGHT = np.array([0.1, 0.25, 0.3, 0.25, 0.1])  # ... and how many requests each stands for


def latencies(v: Values, w: Work, s: Steps, settled: Settled, *, batch: NDArray[np.intp], mid_step: bool) -> Latencies:
    """Time per output token and to the first token.

    A request decodes through the steps of others' prefill, a random number of them. A new one waits for the step that is
    planned already, which prefills in `share` of cases, then for its own; one that arrives in the middle of a step
    (`mid_step`: an open load, not a closed loop) waits for the rest of that too.
    """
    if np.ndim(v.ttft):
        v = v._replace(**{name: getattr(v, name)[batch] for name in ("ttft", "crowding", "tpot_floor", "tpot_spread")})
    alone = 1.0 - 1.0 / np.maximum(1.0, w.sequences[batch])
    meets = 1.0 - (1.0 - np.minimum(s.share[batch], 1.0 - 1e-9)) ** alone
    extra_s = settled.prefill_s - settled.decode_s
    mean_s = settled.decode_s + meets * extra_s
    steps = np.maximum(1.0, w.output_tokens[batch] - 1.0)
    deviation_s = np.sqrt(meets * (1.0 - meets) / steps) * extra_s
    full, large, own = s.full[batch], s.large[batch], s.own[batch]
    per_token = (settled.large_s - settled.prefill_s) / np.maximum(1.0, np.minimum(large, full) - s.prefill[batch])
    own_s = settled.prefill_s + per_token * (np.minimum(own, full) - s.prefill[batch])
    own_s = own_s * np.maximum(1.0, own / full)
    wide_s = np.maximum(0.0, settled.large_s * np.maximum(1.0, large / full) - own_s) / 1.645
    atoms = np.concatenate([own_s[:, None] + wide_s[:, None] * _OWN_Z + wait[:, None] for wait in (
        alone * settled.decode_s, settled.prefill_s)], axis=1)  # fmt: skip
    share = np.where(w.sequences[batch] > 1.0, meets, 0.0)[:, None]
    weights = np.concatenate([(1.0 - share) * _OWN_WEIGHT, share * _OWN_WEIGHT], axis=1)
    rest_s = 0.5 * settled.step_s if mid_step else 0.0
    fullness = s.share[batch] * s.prefill[batch] / full  # of the steps, with prompts
    longer = v.ttft * (1.0 + v.crowding * fullness**CROWDED)
    return Latencies(
        tpot_p50_s=mean_s,
        tpot_p95_s=mean_s * (1.0 + v.tpot_floor) + 1.645 * v.tpot_spread * deviation_s,
        ttft_p50_s=longer * (quantile(atoms, weights, 0.5) + rest_s),
        ttft_p95_s=longer * (quantile(atoms, weights, 0.95) + 1.6 * rest_s),
    )


def quantile(atoms: FloatArray, weights: FloatArray, share: float) -> FloatArray:
    """The quantile of each row of weighted atoms, linear between the middles of their weights."""
    order = np.argsort(atoms, axis=1)
    rows = np.arange(len(atoms))
    values, mass = np.take_along_axis(atoms, order, 1), np.take_along_axis(weights, order, 1)
    middle = np.cumsum(mass, axis=1) - 0.5 * mass
    above = np.minimum(np.maximum((middle < share).sum(axis=1), 1), atoms.shape[1] - 1)
    low, high = middle[rows, above - 1], middle[rows, above]
    part = np.minimum(np.maximum((share - low) / np.maximum(high - low, 1e-12), 0.0), 1.0)
    return np.asarray(values[rows, above - 1] + part * (values[rows, above] - values[rows, above - 1]))
