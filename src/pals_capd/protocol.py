"""What may be asked over the socket: one JSON object a line; anything else is refused before it reaches a board."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pals_capd.policy import is_clock_range
from pals_capd.refused import Refused

LONGEST_LINE = 4096
LONGEST_REASON = 200
MOST_BOARDS = 64
#: Each operation with the right it needs.
OPERATIONS: Mapping[str, str] = {
    "hello": "read", "read": "read", "set": "set", "release": "set", "budget": "set", "release_all": "admin",
}  # fmt: skip
_KEYS = {
    "set": {"uuid", "watts", "sm_clock_mhz", "ttl_s", "epoch", "seq", "reason"},
    "release": {"uuid", "epoch", "seq"},
    "budget": {"watts", "boards"},
}


def parse_request(line: bytes) -> dict[str, Any]:
    """A request whose values all have the right types.

    Raises:
        Refused: `malformed`, saying what is wrong with it.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise _malformed("no JSON") from e
    if not isinstance(data, dict) or not isinstance(data.get("op"), str) or data["op"] not in OPERATIONS:
        raise _malformed(f'not an object with "op", one of {", ".join(OPERATIONS)}')
    if unknown := sorted(set(data) - {"op", "id"} - _KEYS.get(data["op"], set())):
        raise _malformed(f"{data['op']} takes no {unknown[0][:40]!r}")
    if not isinstance(data.get("id"), str | int | None) or len(str(data.get("id"))) > 64:
        raise _malformed("id must be a short text or a whole number")
    if data["op"] in ("set", "release"):
        _text(data, "uuid")
        _whole(data, "epoch")
        _whole(data, "seq")
    if data["op"] == "set":
        _watts(data)
        _text(data, "reason")
        if data.get("ttl_s") is not None:
            _positive(data, "ttl_s")
        if data.get("sm_clock_mhz") is not None and not is_clock_range(data["sm_clock_mhz"]):
            raise _malformed("sm_clock_mhz must be [lowest, highest] in whole MHz, or null")
    if data["op"] == "budget":
        _watts(data)
        boards = data.get("boards", [])
        if not isinstance(boards, list) or len(boards) > MOST_BOARDS or not all(isinstance(u, str) for u in boards):
            raise _malformed(f"boards must be a list of at most {MOST_BOARDS} UUIDs")
    return data


def _watts(data: Mapping[str, Any]) -> None:
    if data.get("watts") is not None:
        _positive(data, "watts")


def _positive(data: Mapping[str, Any], key: str) -> None:
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e7:  # neither is NaN
        raise _malformed(f"{key} must be a positive number")


def _whole(data: Mapping[str, Any], key: str) -> None:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise _malformed(f"{key} must be a whole number of at least 0")


def _text(data: Mapping[str, Any], key: str) -> None:
    if not isinstance(data.get(key), str) or len(data[key]) > LONGEST_REASON:
        raise _malformed(f"{key} must be a text of at most {LONGEST_REASON} characters")


def _malformed(why: str) -> Refused:
    return Refused("malformed", f"the request was not understood: {why}. Nothing was changed")
