"""`pals profile show`: says what the model says, advises what keeps its targets, and refuses in one line what it cannot read."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.cli import main
from pals.cli.profile_show import as_json, point_of
from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.core.load import Load, Mix
from pals.core.quantities import Fingerprint, OperatingPoint
from pals.engines.model_zoo import shipped_config
from pals.models.engine_facts import EngineFacts
from pals.models.fit import NORMAL_HALF_WIDTH, Calibration
from pals.models.fitted import Fitted
from pals.models.forecast import QUANTITIES
from pals.models.observed import FIRST_NOISE, OBSERVED
from pals.models.parameters import NAMES, values_by_name
from pals.models.profile import Profile
from pals.models.row import ProfileRow
from pals.views.profile_facts import ProfileFacts, facts_of
from pals.views.profile_figure import draw_profile, pareto, round_levels
from pals.views.profile_parameters import FAR_SDS, parameters_of
from pals.views.profile_points import best_points, known_of, number, tokens_per_j
from pals.views.profile_text import QUANTITY_WORDS, plain_text

CHAT = Mix(name="chat", prompt_tokens=1200, output_tokens=225)
DECODE = Mix(name="decode", prompt_tokens=64, output_tokens=256)
FACTS = EngineFacts(
    board="NVIDIA H100 80GB HBM3", boards=1, min_limit_w=200.0, max_limit_w=700.0, min_sm_clock_mhz=345,
    max_sm_clock_mhz=1980, launch_sequences=64, shape=ModelShape.from_config(shipped_config("Qwen/Qwen3-30B-A3B")),
)  # fmt: skip
FINGERPRINT = Fingerprint(
    engine="vllm", engine_version="0.32.0", model="Qwen/Qwen3-30B-A3B", board=FACTS.board, driver="580", boards=1,
    parallelism="tp1 pp1 dp1 ep0", launch_sequences=64,
)  # fmt: skip


@cache
def fitted(**moved: float) -> Fitted:
    """The priors' model, some parameters moved by so many prior sds, with rows that it made itself."""
    x = np.array([moved.get(name, 0.0) for name in NAMES])
    errors = np.where(np.arange(len(FIRST_NOISE)) < len(OBSERVED), 0.03, np.nan)
    honest = Calibration(FIRST_NOISE, np.full(len(FIRST_NOISE), NORMAL_HALF_WIDTH), errors, 0.5 * errors)
    bare = Fitted(facts=FACTS, mixes=(CHAT, DECODE), rows=(), x=x, calibration=honest)
    return replace(bare, rows=(*rows(bare, 0), *rows(bare, 1)))


def rows(model: Fitted, mix: int) -> list[ProfileRow]:
    """What the model expects at three limits and two locks with three batches, without TTFT."""
    levers = [(200.0, None), (450.0, None), (700.0, None), (700.0, 990), (700.0, 1380)]
    points = [
        OperatingPoint(power_limit_w=w, sm_clock_mhz=mhz, active_sequences=n) for w, mhz in levers for n in (1, 8, 64)
    ]
    f = model.forecast(points, Load(mix=model.mixes[mix]))
    prefill = f.tokens_per_s.value * model.mixes[mix].prefill_per_output
    return [
        ProfileRow(
            power_limit_w=p.power_limit_w, sm_clock_lock_mhz=p.sm_clock_mhz, active_sequences=p.active_sequences or 1, mix=mix,
            running=float(p.active_sequences or 1), power_w=float(f.power_w.value[i]), at_s=60.0, window_s=8.0,
            tokens_per_s=float(f.tokens_per_s.value[i]), prefill_tokens_per_s=float(prefill[i]),
            steps_per_s=1.0 / float(f.step_s.value[i]), sm_clock_mhz=float(f.sm_clock_mhz.value[i]),
            tpot_p95_s=float(f.tpot_p95_s.value[i]),
        )
        for i, p in enumerate(points)
    ]  # fmt: skip


@cache
def profile() -> Profile:
    model = fitted()
    return Profile(
        fingerprint=FINGERPRINT, facts=FACTS, mixes=model.mixes, rows=model.rows, parameters=values_by_name(model.x),
        calibration=model.calibration, source="simulated", made_at="2026-01-01", command="pals profile simulate",
        notes=("a note",),
    )  # fmt: skip


