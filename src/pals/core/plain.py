"""From plain JSON values back to the dataclasses they were written from: every type and key is checked, nothing guessed."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection
from functools import cache
from typing import Any

_PLAIN: dict[Any, str] = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


def decode(kind: Any, data: Any, *, may_lack: Collection[str] = (), at: str = "") -> Any:
    """`data` as a value of the type `kind`: a dataclass, tuple[X, ...], dict[str, X], X | None, X | str, a plain type or Any.

    Args:
        kind: the type.
        data: what `json` read.
        may_lack: names of fields with a default that may be missing; every other field must be there.
        at: where `data` stands, for messages, such as "sample.boards[0]".

    Raises:
        ValueError: a key is missing or unknown, or a value has another type or is not finite; says which.
    """
    if kind is Any:
        return data
    if kind in _PLAIN:
        return _plain(kind, data, at)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        choices = [a for a in arguments if a is not type(None)]
        inner = str if str in choices and isinstance(data, str) else choices[0]
        return None if data is None else decode(inner, data, may_lack=may_lack, at=at)
    if origin is tuple:
        values = _of_type(list, "a list", data, at)
        return tuple(decode(arguments[0], v, may_lack=may_lack, at=f"{at}[{i}]") for i, v in enumerate(values))
    table = _of_type(dict, "an object", data, at)
    if origin is dict:
        return {k: decode(arguments[1], v, may_lack=may_lack, at=_below(at, k)) for k, v in table.items()}
    return _dataclass(kind, table, may_lack, at)


def _dataclass(kind: Any, table: dict[str, Any], may_lack: Collection[str], at: str) -> Any:
    known = _fields(kind)
    for key in table:
        if key not in known:
            raise ValueError(f"{_below(at, key)} is unknown (a newer PALS may have written it)")
    for key in known:
        if key not in table and (key not in may_lack or key in _needed(kind)):
            raise ValueError(f"{_below(at, key)} is missing")
    return kind(**{k: decode(known[k], v, may_lack=may_lack, at=_below(at, k)) for k, v in table.items()})


@cache
def _needed(kind: Any) -> frozenset[str]:
    """Fields without a default."""
    bare = dataclasses.MISSING
    return frozenset(f.name for f in dataclasses.fields(kind) if f.default is bare and f.default_factory is bare)


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass with their types."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _plain(kind: Any, data: Any, at: str) -> Any:
    allowed = (int, float) if kind is float else kind
    if not isinstance(data, allowed) or (isinstance(data, bool) and kind is not bool):
        raise _wrong(at, data, _PLAIN[kind])
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{at or 'it'} is {data}; unknown values are null, never NaN")
    if isinstance(data, int) and data.bit_length() > 63:
        raise ValueError(f"{at or 'it'} is a whole number of {data.bit_length()} bits")
    return data


def _of_type(wanted: type, told: str, data: Any, at: str) -> Any:
    if not isinstance(data, wanted):
        raise _wrong(at, data, told)
    return data


def _wrong(at: str, data: Any, told: str) -> ValueError:
    return ValueError(f"{at or 'it'} is {str(data)[:60]!r}, not {told}")


def _below(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
