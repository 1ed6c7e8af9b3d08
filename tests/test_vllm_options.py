"""vLLM's options as vLLM reads them, and what can be refused before it is started."""

from __future__ import annotations

import argparse
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pals.cli.preflight import check_before_launch
from pals.cli.serve import drain_of
from pals.cli.vllm_options import Endpoint, check_ports, emulated_boards, endpoint_of, option, whole
from pals.core.errors import ConfigError
from pals.core.quantities import fingerprint_of
from pals.engines.model_zoo import full_name
from pals.runtime.config import load_config
from tests.profile_world import profile
from tests.worlds import board_info, engine_info

BOARDS = [board_info(0), board_info(1)]


def test_underscores_are_dashes_and_the_last_of_repeated_options_counts() -> None:
    rest = ["--max_num_seqs", "8", "--tensor-parallel-size=4", "-tp", "2", "--tensor_parallel_size", "1"]

    assert option(rest, "--max-num-seqs") == "8"
    assert option(rest, "--tensor-parallel-size", "-tp") == "1"
    assert emulated_boards("", 4, rest) == ((0,), rest)


@pytest.mark.parametrize(
    ("rest", "url"),
    [
        ([], "http://127.0.0.1:8000"),
        (["--host", "0.0.0.0", "--port=9"], "http://127.0.0.1:9"),
        (["--host", "::"], "http://[::1]:8000"),
        (["--host", "10.0.0.5", "--ssl_certfile", "x.pem"], "https://10.0.0.5:8000"),
    ],
)
def test_the_endpoint_is_asked_where_it_listens(rest: list[str], url: str) -> None:
    assert endpoint_of(rest).url == url


def test_ports_that_are_taken_or_the_same_are_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"API port {port}.*Nothing was started"):
            check_ports(Endpoint("127.0.0.1", port, False), [])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            free = s.getsockname()[1]
        with pytest.raises(ConfigError, match=f"metrics port {free} is the API's too"):
            check_ports(Endpoint("127.0.0.1", free, False), [(0, "dcgm"), (free, "metrics")])
        with pytest.raises(ConfigError, match=f"dcgm port {port}.*--dcgm-port"):
            check_ports(Endpoint("127.0.0.1", free, False), [(port, "dcgm")])


@pytest.mark.parametrize(
    ("own", "rest", "drain_s"), [(None, [], 60), (5, [], 5), (None, ["--shutdown_timeout", "9"], 9), (0, [], 0)]
)
def test_the_drain_is_ours_or_vllms_own(own: int | None, rest: list[str], drain_s: int) -> None:
    assert drain_of(argparse.Namespace(drain_s=own), rest) == drain_s


@pytest.mark.parametrize(
    ("own", "rest"), [(5, ["--shutdown-timeout", "9"]), (-1, []), (None, ["--shutdown-timeout=x"])]
)
def test_two_drains_or_none_that_makes_sense_are_refused(own: int | None, rest: list[str]) -> None:
    with pytest.raises(ConfigError, match="Nothing was started"):
        drain_of(argparse.Namespace(drain_s=own), rest)


def test_a_number_of_sequences_must_be_one() -> None:
    assert whole(["--max-num-seqs", "64"], "--max-num-seqs", least=1) == 64
    for text in ("0", "many", "-3"):
        with pytest.raises(ConfigError, match="whole number from 1"):
            whole(["--max-num-seqs", text], "--max-num-seqs", least=1)


def check(sections: dict[str, dict[str, Any]], sequences: int | None = 64, model: str = "test/model") -> None:
    config = load_config(None, sections)
    check_before_launch(config, BOARDS, model=model, served_as=model, launch_sequences=sequences, exact=True)


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ({"power_limit_w": 9000.0}, "outside 100..400 W"),
        ({"active_sequences": 65}, r"outside 1\.\.64"),
        ({"sm_clock_mhz": 9999}, "SM clock of 9999"),
        ({"policy": "pals-paper"}, "needs a profile"),
        ({"policy": "pals-paper", "profile": "/nonexistent.json"}, "cannot read the profile"),
    ],
)
def test_what_the_agent_would_refuse_is_refused_before_the_model_is_loaded(control: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        check({"control": control, "slo": {"throughput_tokens_s": 5.0}})
    assert str(refused.value).endswith("Nothing was started")
    assert "Nothing was written" not in str(refused.value)


def test_a_foreign_profile_and_a_journal_that_exists_are_refused_and_fitting_ones_pass(tmp_path: Path) -> None:
    made = replace(profile(), fingerprint=fingerprint_of(replace(engine_info(), model="test/model"), BOARDS))
    path = tmp_path / "p.json"
    path.write_text(made.to_json())
    sections: dict[str, dict[str, Any]] = {
        "control": {"policy": "pals-paper", "profile": str(path)},
        "slo": {"throughput_tokens_s": 5.0},
    }
    sequences = made.fingerprint.launch_sequences

    check(sections, sequences)
    check(sections, None)
    with pytest.raises(ConfigError, match=r"model: 'test/model' in the profile, 'b' here[\s\S]*Nothing was started"):
        check(sections, sequences, "b")
    with pytest.raises(ConfigError, match="launch_sequences"):
        check(sections, sequences + 1)
    journal = tmp_path / "j.jsonl"
    journal.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"j\.jsonl exists; choose another"):
        check({"output": {"journal": str(journal)}})
    assert journal.read_text() == "{}\n"
    check({"output": {"journal": "/dev/null"}})


def test_model_names_may_lack_or_have_dashes() -> None:
    assert full_name("GPT-2") == full_name("gpt2")