def told(profile_: Profile, *, node: bool = False, point: OperatingPoint | None = None) -> ProfileFacts:
    return facts_of(profile_, file="p.json", size=4000, mixes=profile_.mixes, node=node, point=point)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(profile().to_json(), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_text_fits_its_width_and_says_what_matters(width: int) -> None:
    point = OperatingPoint(power_limit_w=450.0, sm_clock_mhz=990, active_sequences=8)
    text = plain_text(told(profile(), point=point), width=width)

    assert max(map(len, text.splitlines())) <= width
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "…" not in text  # nothing was cut off
    assert "\x1b" not in text
    flat = " ".join(text.split())
    for words in ("SIMULATED", "Qwen/Qwen3-30B-A3B on 1 × NVIDIA H100 80GB HBM3", "2026-01-01", "15 rows", "a note"):
        assert words in flat
    for words, _, _ in QUANTITY_WORDS.values():
        assert words in flat
    assert "At 450 W, 990 MHz, 8 active sequences: chat" in flat


def test_json_tells_the_same_with_units_in_its_names(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "show", str(file), "--json", "--point", "450W,990MHz,8"]) == 0
    data = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)

    assert data["format"] == "pals-profile-show/1"
    assert {
        "source",
        "fingerprint",
        "mixes",
        "draws",
        "quality",
        "parameters",
        "best_points",
        "points",
        "notes",
    } <= set(data)
    assert [m["rows"] for m in data["mixes"]] == [15, 15]
    assert {q["quantity"] for q in data["quality"]} == set(QUANTITIES) == set(QUANTITY_WORDS)
    assert data["found_limit_w"] == 700.0
    point = data["points"][0]
    assert (point["power_limit_w"], point["sm_clock_lock_mhz"], point["active_sequences"]) == (450.0, 990, 8)
    for e in point["predicted"].values():
        assert e["low"] <= e["value"] <= e["high"]


@pytest.mark.parametrize("node", [False, True])
@pytest.mark.parametrize("mix", [CHAT, DECODE])
def test_the_best_point_surely_keeps_the_target_and_no_other_that_does_is_better(mix: Mix, node: bool) -> None:
    model = fitted()
    f = model.forecast(model.points, Load(mix=mix))
    per_j = tokens_per_j(f, node=node)

    found = best_points(known_of(model, mix), node=node)
    assert [b.load_ratio for b in found] == [0.25, 0.5, 0.75, 0.95]
    for b in found:
        keeps = f.tokens_per_s.low >= b.target_tokens_per_s
        assert (b.best is None) == (not keeps.any())
        if b.best is None or b.tokens_per_j is None or b.saved_energy_ratio is None:
            continue
        assert b.best.predicted["tokens_per_s"].low >= b.target_tokens_per_s
        assert b.tokens_per_j.value == per_j.value[keeps].max()
        assert b.saved_energy_ratio < 1.0
    gained = [b.tokens_per_j.value for b in found if b.tokens_per_j is not None]
    assert gained == sorted(gained, reverse=True)  # more load never makes a token cheaper here


@pytest.mark.parametrize("mix", [CHAT, DECODE])
def test_counting_the_node_never_asks_for_a_slower_point(mix: Mix) -> None:
    model = fitted()
    known = known_of(model, mix)
    for boards, node in zip(*(best_points(known, node=n) for n in (False, True)), strict=True):
        if boards.best is not None and node.best is not None:
            assert node.best.predicted["tokens_per_s"].value >= boards.best.predicted["tokens_per_s"].value
    f = model.forecast(model.points, Load(mix=mix))
    whole = tokens_per_j(f, node=True)
    assert whole.value == pytest.approx(f.tokens_per_s.value / f.node_power_w.value)
    assert (whole.low < whole.value).all()
    assert (whole.value < whole.high).all()


