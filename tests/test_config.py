"""Configuration: unknown keys name the nearest, wrong values say what is allowed, nothing is dropped in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pals.core.errors import ConfigError
from pals.runtime.budgets import parse_budget
from pals.runtime.config import Config, load_config
from tests.worlds import engine_info


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "pals.toml"
    path.write_text(text)
    return load_config(path)


def test_a_full_file_is_read_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "pals.toml"
    path.write_text(
        '[control]\npolicy = "pals-paper"\nperiod_s = 1\n[slo]\nthroughput_tokens_s = 900\n[budget]\npower_w = "0:1600,30:900"\n'
    )

    config = load_config(path, {"slo": {"throughput_tokens_s": 1000.0, "ttft_p95_s": None}})

    assert config.control.policy == "pals-paper"
    assert config.control.period_s == 1.0
    assert config.slo.throughput_tokens_s == 1000.0
    assert config.budget.at(31.0).power_w == 900.0


def test_a_mismatch_is_accepted_for_one_engine_or_all_and_by_the_command_line(tmp_path: Path) -> None:
    config = load(tmp_path, '[engine."a/b"]\naccept_mismatch = true\n')

    assert not config.control.accept_mismatch
    assert config.engines["a/b"].control.accept_mismatch
    assert load_config(None, {"control": {"accept_mismatch": True}}).control.accept_mismatch
    assert not load_config(None, {"control": {"accept_mismatch": None}}).control.accept_mismatch


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[contrl]\n", "did you mean 'control'"),
        ('[control]\npolcy = "static"\n', "did you mean 'policy'"),
        ('[control]\npolicy = "pals"\n', "did you mean 'pals-paper'"),
        ('[control]\nlowering = "timeslice"\n', "did you mean 'time-slice'"),
        ("[control]\nsm_clock_mhz = 1200.5\n", "not a int"),
        ("[control]\naccept_mismatch = 1\n", "not a bool"),
        ("[control]\nsm_clock_mhz = true\n", "not a int"),
        ('[control]\npolicy = "clock-only"\n', "policy clock-only steers by a throughput target"),
        ("[output]\nmetrics_port = 9400\ndcgm_port = 9400\n", "must differ"),
        ("[output]\ndcgm_port = 70000\n", "0..65535"),
        ('[control]\nmode = "manual"\n', "unknown mode 'manual'"),
        ('[control]\nperiod_s = "fast"\n', "not a float"),
        ("[control]\nperiod_s = 0.001\n", r"0\.05\.\.60"),
        ("[slo]\nttft_p95_s = -1\n", "must be positive"),
        ("[slo]\nttft_p95_s = nan\n", "not a finite number"),
        ("[budget]\nwatts = 3\n", r"\[budget\]"),
        ("control = 3\n", "must be a table"),
        ("[control\n", "cannot read the configuration"),
        ('[control]\npolicy = "pals-paper"\n', "--target-tokens-s"),
        ('[engine."a/b"]\npolcy = "static"\n', r"\[engine.'a/b'\].*did you mean 'policy'"),
        ('[engine."a/b"]\nperiod_s = 1.0\n', "unknown key 'period_s'"),
        ('[engine."a/b"]\npolicy = "pals-paper"\n', "--target-tokens-s"),
        ('[engine."a/b"]\nttft_p95_s = 0\n', "must be positive"),
        ("[engine]\npolicy = 3\n", "must be a table"),
    ],
)
def test_bad_input_says_what_and_what_to_do(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(tmp_path, text)


def test_an_engines_section_overrides_the_general_ones_and_the_command_line_both(tmp_path: Path) -> None:
    path = tmp_path / "pals.toml"
    path.write_text(
        '[control]\npolicy = "pals-paper"\nprofile = "all.json"\n[budget]\npower_w = "900"\n'
        '[engine."a/b"]\nprofile = "ab.json"\nthroughput_tokens_s = 500\n[engine.chat]\npolicy = "static"\n'
    )
    config = load_config(path, {"slo": {"ttft_p95_s": 1.5}})

    own = config.of(replace(engine_info(), model="a/b"))
    assert (own.control.policy, own.control.profile) == ("pals-paper", "ab.json")
    assert (own.slo.throughput_tokens_s, own.slo.ttft_p95_s) == (500.0, 1.5)
    assert config.of(replace(engine_info(), model="a/b", served_as="chat")).control.policy == "static"
    with pytest.raises(ConfigError, match="steers x/y by a throughput target"):
        config.of(replace(engine_info(), model="x/y"))


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Path("/nonexistent/pals.toml"))


def test_budgets_step_at_their_times() -> None:
    schedule = parse_budget("0:none,30:1000,60:1600")

    assert [schedule.at(t).power_w for t in (0.0, 29.9, 30.0, 60.0, 1e6)] == [None, None, 1000.0, 1600.0, 1600.0]
    assert parse_budget("1200").at(0.0).power_w == 1200.0


@pytest.mark.parametrize(
    "text", ["", "lots", "0:5:6", "30:1000,10:900", "0:-5", "nan", "0:inf", "nan:100", "inf:100", "0:100,nan:50"]
)
def test_a_bad_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        parse_budget(text)
