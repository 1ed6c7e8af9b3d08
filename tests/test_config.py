"""Configuration: unknown keys name the nearest, wrong values say what is allowed, nothing is dropped in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pals.cli.agent import config_of
from pals.cli.main import parser
from pals.cli.simulate_report import targets_text
from pals.core.errors import ConfigError
from pals.core.quantities import Slo
from pals.runtime.agent import policy_settings
from pals.runtime.config import POLICIES, WITHOUT_TARGET, Config, ControlConfig, check_complete, load_config
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
        ('[control]\npolicy = "pals-papr"\n', "did you mean 'pals-paper'"),
        ('[control]\nobjective = "nod"\n', "did you mean 'node'"),
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
        ('[control]\npolicy = "pals-paper"\n', "--throughput-target"),
        ('[engine."a/b"]\npolcy = "static"\n', r"\[engine.'a/b'\].*did you mean 'policy'"),
        ('[engine."a/b"]\nperiod_s = 1.0\n', "unknown key 'period_s'"),
        ('[engine."a/b"]\npolicy = "pals-paper"\n', "--throughput-target"),
        ('[engine."a/b"]\nttft_p95_s = 0\n', "must be positive"),
        ("[engine]\npolicy = 3\n", "must be a table"),
        ('[slo]\nttft_p95_s = "1 parsec"\n', r"\[slo\]: ttft_p95_s '1 parsec': expected a time above 0 like 1s, 50ms"),
        ('[slo]\nthroughput_share = "0.9"\n', "expected a share above 0% and at most 100% like 90%"),
        ("[slo]\nthroughput_share = 90\n", "must lie in 0..1, or be a text like '90%'"),
        ('[slo]\nthroughput_tokens_s = "90%"\n', "a share belongs into throughput_target"),
        ('[slo]\nthroughput_target = "fast"\n', "like 90%, or tokens per second above 1 like 1500"),
        ('[slo]\nthroughput_target = "90%"\nthroughput_tokens_s = 9\n', "say the same in two ways"),
        (
            '[control]\npolicy = "pals-paper"\n[slo]\nthroughput_target = "90%"\n',
            "tokens per second and does not know what 90%",
        ),
        ('[budget]\ndefault = "much"\n', r"\[budget\] default 'much': expected a power above 0"),
        ('[budget]\npower_w = "1kw"\n', "budget '1kw': expected watts, steps like .* 1200W or 1.2kW"),
        ("[budget]\nport = 9501\n", "needs a token: give --budget-token FILE"),
        ('[budget]\nport = 9477\ntoken = "t"\n', "metrics_port and .*budget.* port are both 9477"),
        ('[budget]\nport = 70000\ntoken = "t"\n', "0..65535"),
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


def test_units_are_read_in_the_file_and_numbers_stay_numbers(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        '[control]\npolicy = "pals"\nobjective = "gpu"\n'
        '[slo]\nttft_p95_s = "1s"\nttft_p99_s = 3\ntpot_p95_s = "50ms"\ntpot_p99_s = "80ms"\nthroughput_target = "90%"\n'
        '[budget]\npower_w = "2.4kW"\ndefault = "800W"\nport = 9501\ntoken = "secret.txt"\n',
    )

    assert config.slo == Slo(ttft_p95_s=1.0, ttft_p99_s=3.0, tpot_p95_s=0.05, tpot_p99_s=0.08, throughput_share=0.9)
    assert (config.budget.at(0.0).power_w, config.budget.default_w) == (2400.0, 800.0)
    assert (config.endpoint.host, config.endpoint.port, config.endpoint.token) == ("127.0.0.1", 9501, "secret.txt")
    assert policy_settings(config.control) == {"objective": "gpu"}


def test_a_throughput_target_replaces_the_other_form_of_it(tmp_path: Path) -> None:
    path = tmp_path / "pals.toml"
    path.write_text('[slo]\nthroughput_tokens_s = 900\nttft_p95_s = 2\n[engine.chat]\nthroughput_target = "80%"\n')

    config = load_config(path)
    assert config.engines["chat"].slo == Slo(throughput_share=0.8, ttft_p95_s=2.0)
    assert config.slo == Slo(throughput_tokens_s=900.0, ttft_p95_s=2.0)
    given = load_config(path, {"slo": {"throughput_share": 0.9, "throughput_tokens_s": None}})
    assert given.slo == given.engines["chat"].slo == Slo(throughput_share=0.9, ttft_p95_s=2.0)


def options(*given: str) -> Config:
    return config_of(parser().parse_args(["agent", *given]))


def test_options_with_units_and_their_older_names_say_the_same() -> None:
    new = ("--slo-ttft-p95", "1s", "--slo-tpot-p95", "50ms", "--throughput-target", "1500", "--budget", "2.4kW")
    old = ("--ttft-p95-s", "1", "--tpot-p95-s", "0.05", "--target-tokens-s", "1500", "--budget-w", "2400")

    assert options(*new) == options(*old)
    assert options(*new).slo == Slo(ttft_p95_s=1.0, tpot_p95_s=0.05, throughput_tokens_s=1500.0)
    both = options("--slo-ttft-p95", "1s", "--slo-ttft-p99", "3s", "--throughput-target", "90%", "--policy", "pals")
    assert both.slo == Slo(ttft_p95_s=1.0, ttft_p99_s=3.0, throughput_share=0.9)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("--slo-ttft-p95", "fast"), "^--slo-ttft-p95 'fast': expected a time"),
        (("--slo-tpot-p99", "nan"), "^--slo-tpot-p99 'nan'"),
        (("--throughput-target", "120%"), "^--throughput-target '120%'"),
        (("--throughput-target", "90%", "--policy", "cap-only"), "use --policy pals"),
        (("--budget-default", "0"), "default '0': expected a power above 0"),
        (("--budget-port", "9501"), "--budget-token FILE"),
    ],
)
def test_a_bad_option_is_named(given: tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        options(*given)


def test_targets_are_told_as_they_were_given() -> None:
    slo = Slo(throughput_share=0.9, ttft_p99_s=3.0, tpot_p95_s=0.05)

    assert targets_text(slo) == "90 % of the most tokens/s, TTFT p99 3 s, TPOT p95 50 ms"
    assert targets_text(Slo()) == "none"


@pytest.mark.parametrize("policy", POLICIES)
def test_who_needs_a_throughput_target_says_so(policy: str) -> None:
    config = Config(control=ControlConfig(policy=policy))

    check_complete(replace(config, slo=Slo(throughput_tokens_s=1500.0, tpot_p95_s=0.1)))
    if policy == "slo-clock":
        with pytest.raises(ConfigError, match="latency targets"):
            check_complete(config)
        check_complete(replace(config, slo=Slo(tpot_p99_s=0.05)))
    elif policy in WITHOUT_TARGET:
        check_complete(config)
        check_complete(replace(config, slo=Slo(throughput_share=0.9)))
    else:
        for slo in (Slo(), Slo(throughput_share=0.9), Slo(ttft_p95_s=1.0)):
            with pytest.raises(ConfigError, match=policy):
                check_complete(replace(config, slo=slo))
        assert "objective" not in policy_settings(config.control)