def test_a_limit_binds_where_the_natural_draw_is_surely_above_it() -> None:
    hungry = replace(profile(), parameters=values_by_name(fitted(tensor=3.0, busy=2.0).x))
    assert {d.limit_binds for d in told(hungry).draws} >= {"yes", "prefill steps"}
    for d in told(hungry).draws:
        natural = d.natural_draw_per_board_w
        assert (d.limit_binds == "yes") == (natural.low > 700.0)
        if d.limit_binds == "no":
            assert natural.high < 700.0
            assert d.power_per_board_w.value == pytest.approx(natural.value, rel=0.011)
        if d.limit_binds == "prefill steps":
            assert d.power_per_board_w.value < natural.value
    modest = replace(profile(), parameters=values_by_name(fitted(tensor=-2.0, busy=-2.0).x))
    assert {d.limit_binds for d in told(modest).draws if d.mix == "decode"} == {"no"}


def test_parameters_far_from_their_priors_are_flagged() -> None:
    facts = {p.name: p for p in parameters_of(fitted(weights=3.5, static=-2.9))}

    assert [n for n, p in facts.items() if p.far] == ["weights"]
    assert facts["weights"].moved_prior_sds == pytest.approx(3.5)
    assert not facts["link"].used  # one board
    for p in facts.values():
        assert p.prior_low < p.prior_value < p.prior_high
        assert 0.0 <= p.learnt_ratio <= 1.0
    far = replace(profile(), parameters=values_by_name(fitted(weights=3.5).x))
    assert f"1 moved by more than {FAR_SDS:.0f} sds" in " ".join(plain_text(told(far), width=120).split())


@given(
    limit_w=st.integers(200, 700), mhz=st.integers(345, 1980), n=st.integers(1, 64), order=st.permutations(range(3)),
    kilo=st.booleans(), given_parts=st.sets(st.integers(0, 2), min_size=1),
)  # fmt: skip
def test_a_point_is_read_in_any_order_and_unit(
    limit_w: int, mhz: int, n: int, order: list[int], kilo: bool, given_parts: set[int]
) -> None:
    parts = [f"{limit_w / 1000}kW" if kilo else f"{limit_w}W", f"{mhz / 1000} GHz" if kilo else f"{mhz}mhz", f"{n}"]
    point = point_of(",".join(parts[i] for i in order if i in given_parts), FACTS)

    assert point.power_limit_w == pytest.approx(limit_w if 0 in given_parts else 700.0)
    assert point.sm_clock_mhz == (mhz if 1 in given_parts else None)
    assert point.active_sequences == (n if 2 in given_parts else 64)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("400", "outside 1..64 active sequences"),
        ("400W,300W", "two power limits"),
        ("fast", "no number with a unit"),
        ("4000W", "outside 200..700 W per board"),
        ("100MHz", "outside 345..1980 MHz"),
        ("400V", "no unit of W, kW, MHz or GHz"),
        ("400W,,3", "'' is no number"),
        ("nanW", "no number"),
    ],
)
def test_a_point_that_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"{says}.*Nothing was predicted"):
        point_of(text, FACTS)


def test_a_load_or_lock_that_nobody_measured_is_refused_with_what_was(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "show", str(file), "--prompt-tokens", "90000", "--output-tokens", "10"]) == 2
    err = capsys.readouterr().err
    assert "90000 prompt and 10 output tokens" in err
    assert "Nothing was predicted; measure there: pals profile --prompt-tokens 90000" in err

    free = replace(profile(), rows=tuple(r for r in profile().rows if r.sm_clock_lock_mhz is None))
    (tmp_path / "free.json").write_text(free.to_json())
    assert main(["profile", "show", str(tmp_path / "free.json"), "--point", "990MHz"]) == 2
    assert "200..700 W, no clock lock, 1..64 sequences. Nothing was predicted" in capsys.readouterr().err


