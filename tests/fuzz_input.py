"""What a careless or hostile hand may write: JSON and TOML that are nearly right, and bytes that are nothing at all."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

TEXTS = st.text(st.characters(), max_size=12)  # surrogates too
NUMBERS = st.sampled_from(
    (
        0, -1, 1, 2, 64, 99, 101, 350.4, 399.9, 400.4, 400.6, 401, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 10**308, 10**400,
        -(10**3900), 1e-308, 1e308, -0.0, 5e-324, math.inf, -math.inf, math.nan,
    )
)  # fmt: skip
SCALARS = st.one_of(NUMBERS, st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6)
#: As text: also what Python would not write.
ODD_JSON = st.one_of(
    NUMBERS.map(json.dumps),
    VALUES.map(json.dumps),
    st.sampled_from(("1e999", "-1e999", "01", "-", "", '"\\ud800"', '"\\u0000"', "[", "}", "[1,]", '"' + "x" * 5000 + '"')),
    st.sampled_from((1, 50, 900, 1900)).map(lambda n: "[" * n + "]" * n),
    st.sampled_from((1, 50, 600)).map(lambda n: '{"a":' * n + "1" + "}" * n),
    st.just("1" + "0" * 4400),
)  # fmt: skip
ODD_TOML = st.one_of(
    st.sampled_from((
        "nan", "-inf", "1e400", "0", "-1", "0.05", "1", "99.5", "100", "600", "700", "1e7", "true", "[]", "{}", "''", '"\\u0000"',
        "[1, 2]", "[2, 1]", "[1.0, 2.0]", "[true, true]", "1979-05-27T07:32:00Z", "1979-13-27", "{a = 1}", "=", "", "0x", "1__0",
        '"none"', '"read"', '"set"', '"admin"', '"safe"', '"hold"', '"restore"', '"fail"', '"reassert"', '"90%"', '"1.2kW"',
    )),
    st.sampled_from((300, 400, 5000)).map(lambda n: "1" + "0" * n),
    st.just("0x" + "f" * 5000),
    st.sampled_from((5, 900, 5000)).map(lambda n: "[" * n + "]" * n),
    st.sampled_from((5, 2000)).map(lambda n: "{" + ".".join("a" * n) + " = 1}"),
    st.integers().map(str),
    st.floats().map(str),
    TEXTS.map(json.dumps),
)  # fmt: skip


DEEPER = st.integers(1, 16).map(lambda n: n != 13)


@st.composite
def near_json(draw: st.DrawFn, originals: Sequence[Any], *, most_edits: int = 3) -> str:
    """One of the originals as JSON, with values exchanged, keys dropped, renamed or given twice; perhaps with none of it."""
    value = {"": copy.deepcopy(draw(st.sampled_from(originals)))}
    odd = []
    for n in range(draw(st.integers(0, most_edits))):
        holder, key = draw(_place(value))
        how = draw(st.sampled_from(("exchange", "exchange", "exchange", "drop", "rename", "twice")))
        if how == "exchange" or holder is value:
            number = isinstance(holder[key], int | float) and draw(st.integers(0, 2))
            odd.append((f'"<odd {n}>"', draw(NUMBERS.map(json.dumps) if number else ODD_JSON)))
            holder[key] = f"<odd {n}>"
        elif how == "drop":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif how == "rename":
            holder[draw(TEXTS)] = holder.pop(key)
        else:
            holder[f"<twin>{key}"] = draw(SCALARS)
    text = json.dumps(value[""]).replace('"<twin>', '"')
    for mark, becomes in odd:
        text = text.replace(mark, becomes)
    return text


@st.composite
def _place(draw: st.DrawFn, value: dict[str, Any]) -> tuple[Any, Any]:
    """A container somewhere inside, and one of its keys."""
    holder: Any = value
    key: Any = ""
    while isinstance(inner := holder[key], dict | list) and inner and draw(DEEPER):
        holder, key = inner, draw(st.sampled_from(range(len(inner)) if isinstance(inner, list) else list(inner)))
    return holder, key


@st.composite
def near_toml(draw: st.DrawFn, original: str, *, most_edits: int = 3) -> str:
    """The original with values exchanged, lines dropped, repeated or moved, keys renamed; perhaps with none of it."""
    lines = original.splitlines()
    for _ in range(draw(st.integers(0, most_edits))):
        n = draw(st.integers(0, len(lines) - 1))
        key, equals, _ = lines[n].partition(" = ")
        how = draw(st.sampled_from(("exchange", "exchange", "exchange", "drop", "repeat", "rename", "deep")))
        if how == "exchange" and equals:
            lines[n] = f"{key} = {draw(ODD_TOML)}"
        elif how == "drop" and len(lines) > 1:
            del lines[n]
        elif how == "repeat":
            lines.insert(draw(st.integers(0, len(lines))), lines[n])
        elif how == "rename" and equals:
            lines[n] = f"{draw(TEXTS.map(json.dumps))} = {draw(ODD_TOML)}"
        elif how == "deep" and equals:
            lines[n] = f"{key}{'.a' * draw(st.sampled_from((1, 5, 2000)))} = 1"
    return "\n".join(lines) + "\n"


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[str]) -> bytes:
    """Its bytes with a piece exchanged for any other, as a disk or a line cut short leaves them."""
    data = draw(whole).encode("utf-8", "surrogatepass")
    start = draw(st.integers(0, len(data)))
    end = min(len(data), start + draw(st.sampled_from((0, 1, 8, 1 << 20))))
    return data[:start] + draw(st.binary(max_size=6)) + data[end:]


def any_bytes(near: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Near misses, damaged near misses, any JSON, any bytes."""
    whole = near.map(lambda t: t.encode("utf-8", "surrogatepass"))
    kinds = (*(whole for _ in range(9)), damaged(near), ODD_JSON.map(str.encode), st.binary(max_size=200))
    return st.integers(0, len(kinds) - 1).flatmap(kinds.__getitem__)
