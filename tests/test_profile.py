"""Profiles: the fit follows the physics it claims, files round-trip, and foreign or damaged ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.core.quantities import Fingerprint, OperatingPoint
from pals.models.profile import Profile, ProfileRow, fit

FINGERPRINT = Fingerprint(
    engine="vllm",
    engine_version="0.32.0",
    model="m",
    board="b",
    driver="1",
    boards=4,
    parallelism="tp4 pp1 dp1 ep0",
    launch_sequences=64,
)


def natural_w(n: int) -> float:
    return float(90.0 * n**0.3)


def rows() -> tuple[ProfileRow, ...]:
    out = []
    for n in (4, 8, 16, 32, 64):
        for limit_w in (150.0, 200.0, 250.0, 300.0, 400.0):
            per_board_w = min(limit_w, natural_w(n))
            out.append(
                ProfileRow(
                    power_limit_w=limit_w,
                    active_sequences=n,
                    power_w=4 * per_board_w,
                    tokens_per_s=30.0 * n**0.8 * (per_board_w / 200.0) ** 0.6,
                    sm_clock_mhz=1410,
                    window_s=8.0,
                )
            )
    return tuple(out)


def profile() -> Profile:
    return Profile(
        fingerprint=FINGERPRINT, rows=rows(), source="emulated", load="l", made_at="2026-01-01", command="pals profile"
    )


def test_the_fit_recovers_a_power_law_world_and_is_inert_above_natural_draw() -> None:
    model = fit(rows(), boards=4)

    assert model.residuals.power_mape < 0.01
    assert model.residuals.throughput_mape < 0.01
    at_300 = model.predict(OperatingPoint(power_limit_w=300.0, active_sequences=8))
    at_400 = model.predict(OperatingPoint(power_limit_w=400.0, active_sequences=8))
    assert at_300.tokens_per_s == at_400.tokens_per_s
    assert at_300.power_w == at_400.power_w == pytest.approx(4 * natural_w(8), rel=0.02)


@given(limit_w=st.floats(100, 400), n=st.integers(1, 128))
def test_predicted_power_never_exceeds_the_limits(limit_w: float, n: int) -> None:
    predicted = fit(rows(), boards=4).predict(OperatingPoint(power_limit_w=limit_w, active_sequences=n))

    assert predicted.power_w <= 4 * limit_w * (1 + 1e-12)
    assert predicted.tokens_per_s > 0


def soft_rows(sharpness: float, limits_w: tuple[float, ...]) -> list[ProfileRow]:
    out = []
    for n in (4, 8, 16, 32, 64):
        for limit_w in limits_w:
            drawn_w = (limit_w**-sharpness + natural_w(n) ** -sharpness) ** (-1 / sharpness)
            tokens_per_s = 30.0 * n**0.8 * (drawn_w / 200.0) ** 0.6
            out.append(
                replace(
                    rows()[0], power_limit_w=limit_w, active_sequences=n, power_w=4 * drawn_w, tokens_per_s=tokens_per_s
                )
            )
    return out


@pytest.mark.parametrize("sharpness", [3.0, 6.0, 12.0])
def test_a_soft_corner_is_recovered_even_where_the_highest_limit_binds(sharpness: float) -> None:
    model = fit(soft_rows(sharpness, (150.0, 175.0, 200.0, 225.0, 250.0, 275.0)), boards=4)  # natural: 136 to 313 W

    assert model.residuals.power_mape < 0.002
    assert model.power.sharpness == pytest.approx(sharpness, rel=0.06)
    assert [model.natural_draw_w(n) for n in (4, 64)] == pytest.approx([natural_w(4), natural_w(64)], rel=0.02)
    far = model.predict(OperatingPoint(power_limit_w=3000.0, active_sequences=16))
    assert far.power_w == pytest.approx(4 * natural_w(16), rel=0.02)


def test_where_every_limit_binds_the_limit_is_what_is_drawn() -> None:
    bound = [replace(r, power_w=4 * r.power_limit_w * 0.995) for r in rows() if r.power_limit_w <= 200]
    model = fit(bound, boards=4)

    assert model.residuals.power_mape < 0.01
    assert model.predict(OperatingPoint(power_limit_w=150.0, active_sequences=8)).power_w == pytest.approx(
        600, rel=0.02
    )


def test_the_fit_told_in_the_committed_profile_is_what_the_code_gives() -> None:
    name = "profile-mixtral-8x7b-v0.1-4xa100-sxm4-80gb.json"
    text = files("pals.experiments").joinpath("data", name).read_text(encoding="utf-8")
    told, now = json.loads(text)["fit"], Profile.from_json(text).model().residuals

    assert (now.power_mape, now.throughput_mape) == pytest.approx(
        (told["power_mape"], told["throughput_mape"]), rel=1e-3
    )
    assert now.power_mape < 0.01


def test_a_profile_round_trips_and_stays_kilobytes() -> None:
    text = profile().to_json()

    assert Profile.from_json(text) == profile()
    assert len(text) < 8192


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "other"}', '{"format": "pals-profile/1"}'])
def test_what_is_no_profile_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(ConfigError, match="pals profile"):
        Profile.from_json(text)


@pytest.mark.parametrize(
    ("was", "becomes", "told"),
    [
        ('"boards": 4', '"boards": "4"', "fingerprint.boards is '4', not a whole number"),
        ('"power_limit_w": 150.0', '"limit_w": 150.0', r"rows\[0\].limit_w is unknown"),
        ('"window_s": 8.0', '"window_s": null', r"rows\[0\].window_s is 'None', not a number"),
        ('"load"', '"lord"', "lord is unknown"),
    ],
)
def test_a_damaged_profile_is_told_by_the_key(was: str, becomes: str, told: str) -> None:
    assert was in profile().to_json()
    with pytest.raises(ConfigError, match=told):
        Profile.from_json(profile().to_json().replace(was, becomes, 1))


def test_a_row_without_output_cannot_be_fitted() -> None:
    with pytest.raises(ConfigError, match="row 1 of the profile has a figure that is not above 0"):
        fit([replace(rows()[0], tokens_per_s=0.0), *rows()[1:]], boards=4)


def test_nan_in_a_row_is_refused() -> None:
    text = profile().to_json().replace("8.0}", "NaN}", 1)

    with pytest.raises(ConfigError, match="window_s is nan"):
        Profile.from_json(text)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few to fit"):
        fit(rows()[:3], boards=4)


def test_differences_between_fingerprints_are_named() -> None:
    other = replace(FINGERPRINT, model="other", boards=2)

    assert FINGERPRINT.differences(FINGERPRINT) == []
    assert FINGERPRINT.differences(other) == [
        "model: 'm' in the profile, 'other' here",
        "boards: 4 in the profile, 2 here",
    ]