def test_another_load_inside_what_was_measured_is_predicted(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "show", str(file), "--prompt-tokens", "600", "--output-tokens", "300"]) == 0
    out = capsys.readouterr().out
    assert "asked: 600 prompt tokens, 300 output tokens, ±50%: not measured" in out
    assert "asked, 600 in, 300 out" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--mix", "none"], "this profile has chat, decode"),
        (["--prompt-tokens", "9"], "needs --prompt-tokens and --output-tokens"),
        (["--prompt-tokens", "9", "--output-tokens", "9", "--mix", "chat"], "no --mix"),
        (["--prompt-tokens", "nan", "--output-tokens", "9"], "at least 1"),
        (["--figure", "x.bmp"], "must end in .png"),
        (["--figure", "/no/such/folder/x.png"], "is no folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    file: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "show", str(file), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a readable profile"),
        (b'{"format": "other"}', "format 'other'"),
        (b'{"format": "pals-profile/1", "rows": []}', "expected 'pals-profile/2'; make it anew"),
        (b"\xff\xfe\x00", "no text"),
        (b"[" * 100_000, "not a readable profile"),
        (b" " * (1 << 21), "a profile 8 KiB"),
        (None, "there is no file"),
    ],
)
def test_what_is_no_profile_is_told_in_one_line(
    tmp_path: Path, content: bytes | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["profile", "show", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert str(path) in err


def test_truncated_files_folders_and_devices_are_told_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = file.read_bytes()
    for end in range(0, len(whole) - 2, len(whole) // 25):
        file.write_bytes(whole[:end])
        assert main(["profile", "show", str(file)]) == 2
        assert "not a readable profile" in capsys.readouterr().err
    for path, says in ((file.parent, "is a folder"), (Path("/dev/null"), "no regular file"), (file / "x", "no file")):
        assert main(["profile", "show", str(path)]) == 2
        assert says in capsys.readouterr().err


def test_a_profile_without_rows_advises_nothing() -> None:
    with pytest.raises(ConfigError, match="holds no measured row"):
        told(replace(profile(), rows=()))


def test_a_mix_without_rows_near_it_is_a_note_and_the_others_are_told() -> None:
    far = Mix(name="far", prompt_tokens=100_000, output_tokens=10)
    facts = told(replace(profile(), mixes=(CHAT, DECODE, far)))

    assert {b.mix for b in facts.best_points} == {"chat", "decode"}
    assert facts.not_predicted[0].startswith("far, 100000 prompt")


def test_a_file_does_not_command_the_terminal() -> None:
    odd = replace(
        profile(),
        notes=("\x1b]0;title\x07 [red]x[/red] :smile:",),
        fingerprint=replace(FINGERPRINT, model="\x1b[31m[/]"),
    )
    text = plain_text(told(odd), width=120)

    assert "\x1b" not in text
    assert "[red]x[/red] :smile:" in text


def test_json_has_no_word_for_infinity() -> None:
    facts = replace(told(profile()), measured_s=math.inf)

    assert json.loads(as_json(facts), parse_constant=pytest.fail)["measured_s"] is None


def test_showing_needs_neither_scipy_nor_matplotlib(file: Path) -> None:
    code = (
        "import sys; from pals.cli import main; code = main(['profile', 'show', sys.argv[1]]);"
        "sys.exit(code or int(any(m in sys.modules for m in ('scipy', 'matplotlib', 'numba'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "Best point per load" in done.stdout


def test_the_figure_is_a_png_of_four_panels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_profile(profile(), CHAT, tmp_path / "p.png", node=True)

    head = (tmp_path / "p.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (1606, 1254)
    assert (tmp_path / "p.png").stat().st_size > 60_000


def test_a_lone_level_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lone = tuple(
        r for r in profile().rows if r.sm_clock_lock_mhz is None and r.power_limit_w == 700 and r.active_sequences == 8
    )
    draw_profile(replace(profile(), rows=lone), CHAT, tmp_path / "p.png", node=False)

    assert (tmp_path / "p.png").stat().st_size > 30_000


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=30))
def test_no_point_beats_the_front_in_both(points: list[tuple[float, float]]) -> None:
    front = pareto(points)

    assert set(front) <= set(points)
    for x, y in points:
        assert any(a >= x and b >= y for a, b in front)
    for a, b in front:
        assert not any((x > a and y >= b) or (x >= a and y > b) for x, y in points)


@given(low=st.floats(1e-3, 1e4), times=st.floats(1.0, 1e4))
def test_contours_rise_and_are_at_least_one(low: float, times: float) -> None:
    assert (levels := round_levels(low, low * times)) == sorted(set(levels)) != []


@given(st.floats(1e-3, 1e6))
def test_a_number_keeps_three_digits(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=0.0051, abs=5e-5)
