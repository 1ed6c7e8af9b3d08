"""The same world with other constants: each moved by a random factor, reproducibly, so that no policy is tuned to one set.

A factor belongs to a seed, a type and a field: it does not change when other fields come or go. Whatever NVML reports
(limits, clocks, sizes) stays; zeros stay zero, signs stay, and named floors hold.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from pals.plant.specs import BoardSpec

T = TypeVar("T")
Law = Literal["lognormal", "uniform"]

WIDEST = 2.5  # deviations of the log-normal law; what lies beyond is drawn in
SPREAD = 0.15
AT_LEAST: Mapping[str, float] = {"overlap_p": 1.0, "overlap": 1.0}  # a p-norm below 1 would be no overlap but a penalty
#: Of a board only what nothing reports: its silicon and what it really achieves.
BOARD_KEEPS: tuple[str, ...] = tuple(
    f.name for f in dataclasses.fields(BoardSpec) if f.name not in ("silicon", "hbm_bytes_s", "nvlink_bytes_s")
)  # fmt: skip
SILICON_KEEPS = ("leak_reference_c",)


def perturb(
    thing: T,
    *,
    seed: int,
    spread: float = SPREAD,
    law: Law = "lognormal",
    keep: Collection[str] = (),
    at_least: Mapping[str, float] = AT_LEAST,
) -> T:
    """`thing` with every float moved by a factor of its own.

    Args:
        thing: a NamedTuple or a frozen dataclass, such as `BoardSpec`, `Silicon`, or the step model's constants. Floats in
            it are moved, float arrays as a whole, tuples and dataclasses in it likewise; all else stays.
        seed: of the whole set of factors.
        spread: standard deviation of the logarithm, or half the width of the uniform law; 0.1 to 0.2 is usual.
        keep: names of fields that stay.
        at_least: floors by field name.

    Raises:
        ValueError: a spread outside 0..0.5, an unknown law, a name in `keep` that no field has.
        TypeError: neither a NamedTuple nor a dataclass.
    """
    if not 0.0 <= spread <= 0.5:
        raise ValueError(f"a spread of {spread} lies outside 0..0.5")
    if law not in ("lognormal", "uniform"):
        raise ValueError(f"unknown law {law!r}; known: lognormal, uniform")
    names = field_names(thing)
    if unknown := set(keep) - set(names):
        raise ValueError(f"{type(thing).__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    kept = {*keep, *(BOARD_KEEPS if isinstance(thing, BoardSpec) else ()), *SILICON_KEEPS}
    moved = {}
    for name in names:
        value = getattr(thing, name)
        if name in kept:
            continue
        if isinstance(value, float) or (isinstance(value, np.ndarray) and value.dtype.kind == "f"):
            moved[name] = _floored(
                value * factor(seed, f"{type(thing).__name__}.{name}", spread, law), at_least.get(name)
            )
        elif is_record(value):
            moved[name] = perturb(value, seed=seed, spread=spread, law=law, at_least=at_least)
    changed: T = _replace(thing, moved)
    return changed


def factor(seed: int, name: str, spread: float, law: Law) -> float:
    """The factor of one constant."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest)])
    if law == "uniform":
        return float(rng.uniform(1.0 - spread, 1.0 + spread))
    return math.exp(spread * float(np.clip(rng.standard_normal(), -WIDEST, WIDEST)))


def is_record(value: object) -> bool:
    """Whether it is a NamedTuple or a dataclass object."""
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    return named or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def field_names(thing: Any) -> tuple[str, ...]:
    """Names of the fields of a NamedTuple or a dataclass.

    Raises:
        TypeError: it is neither.
    """
    if not is_record(thing):
        raise TypeError(f"{type(thing).__name__} is neither a NamedTuple nor a dataclass; nothing was moved")
    return tuple(getattr(thing, "_fields", None) or (f.name for f in dataclasses.fields(thing)))


def _floored(value: Any, least: float | None) -> Any:
    return value if least is None else np.maximum(value, least) if isinstance(value, np.ndarray) else max(value, least)


def _replace(thing: Any, moved: dict[str, Any]) -> Any:
    return thing._replace(**moved) if hasattr(thing, "_replace") else dataclasses.replace(thing, **moved)
