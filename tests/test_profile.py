"""Profiles: the fit finds the world behind noisy rows, intervals hold what they promise, files round-trip or are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.core.errors import ConfigError, OutsideProfileError
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.experiments.scenarios import SCENARIOS
from pals.models.candidates import Candidates, candidates_of
from pals.models.fitted import fit
from pals.models.forecast import QUANTITIES
from pals.models.latency import quantile
from pals.models.observed import OBSERVED, conditions_of, told
from pals.models.parameters import MEANS, NAMES, Values, deviations_of, values_by_name, values_of
from pals.models.physics import base_of, curves, distinct_experts, settle, work_of
from pals.models.profile import MOST_BYTES, Profile
from tests.profile_world import (
    CHAT,
    DECODE,
    FACTS,
    FINGERPRINT,
    MIXES,
    PREFILL,
    TRUTH,
    clock_profile,
    points,
    profile,
    profile_of,
    rows_at,
    whole_profile,
)

BASE = base_of(FACTS)
deviations = st.lists(st.floats(-2, 2), min_size=len(NAMES), max_size=len(NAMES)).map(np.array)


def point(limit_w: float = 400.0, n: int = 16, mhz: int | None = None) -> OperatingPoint:
    return OperatingPoint(power_limit_w=limit_w, sm_clock_mhz=mhz, active_sequences=n)


# ---- the physics


@given(x=deviations)
@settings(max_examples=30, deadline=None)
def test_a_higher_limit_never_slows_a_step_and_a_mean_draw_stays_at_the_limit(x: np.ndarray) -> None:
    limits = np.linspace(150.0, 400.0, 11)
    c = curves(values_of(x), BASE, work_of(np.array([16.0]), CHAT))
    s = settle(values_of(x), BASE, c, batch=np.zeros(11, np.intp), limit_w=limits, ceiling_mhz=np.full(11, 1e9))

    assert np.all(np.diff(s.step_s) <= 1e-9 * s.step_s[1:])
    assert np.all((s.clock_mhz > 0.39 * 210) & (s.clock_mhz <= 1410.0 + 1e-6))
    possible = limits > max(c.decode_w[0, 0], c.prefill_w[0, 0])  # at the lowest clock in effect
    assert np.all(s.power_w[possible] <= limits[possible] * 1.02)  # firmware aims a little beside its limit


@given(x=deviations, n=st.floats(1, 64))
@settings(max_examples=30, deadline=None)
def test_above_natural_draw_a_limit_does_nothing(x: np.ndarray, n: float) -> None:
    v = values_of(x)
    c = curves(v, BASE, work_of(np.array([n]), DECODE))
    highest_w = float(max(c.decode_w.max(), c.prefill_w.max())) * 1.05
    s = settle(
        v,
        BASE,
        c,
        batch=np.zeros(2, np.intp),
        limit_w=np.array([highest_w, 2 * highest_w]),
        ceiling_mhz=np.full(2, 1e9),
    )

    assert s.step_s[0] == pytest.approx(s.step_s[1], rel=1e-12)
    assert s.power_w[0] == pytest.approx(s.power_w[1], rel=1e-12)
    assert s.power_w[0] == pytest.approx(s.natural_w[0], rel=1e-9)


@given(x=deviations, mhz=st.floats(250, 1400))
@settings(max_examples=30, deadline=None)
def test_a_lock_holds_the_clock_and_below_the_voltage_knee_power_falls_with_it(x: np.ndarray, mhz: float) -> None:
    v = values_of(x)
    c = curves(v, BASE, work_of(np.array([16.0]), CHAT))
    s = settle(v, BASE, c, batch=np.zeros(2, np.intp), limit_w=np.full(2, 1e4), ceiling_mhz=np.array([mhz, 1410.0]))

    assert s.clock_mhz[0] == pytest.approx(mhz, rel=1e-6)
    assert s.power_w[0] <= s.power_w[1] * (1 + 1e-9)
    assert s.step_s[0] >= s.step_s[1] * (1 - 1e-9)


@given(cv=st.floats(0.05, 3.0), tokens=st.floats(1, 4096))
def test_distinct_experts_follow_tokens_between_top_k_and_all_and_uneven_routing_touches_fewer(
    cv: float, tokens: float
) -> None:
    def touched(cv: float, tokens: float) -> float:
        v = values_of(np.zeros(len(NAMES)))._replace(popularity_cv=cv)
        return float(distinct_experts(v, BASE, np.array([tokens]))[0])

    assert 0 < touched(cv, tokens) <= 8.0
    assert touched(cv, tokens) <= touched(cv, 2 * tokens) + 1e-9
    assert touched(cv + 0.5, tokens) <= touched(cv, tokens) + 1e-6
    assert touched(0.05, 1.0) == pytest.approx(2.0, rel=0.03)  # top-k of one token
    uniform = 8.0 * (1.0 - (1.0 - 2.0 / 8.0) ** tokens)
    assert touched(1e-6, tokens) == pytest.approx(uniform, rel=1e-6)


@given(atoms=st.lists(st.floats(0, 100), min_size=6, max_size=6), share=st.floats(0.01, 0.99), low=st.floats(0.0, 0.5))
def test_a_quantile_lies_among_its_atoms_and_rises_with_its_share(atoms: list[float], share: float, low: float) -> None:
    values, weights = np.array([atoms]), np.full((1, 6), 1 / 6)
    found = quantile(values, weights, share)[0]

    assert min(atoms) - 1e-9 <= found <= max(atoms) + 1e-9
    assert quantile(values, weights, share * (1 - low))[0] <= found + 1e-9


def test_parameters_have_names_and_survive_the_way_through_a_file() -> None:
    assert deviations_of(values_by_name(TRUTH)) == pytest.approx(TRUTH)
    assert len(Values._fields) - 1 + len(values_of(TRUTH).corrections) == len(NAMES)
    assert values_of(np.zeros(len(NAMES))).overlap == pytest.approx(np.exp(MEANS[NAMES.index("overlap")]))
    with pytest.raises(ValueError, match="'weight' is unknown"):
        deviations_of({"weight": 1.0})
    with pytest.raises(ValueError, match="weights is -1, not above 0"):
        deviations_of({"weights": -1.0})


# ---- the fit


def test_the_fit_recovers_what_a_far_world_does_at_points_it_never_saw() -> None:
    seen = whole_profile().model()
    for i, mix in enumerate(MIXES):
        where = points((150.0, 300.0), (2, 16, 48), (1050,))
        truth = rows_at(where, mix=i)
        f = seen.forecast(where, Load(mix=mix))

        assert f.power_w.value == pytest.approx([r.power_w for r in truth], rel=0.05)
        assert f.tokens_per_s.value == pytest.approx([r.tokens_per_s for r in truth], rel=0.08)
        assert f.tpot_p95_s.value == pytest.approx([r.tpot_p95_s for r in truth], rel=0.10)


def test_intervals_hold_about_nine_tenths_of_rows_never_fitted() -> None:
    held, count = 0, 0
    for seed in range(4):
        rows = [
            r
            for i in range(3)
            for r in rows_at(points((100.0, 200.0, 300.0, 400.0), (1, 4, 16, 64)), mix=i, noise=0.02, seed=seed)
        ]
        order = np.random.default_rng(seed).permutation(len(rows))
        model = fit([rows[i] for i in order[:30]], MIXES, FACTS)
        for i in order[30:]:
            f = model.forecast([rows[i].point], Load(mix=MIXES[rows[i].mix]))
            for name in ("power_w", "tokens_per_s", "tpot_p95_s"):
                e = getattr(f, name)
                held += bool(e.low[0] <= getattr(rows[i], name) <= e.high[0])
                count += 1

    assert 0.85 <= held / count <= 0.99  # of points within the sampled levels; of four seeds


def test_one_bad_window_moves_predictions_little() -> None:
    rows = list(rows_at(points(), noise=0.005))
    bad = [
        *rows[:12],
        replace(rows[12], power_w=3 * rows[12].power_w, tokens_per_s=rows[12].tokens_per_s / 5),
        *rows[13:],
    ]
    where = points((250.0,), (8, 32))
    good, poisoned = (fit(r, MIXES, FACTS).forecast(where, Load(mix=CHAT)) for r in (rows, bad))

    assert poisoned.power_w.value == pytest.approx(good.power_w.value, rel=0.03)
    assert poisoned.tokens_per_s.value == pytest.approx(good.tokens_per_s.value, rel=0.05)


def test_without_rows_priors_speak_with_wide_intervals_and_ten_rows_make_them_useful() -> None:
    where = points((200.0, 300.0), (8, 32))
    truth = rows_at(where)
    told_by_priors = fit([], MIXES, FACTS).forecast(where, Load(mix=CHAT)).tokens_per_s
    ten = rows_at(points((100.0, 250.0, 400.0), (1, 16, 64), (600,)), noise=0.005)[:10]
    told_by_ten = fit(ten, MIXES, FACTS).forecast(where, Load(mix=CHAT)).tokens_per_s

    def width(e: object) -> float:
        return float(np.mean(np.log(e.high / e.low)))  # type: ignore[attr-defined]

    assert width(told_by_priors) > 3 * width(told_by_ten)
    assert told_by_ten.value == pytest.approx([r.tokens_per_s for r in truth], rel=0.10)


def test_a_measured_row_narrows_what_is_said_of_its_neighbours() -> None:
    few = rows_at(points((150.0, 400.0), (4, 64)))
    model = fit(few, MIXES, FACTS)
    new = [point(250.0, 16)]
    s = model.sensitivities(new, [CHAT])[0]
    after = np.linalg.inv(model.precision + s.T @ s)
    slopes = model.sensitivities([point(300.0, 16)], [CHAT])[0]
    before_sd, after_sd = (np.sqrt(np.diag(slopes @ c @ slopes.T)) for c in (model.covariance, after))

    assert np.all(after_sd <= before_sd + 1e-12)
    assert after_sd[1] < 0.9 * before_sd[1]
    assert np.all(model.relative_sd(new, [CHAT]) > 0)


# ---- what may be asked


def test_outside_the_hull_intervals_widen_for_one_step_and_then_the_profile_refuses() -> None:
    model = clock_profile().model()
    inside, edge = (model.forecast([point(w, 16)], Load(mix=CHAT)).tokens_per_s for w in (150.0, 110.0))

    assert np.log(edge.high / edge.low) > 1.5 * np.log(inside.high / inside.low)
    for far, load in (
        (point(80.0, 16), Load(mix=CHAT)),
        (point(400.0, 1), Load(mix=CHAT)),
        (point(400.0, 16, mhz=300), Load(mix=CHAT)),
        (point(400.0, 16), Load(mix=DECODE)),
    ):
        with pytest.raises(OutsideProfileError, match=r"outside what was measured.*Nothing was predicted; measure"):
            model.forecast([far], load)
    with pytest.raises(OutsideProfileError, match="inf grid steps"):
        profile().model().forecast([point(400.0, 16, mhz=1200)], Load(mix=CHAT))
    assert candidates_of(model, [point(80.0, 16), point(200.0, 16)], Load(mix=CHAT)).points == (point(200.0, 16),)


def test_every_quantity_has_an_interval_around_it() -> None:
    f = whole_profile().model().forecast(points((200.0, 400.0), (8, 64), (1200,)), Load(mix=PREFILL))

    assert set(f._fields) == set(QUANTITIES)
    for name in QUANTITIES:
        e = getattr(f, name)
        assert np.all((e.low < e.value) & (e.value < e.high)), name
    assert f.tokens_per_j.value == pytest.approx(f.tokens_per_s.value / f.power_w.value)
    assert f.node_power_w.value == pytest.approx(1.05 * f.power_w.value + 345.0)


def test_less_work_than_one_sequence_leaves_the_boards_idle_and_a_queue_delays_the_first_token() -> None:
    model = whole_profile().model()
    where = [point(400.0, 64)]
    busy = model.forecast(where, Load(mix=CHAT))
    some = model.forecast(where, Load(mix=CHAT, prefill_tokens_per_s=0.5 * busy.tokens_per_s.value[0] * 1200 / 225))
    little = model.forecast(where, Load(mix=CHAT, prefill_tokens_per_s=50.0))
    queued = model.forecast(where, Load(mix=CHAT, queued_tokens=20_000))

    assert some.tokens_per_s.value == pytest.approx(0.5 * busy.tokens_per_s.value, rel=0.01)
    assert little.tokens_per_s.value == pytest.approx(50.0 * 225 / 1200)
    assert little.power_w.value < some.power_w.value < busy.power_w.value
    assert some.tpot_p50_s.value < busy.tpot_p50_s.value
    assert queued.ttft_p95_s.value - busy.ttft_p95_s.value == pytest.approx(20_000 / busy.prefill_tokens_per_s.value)
    assert model.forecast(where, Load(mix=CHAT, running=8.0)).tpot_p50_s.value < busy.tpot_p50_s.value


@given(
    prompt=st.floats(600, 2400), output=st.floats(120, 450), running=st.one_of(st.none(), st.floats(1, 64)),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_candidates_say_what_the_model_says_and_the_same_load_gets_the_same_answer(
    prompt: float, output: float, running: float | None
) -> None:
    model = whole_profile().model()
    where = points((150.0, 250.0, 400.0), (8, 32, 64), (1200,))
    load = Load(mix=Mix(name="asked", prompt_tokens=prompt, output_tokens=output), running=running)
    fast, again, exact = (
        CANDIDATES.forecast(load),
        Candidates(model, tuple(where)).forecast(load),
        model.forecast(where, load),
    )

    for name in ("power_w", "tokens_per_s", "tpot_p95_s", "step_s"):
        assert getattr(fast, name).value == pytest.approx(getattr(exact, name).value, rel=0.02)
        assert np.array_equal(getattr(fast, name).value, getattr(again, name).value)


CANDIDATES = Candidates(whole_profile().model(), tuple(points((150.0, 250.0, 400.0), (8, 32, 64), (1200,))))


def test_an_accepted_mismatch_widens_every_interval() -> None:
    where = [point(200.0, 16)]
    plain, wide = (p.model().forecast(where, Load(mix=CHAT)).power_w for p in (profile(), profile().widened(2.0)))

    assert np.log(wide.high / wide.low) == pytest.approx(2 * np.log(plain.high / plain.low))
    assert wide.value == plain.value


def test_a_cache_that_was_full_bounds_what_runs() -> None:
    rows = list(rows_at(points()))
    full = [replace(r, running=min(r.running, 20.0)) for r in rows]
    model = fit(full, MIXES, FACTS)

    assert model.kv_tokens == pytest.approx(20.0 * CHAT.context_tokens)
    a, b = (model.forecast([point(400.0, n)], Load(mix=CHAT)).step_s.value for n in (32, 64))
    assert a == pytest.approx(b)


def test_predict_answers_as_the_paper_s_policies_need_it() -> None:
    model = profile().model()
    at = model.predict(point(400.0, 16))

    assert at.tokens_per_s == pytest.approx(model.forecast([point(400.0, 16)], Load(mix=CHAT)).tokens_per_s.value[0])
    assert model.predict(point(50.0, 16)).power_w == model.predict(point(150.0, 16)).power_w  # clipped
    with pytest.raises(ValueError, match="1200 MHz is unknown"):
        model.predict(point(400.0, 16, mhz=1200))


# ---- the file


@pytest.mark.parametrize("made", [profile, clock_profile, whole_profile])
def test_a_profile_round_trips_to_the_same_answers_and_stays_kilobytes(made: object) -> None:
    p: Profile = made()  # type: ignore[operator]
    back = Profile.from_json(p.to_json())
    where, load = [point(200.0, 16)], Load(mix=CHAT)

    assert back.to_json() == p.to_json()
    assert len(p.to_json().encode()) <= MOST_BYTES
    assert back.rows == p.rows
    assert back.notes == ("a note",)
    a, b = p.model().forecast(where, load), back.model().forecast(where, load)
    assert all(np.array_equal(getattr(a, n).low, getattr(b, n).low) for n in QUANTITIES)


def test_fifty_rows_of_every_figure_fit_into_eight_kilobytes() -> None:
    some = [r for i in range(3) for r in rows_at(points((100.0, 200.0, 400.0), (1, 8, 64), (600, 1200)), mix=i)]
    rows = [replace(r, at_s=1000.0 + i, temperature_c=61.25) for i, r in enumerate((some * 2)[:50])]

    text = profile_of(rows).to_json()
    assert len(rows) == 50
    assert len(text.encode()) <= MOST_BYTES


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.slug)
def test_the_parameters_of_a_committed_profile_are_those_of_its_rows(scenario: object) -> None:
    text = scenario.profile.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    p = Profile.from_json(text)
    again = fit(p.rows, p.mixes, p.facts)
    where = p.model().points[::9]
    load = Load(mix=p.mixes[0])

    assert len(text.encode()) <= MOST_BYTES
    assert again.forecast(where, load).power_w.value == pytest.approx(
        p.model().forecast(where, load).power_w.value, rel=0.01
    )
    assert p.model().quality["power_w"][1] < 0.04
    assert p.model().quality["tokens_per_s"][1] < 0.05


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "other"}', '{"format": "pals-profile/1"}', "[" * 9000])
def test_what_is_no_profile_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(ConfigError, match="pals profile"):
        Profile.from_json(text)


@pytest.mark.parametrize(
    ("was", "becomes", "told"),
    [
        ('"boards":4,"parallelism"', '"boards":"4","parallelism"', "fingerprint.boards is '4', not a whole number"),
        ('"power_limit_w",', '"limit_w",', "columns limit_w are unknown"),
        ('"notes"', '"nodes"', "nodes, notes: missing or unknown"),
        ('"weights":', '"weighs":', "missing or unknown: weighs, weights.*pals profile refit"),
        ('"tpot_p95_s":[', '"tpot_p96_s":[', "tpot_p95_s, tpot_p96_s: missing or unknown"),
        ("  [150,", '  ["150",', r"rows\[0\]\.power_limit_w is '150', no number"),
        ("  [150,4,", "  [150,4.5,", r"rows\[0\]\.active_sequences is '4.5'"),
        ("  [150,4,0,", "  [150,4,7,", "names mix 7 of 3"),
        ("  [150,4,", "  [150,", r"rows\[0\] has"),
        ("  [150,4,", "  [NaN,4,", "NaN is no JSON"),
        ("  [150,4,", "  [-150,4,", "not above 0"),
        ('"step_tokens":', '"step_tokens":-', "must be above 0"),
        ('"max_sm_clock_mhz":', '"max_sm_clock_mhz":-', "no SM clocks are"),
        ('"kv_heads":8', '"kv_heads":0', "no prediction follows"),
    ],
)
def test_a_damaged_profile_is_told_by_the_place(was: str, becomes: str, told: str) -> None:
    text = profile().to_json()
    assert was in text
    with pytest.raises(ConfigError, match=told):
        Profile.from_json(text.replace(was, becomes, 1))


def test_parameters_from_which_nothing_follows_are_refused() -> None:
    mute = replace(profile(), parameters={**profile().parameters, "overlap": 1e-300})
    with pytest.raises(ConfigError, match="prediction follows"):
        Profile.from_json(mute.to_json())


@given(cut=st.integers(1, 4000))
@settings(max_examples=20, deadline=None)
def test_a_file_cut_off_anywhere_is_refused(cut: int) -> None:
    with pytest.raises(ConfigError, match="Nothing was loaded"):
        Profile.from_json(profile().to_json()[:-cut].rstrip("}\n ") + " ")


def test_a_profile_of_another_version_is_fitted_anew_from_its_rows() -> None:
    old = profile().to_json().replace('"weights":', '"weighs":', 1)

    again = Profile.from_json(old, refit=True)
    assert again.rows == profile().rows
    assert again.to_json() == profile().to_json()


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 rows are too few"):
        profile_of(rows_at(points())[:3])


def test_the_file_is_json_for_people() -> None:
    data = json.loads(profile().to_json())

    assert data["format"] == "pals-profile/2"
    assert data["parameters"].keys() == set(NAMES)
    assert set(OBSERVED) <= data["intervals"].keys()
    assert len(data["rows"]) == len(profile().rows)


def test_differences_between_fingerprints_are_named() -> None:
    other = replace(FINGERPRINT, model="other", boards=2)

    assert FINGERPRINT.differences(FINGERPRINT) == []
    assert FINGERPRINT.differences(other) == [
        "model: 'm' in the profile, 'other' here",
        "boards: 4 in the profile, 2 here",
    ]


def test_rows_are_seen_under_the_prefill_they_had() -> None:
    rows = rows_at(points((400.0,), (16,)), mix=0)
    thin = [replace(rows[0], prefill_tokens_per_s=0.5 * rows[0].prefill_tokens_per_s)]
    v = values_of(TRUTH)
    full, less = (told(v, BASE, conditions_of(r, MIXES, FACTS.step_tokens))[1, 0] for r in (rows, thin))

    assert less < full
