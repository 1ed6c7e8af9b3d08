"""Quantities with units: what is written is what is meant, to the last bit, and everything else is one clear refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.core.units import MOST_W, seconds, share, share_or_tokens_per_s, watts

Parse = Callable[[object, str], object]
POSITIVE = st.floats(1e-300, 1e300)
ANYTHING = st.one_of(
    st.text(), st.floats(), st.integers(), st.booleans(), st.none(), st.binary(), st.lists(st.integers()),
    st.from_regex(r"-?[0-9]*\.?[0-9]*(e-?[0-9]{1,5})? ?(s|ms|kW|W|%|MW|us)?", fullmatch=True),
    st.integers(5000, 6000).map(lambda n: 10**n),
)  # fmt: skip


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (seconds, "1s", 1.0),
        (seconds, "50ms", 0.05),
        (seconds, " 50 ms ", 0.05),
        (seconds, "0.05", 0.05),
        (seconds, 2, 2.0),
        (seconds, "1e-3s", 0.001),
        (watts, "2.4kW", 2400.0),
        (watts, "1200", 1200.0),
        (watts, "1200W", 1200.0),
        (watts, 1200.5, 1200.5),
        (share, "90%", 0.9),
        (share, "100%", 1.0),
        (share, "0.5%", 0.005),
        (share_or_tokens_per_s, "90%", (0.9, None)),
        (share_or_tokens_per_s, "1500", (None, 1500.0)),
        (share_or_tokens_per_s, "1500 tokens/s", (None, 1500.0)),
        (share_or_tokens_per_s, 1500.0, (None, 1500.0)),
    ],
)
def test_what_is_written_is_what_is_meant(parse: Parse, text: object, value: object) -> None:
    assert parse(text, "--option") == value


@pytest.mark.parametrize(
    ("parse", "text", "example"),
    [
        *((seconds, bad, "50ms") for bad in ("", "s", "nan", "inf", "-1s", "0", "0ms", "1m", "1 sec", "1S", "1_0s", "1,5s", "１s")),
        *((seconds, bad, "50ms") for bad in (math.nan, math.inf, -1, 0, True, None, b"1s", "1e999", "1e-999", 10**400)),
        *((watts, bad, "2.4kW") for bad in ("2.4KW", "2.4kw", "1mW", "1MW", "1e7", "lots", "1 2W", "1W\n2", "-5", "50ms")),
        *((share, bad, "90%") for bad in ("0%", "100.1%", "0.9", 0.9, "90", "-1%", "%", "90 percent")),
        *((share_or_tokens_per_s, bad, "1500") for bad in ("0.9", 1, "101%", "fast", "", None, "1500W")),
    ],
)  # fmt: skip
def test_anything_else_names_the_option_what_was_given_and_an_example(parse: Parse, text: object, example: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text, "--option")

    told = str(refused.value)
    assert told.startswith("--option ")
    assert example in told
    if text != 10**400:
        assert repr(text) in told


@given(POSITIVE)
def test_seconds_come_back_as_they_were_written(value_s: float) -> None:
    assert seconds(f"{value_s!r}s", "-") == seconds(repr(value_s), "-") == seconds(value_s, "-") == value_s
    assert seconds(f"{value_s!r}ms", "-") == pytest.approx(value_s / 1000, rel=1e-15, abs=1e-320)


@given(st.floats(1e-300, MOST_W, exclude_max=True))
def test_watts_come_back_as_they_were_written(value_w: float) -> None:
    assert watts(f"{value_w!r}W", "-") == watts(value_w, "-") == value_w
    if value_w < MOST_W / 1000:
        assert watts(f"{value_w!r}kW", "-") == pytest.approx(1000 * value_w, rel=1e-15)


@given(st.floats(1e-300, 100))
def test_shares_come_back_as_they_were_written(percent: float) -> None:
    assert share(f"{percent!r}%", "-") == pytest.approx(percent / 100, rel=1e-15)


@given(ANYTHING, st.sampled_from([seconds, watts, share, share_or_tokens_per_s]))
def test_nothing_but_a_config_error_is_ever_raised(anything: object, parse: Parse) -> None:
    with suppress(ConfigError):
        value = parse(anything, "--option")
        found = value if isinstance(value, tuple) else (value,)
        assert all(v is None or (isinstance(v, float) and 0 < v < math.inf) for v in found)
