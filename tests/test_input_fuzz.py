"""Profiles, configuration files and budgets over HTTP, whatever is in them: understood, or refused in a sentence."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.core.load import Load
from pals.models.profile import Profile
from pals.runtime.config import load_config
from tests.fuzz_input import TEXTS, any_bytes, near_json, near_toml
from tests.test_budget_endpoint import TOKEN, Desk

DATA = Path(__file__).parents[1] / "src/pals/experiments/data"
PROFILE = (DATA / "profile-qwen3-30b-a3b-h100-sxm5-80gb.json").read_text(encoding="utf-8")
FOLDER = tempfile.TemporaryDirectory(prefix="pals-fuzz-")


def a_profile_predicts_or_is_refused(data: bytes) -> None:
    try:
        p = Profile.from_json(data.decode("utf-8", "replace"))
    except ConfigError:
        return
    with np.errstate(all="ignore"):
        for mix in p.mixes:
            told = p.model().forecast([p.rows[0].point], Load(mix=mix))
            assert math.isfinite(told.power_w.value[0])
            assert math.isfinite(told.tokens_per_s.value[0])


# --- the configuration file ---

CONFIG = """\
[control]
policy = "pals-paper"
mode = "canary"
writer = "capd"
period_s = 0.5
profile = "a.json"
accept_mismatch = true
power_limit_w = 300
active_sequences = 32
sm_clock_mhz = 1200
lowering = "drain"
objective = "node"
canary_share = 0.1
canary_window_s = 30.0
canary_seed = 0
canary_baseline = "static"
[slo]
throughput_target = "1500"
ttft_p95_s = "1s"
ttft_p99_s = 3
tpot_p95_s = "50ms"
[budget]
power_w = "0:none,30:1kW,60:1600"
default = "800W"
port = 9501
host = "127.0.0.1"
token = "t"
[output]
journal = "j.jsonl"
metrics_port = 9477
dcgm_port = 0
[engine."a/b"]
policy = "static"
active_sequences = 8
throughput_target = "90%"
[engine.chat]
ttft_p95_s = "2s"
"""


def a_configuration_is_whole_or_refused(data: bytes) -> None:
    path = Path(FOLDER.name) / "pals.toml"
    path.write_bytes(data)
    try:
        config = load_config(path)
    except ConfigError:
        return
    for c in (config, *config.engines.values()):
        assert 0.05 <= c.control.period_s <= 60
        assert all(0 <= port <= 65535 for port in (c.output.metrics_port, c.output.dcgm_port, c.endpoint.port))
        for elapsed_s in (0.0, 1e9):
            watts = c.budget.at(elapsed_s).power_w
            assert watts is None or 0 < watts < 1e7


# --- budgets over HTTP ---

PUT = {"power_w": 1600, "ttl_s": 30}
BODIES = any_bytes(near_json([PUT, {"power": "1.6kW"}, {"power_w": 500.5}]))
PATHS = st.one_of(
    st.just("/v1/budget"),
    st.sampled_from(("/", "*", "//v1/budget", "/v1/budget/", "/v1/budget?x=1", "/v1/../v1/budget", "http://h/v1/budget", "/" * 70000)),
    st.text(st.characters(min_codepoint=33, max_codepoint=255), min_size=1, max_size=20),
)  # fmt: skip
HEADERS = st.lists(
    st.one_of(
        st.sampled_from((
            f"Authorization: Bearer {TOKEN}", "Authorization: Bearer x", "Content-Length: 5", "Content-Length: -1", "Content-Length: 1e3",
            "Transfer-Encoding: chunked", "Expect: 100-continue", "Connection: keep-alive", "X:" + "y" * 70000, "no colon", "",
        )),
        st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=30),
    ),
    max_size=3,
)  # fmt: skip
REQUESTS = st.tuples(
    st.sampled_from(("GET", "PUT", "PUT", "PUT", "DELETE")), PATHS, st.booleans(), HEADERS, BODIES, st.booleans()
)


class Asked:
    """One endpoint for all examples: what was refused must leave it as it was."""

    desk: Desk | None = None

    @classmethod
    def status(cls, sent: bytes) -> int:
        """The status of the answer; 0 where there is none, as for a request that never began."""
        assert cls.desk is not None
        answer = b""
        with closing(cls.desk.raw(b"")) as client:
            with suppress(OSError):  # it may be cut before all was sent
                client.sendall(sent)
                client.shutdown(1)
            with suppress(OSError):
                while more := client.recv(65536):
                    answer += more
        return int(answer.split(maxsplit=2)[1]) if answer.startswith(b"HTTP/") else 0


def a_request_is_answered_and_only_a_good_one_changes_the_budget(
    request: tuple[str, str, bool, list[str], bytes, bool],
) -> None:
    method, path, with_token, headers, body, length = request
    lines = [f"{method} {path} HTTP/1.1", *headers]
    lines += [f"Authorization: Bearer {TOKEN}"] if with_token else []
    lines += [f"Content-Length: {len(body)}"] if length else []
    before = _budget()
    status = Asked.status("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
    # a path with a blank, or a header with a line end, makes it another request, which http.server may not know (501, 505)
    assert status < 500 or status in (501, 505), f"{status}"
    if status == 200 and method == "PUT":
        assert _budget()[0] >= 408.0
    elif status != 200:
        assert _budget() == before


def any_bytes_are_no_request(sent: bytes) -> None:
    before = _budget()
    status = Asked.status(sent)
    assert status < 500 or status in (501, 505), f"{status}"
    assert _budget() == before


def _budget() -> tuple[Any, str, int]:
    assert Asked.desk is not None
    now = Asked.desk.budgets.in_force()
    return now.power_w, now.source, len(Asked.desk.said)


@pytest.fixture(scope="module")
def endpoint() -> Any:
    """For all examples."""
    desk = Asked.desk = Desk()
    yield desk
    desk.close()
    Asked.desk = None


# --- what was found so ---


@pytest.mark.parametrize(
    ("column", "value"), [("power_w", 10**400), ("running", 1 << 63), ("tpot_p95_s", 0), ("sm_clock_mhz", 0)]
)
def test_a_row_that_nothing_can_have_measured_is_refused(column: str, value: float) -> None:
    data = json.loads(PROFILE)
    data["rows"][0][data["columns"].index(column)] = value
    with pytest.raises(ConfigError, match="Nothing was loaded"):
        Profile.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("where", "value"), [(("facts", "shape", "layers"), 3), (("mixes", 1, "prompt_tokens"), 1e308)]
)
def test_a_profile_that_predicts_only_at_its_first_row_is_refused(where: tuple[Any, ...], value: float) -> None:
    data = holder = json.loads(PROFILE)
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = value
    with pytest.raises(ConfigError, match="prediction follows"):
        Profile.from_json(json.dumps(data))


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1" + "0" * 5000, "0x1" + "0" * 5000, "[" * 5000])
def test_a_setting_too_large_to_be_told_is_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "pals.toml"
    path.write_text(f"[control]\nperiod_s = {value}\n")
    with pytest.raises(ConfigError, match="Nothing was started"):
        load_config(path)


# --- how often ---

LINES = st.lists(
    st.one_of(TEXTS, st.just(f"Authorization: Bearer {TOKEN}"), st.just("PUT /v1/budget HTTP/1.0")), max_size=4
)
RAW = st.one_of(
    st.binary(max_size=300), LINES.map(lambda ls: "\r\n".join(ls).encode("utf-8", "surrogatepass") + b"\r\n\r\n")
)
PROMISES: Sequence[tuple[Callable[[Any], None], st.SearchStrategy[Any], int]] = (
    (a_profile_predicts_or_is_refused, any_bytes(near_json([json.loads(PROFILE)])), 150),
    (a_configuration_is_whole_or_refused, any_bytes(near_toml(CONFIG)), 300),
    (a_request_is_answered_and_only_a_good_one_changes_the_budget, REQUESTS, 150),
    (any_bytes_are_no_request, RAW, 100),
)


def name(part: Any) -> str:
    return getattr(part, "__name__", "")


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize(("promise", "inputs", "examples"), PROMISES, ids=name)
def test_whatever_comes(promise: Callable[[Any], None], inputs: st.SearchStrategy[Any], examples: int) -> None:
    settings(max_examples=examples, database=None)(given(inputs)(promise))()


@pytest.mark.slow
@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize(("promise", "inputs", "examples"), PROMISES, ids=name)
def test_whatever_comes_for_longer(
    promise: Callable[[Any], None], inputs: st.SearchStrategy[Any], examples: int
) -> None:
    settings(max_examples=20 * examples, database=None)(given(inputs)(promise))()
