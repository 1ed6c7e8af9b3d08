"""The trace slice is what its README says: unaltered arrivals, and windows that neither lose nor repeat a request."""

from __future__ import annotations

from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.experiments.trace import SLICE_S, describe, load_slice


def test_the_slice_has_the_traces_rate_and_lengths() -> None:
    whole = load_slice(SLICE_S)

    assert len(whole) == 4123
    assert sum(s.prompt_tokens for s in whole) == 5_683_942
    assert sum(s.output_tokens for s in whole) == 684_624
    assert [s.at_s for s in whole] == sorted(s.at_s for s in whole)
    assert max(s.prompt_tokens + s.output_tokens for s in whole) < 8192  # no length was cut, and none needs it


@settings(max_examples=20, deadline=None)
@given(cut_s=st.floats(min_value=1.0, max_value=SLICE_S - 1.0))
def test_two_windows_side_by_side_hold_every_request_once(cut_s: float) -> None:
    before, after = load_slice(cut_s), load_slice(SLICE_S - cut_s, start_s=cut_s)

    assert len(before) + len(after) == 4123
    assert all(0 <= s.at_s < cut_s for s in before)
    assert all(0 <= s.at_s < SLICE_S - cut_s for s in after)


@pytest.mark.parametrize(("duration_s", "start_s"), [(0.0, 0.0), (601.0, 0.0), (60.0, 541.0), (60.0, -1.0)])
def test_a_window_outside_the_slice_is_refused(duration_s: float, start_s: float) -> None:
    with pytest.raises(ConfigError, match="600 s"):
        load_slice(duration_s, start_s=start_s)


def test_a_window_without_a_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="no request"):
        load_slice(1e-6, start_s=0.0)


def test_a_load_is_described_by_its_means() -> None:
    text = describe(load_slice(SLICE_S))

    assert "4123 requests in 600 s (6.9/s)" in text
    assert "mean prompt 1379, mean output 166 tokens" in text


def test_the_data_carry_their_origin_and_licence() -> None:
    data = files("pals.experiments") / "data"
    readme = (data / "README.md").read_text(encoding="utf-8")

    assert "AzurePublicDataset" in readme
    assert "CC BY 4.0" in readme
    assert "Creative Commons Attribution 4.0" in (data / "LICENSE.azure-trace.CC-BY-4.0").read_text(encoding="utf-8")
