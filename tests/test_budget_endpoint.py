"""Budgets over HTTP, on loopback: only with the token, only what boards can keep, and no client holds anything up."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.runtime.budgets import parse_budget
from pals.runtime.files import read_token
from pals.runtime.live_budget import LiveBudget
from pals.views.budget_endpoint import MOST_CONNECTIONS, Refused, serve_budget, wanted
from tests.loopback import free_port
from tests.worlds import Clock

TOKEN = "0123456789abcdef0123456789abcdef"


class Desk:
    """An endpoint over a budget whose clock the test owns."""

    def __init__(self, *, connection_s: float = 5.0) -> None:
        self.clock, self.said, self.port = Clock(), list[str](), free_port()
        self.budgets = LiveBudget(parse_budget("0:2400"), now_s=self.clock.now_s, say=self.said.append)
        self.budgets.least_w = 408.0
        self.budgets.at(0.0)
        self.close = serve_budget(
            self.budgets, host="127.0.0.1", port=self.port, token=TOKEN, connection_s=connection_s
        )

    def ask(
        self, method: str, body: Any = None, *, token: str | None = TOKEN, path: str = "/v1/budget"
    ) -> tuple[int, dict[str, Any]]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            connection.request(method, path, raw, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def raw(self, sent: bytes) -> socket.socket:
        """A connection on which this was sent."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        client.sendall(sent)
        return client


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


def test_a_budget_is_put_read_withdrawn_and_told(desk: Desk) -> None:
    assert desk.ask("GET")[1] == {
        "power_w": 2400.0, "source": "schedule", "by": None, "remaining_s": None, "least_w": 408.0,
    }  # fmt: skip
    status, now = desk.ask("PUT", {"power": "1.6kW", "ttl_s": 30})
    assert (status, now["power_w"], now["source"], now["remaining_s"]) == (200, 1600.0, "put", 30.0)
    assert now["by"].startswith("127.0.0.1:")
    desk.clock.now += 10
    assert desk.budgets.at(10.0).power_w == 1600.0
    assert desk.ask("GET")[1]["remaining_s"] == 20.0
    assert desk.ask("DELETE")[1]["source"] == "schedule"
    assert desk.ask("DELETE")[0] == 200, "nothing to withdraw is no error: what was asked for holds"
    assert desk.budgets.at(10.5).power_w == 2400.0

    assert len(desk.said) == 2
    assert f"budget of 1600 W put by {now['by']} for 30 s" in desk.said[0]
    assert "before: 2400 W (schedule)" in desk.said[0]
    assert "withdrawn by 127.0.0.1:" in desk.said[1]


def test_without_a_ttl_a_budget_lives_a_minute(desk: Desk) -> None:
    assert desk.ask("PUT", {"power_w": 1600})[1]["remaining_s"] == 60.0
    desk.clock.now += 59.5
    assert desk.budgets.at(59.5).power_w == 1600.0
    desk.clock.now += 0.5
    assert desk.budgets.at(60.0).power_w == 2400.0
    assert "has expired; now in force: 2400 W (schedule)" in desk.said[-1]


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "0", "ÿ"])
def test_without_the_token_nothing_is_told_or_changed(desk: Desk, token: str | None) -> None:
    for method in ("GET", "PUT", "DELETE"):
        status, told = desk.ask(method, {"power_w": 1600}, token=token)
        assert (status, list(told)) == (401, ["error"])
    assert desk.ask("GET", path="/", token=token)[0] == 401
    assert desk.budgets.in_force().power_w == 2400.0
    assert desk.said == []


def test_another_scheme_is_not_the_token(desk: Desk) -> None:
    with desk.raw(f"GET /v1/budget HTTP/1.1\r\nAuthorization: Basic {TOKEN}\r\n\r\n".encode()) as client:
        assert b" 401 " in client.recv(1000)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 4096, "not JSON"),
        (b'{"power_w": NaN}', "NaN is no JSON"),
        (b'{"power_w": Infinity}', "Infinity is no JSON"),
        (b'{"power_w": 1600, "power_w": 1700}', "a key is given twice"),
        (b'{"power_w": 1e999}', "expected a power above 0"),
        (b'{"power_w": 1' + b"0" * 400 + b"}", "expected a power above 0"),
        ([1600], "must be an object"),
        ({}, "give either"),
        ({"power_w": 1600, "power": "1.6kW"}, "give either"),
        ({"power_w": -1600}, "expected a power above 0"),
        ({"power_w": 0}, "expected a power above 0"),
        ({"power_w": True}, "expected a power above 0"),
        ({"power_w": "1600"}, "must be a number"),
        ({"power_w": None}, "must be a number"),
        ({"power": 1600}, "must be a text"),
        ({"power": "1.6KW"}, "like 2.4kW"),
        ({"power_w": 1600, "ttl": 5}, "unknown key 'ttl'"),
        ({"power_w": 1600, "ttl_s": 0}, "expected a time above 0"),
        ({"power_w": 1600, "ttl_s": None}, "expected a time above 0"),
        ({"power_w": 1600, "ttl_s": "1s"}, "must be a number of seconds"),
        ({"power_w": 1600, "ttl_s": 86401}, "at most 86400"),
    ],
)
def test_a_bad_body_is_400_with_a_sentence_and_changes_nothing(desk: Desk, body: Any, told: str) -> None:
    status, answer = desk.ask("PUT", body)

    assert status == 400
    assert told in answer["error"]
    assert answer["error"].endswith("nothing was changed")
    assert desk.budgets.in_force().source == "schedule"
    assert desk.said == []


@given(st.binary(max_size=200) | st.dictionaries(st.sampled_from(["power_w", "power", "ttl_s", "x"]), st.floats() | st.text() | st.integers()).map(lambda d: json.dumps(d).encode()))  # fmt: skip
def test_any_body_is_a_budget_or_refused(body: bytes) -> None:
    try:
        power_w, ttl_s = wanted(body)
    except Refused as e:
        told = str(e)
        assert told.endswith("nothing was changed")
    else:
        assert 0 < power_w < 1e7
        assert 0 < ttl_s <= 86400


def test_what_the_boards_cannot_keep_is_409_and_the_one_before_stays(desk: Desk) -> None:
    desk.ask("PUT", {"power_w": 1600})
    status, told = desk.ask("PUT", {"power_w": 407.9})

    assert status == 409
    assert "408 W is the lowest budget that can be promised" in told["error"]
    assert desk.ask("GET")[1]["power_w"] == 1600.0
    assert desk.ask("PUT", {"power_w": 408})[0] == 200


def test_before_and_after_steering_nothing_is_promised(desk: Desk) -> None:
    desk.budgets.least_w = None
    status, told = desk.ask("PUT", {"power_w": 1600})

    assert status == 503
    assert "no engine is steered now" in told["error"]


def test_other_paths_and_methods_are_refused_in_json(desk: Desk) -> None:
    assert desk.ask("GET", path="/v1/budgets")[0] == 404
    status, told = desk.ask("POST", {"power_w": 1600})
    assert (status, list(told)) == (501, ["error"])


def test_a_large_body_is_refused_and_the_client_hears_why(desk: Desk) -> None:
    status, told = desk.ask("PUT", b" " * 20_000_000)

    assert status == 413
    assert "4096 bytes" in told["error"]
    assert desk.ask("PUT", b" " * 4097)[0] == 413
    assert desk.ask("PUT", json.dumps({"power_w": 1600}).encode().ljust(4096))[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Transfer-Encoding: chunked", b" 411 "),
        ("X: y", b" 411 "),
        ("Content-Length: -1", b" 411 "),
        ("Content-Length: ²", b" 411 "),
        ("Content-Length: 99999999999999999999", b" 413 "),
    ],
)
def test_a_body_of_unknown_length_is_refused(desk: Desk, headers: str, status: bytes) -> None:
    with desk.raw(f"PUT /v1/budget HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n{headers}\r\n\r\n".encode()) as client:
        assert status in client.recv(1000)


@pytest.mark.parametrize(
    "sent", [b"", b"PUT /v1", b"nonsense\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/9\r\n\r\n"]
)
def test_clients_that_leave_early_or_speak_something_else_change_nothing(desk: Desk, sent: bytes) -> None:
    desk.raw(sent).close()

    assert desk.ask("GET")[0] == 200


HALF = f"PUT /v1/budget HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 30\r\n\r\n".encode()


def test_clients_that_never_end_or_read_are_few_and_hold_no_tick_up() -> None:
    desk = Desk(connection_s=60.0)
    with ExitStack() as exits:
        exits.callback(desk.close)
        for _ in range(MOST_CONNECTIONS):
            exits.enter_context(desk.raw(HALF))
        with desk.raw(b"") as one_more:
            assert b" 503 " in one_more.recv(1000)
        assert desk.budgets.at(0.5).power_w == 2400.0


def test_a_client_that_takes_too_long_is_cut_and_there_is_room_again() -> None:
    desk = Desk(connection_s=0.1)
    with ExitStack() as exits:
        exits.callback(desk.close)
        slow = [exits.enter_context(desk.raw(HALF)) for _ in range(MOST_CONNECTIONS)]
        for client in slow:
            with contextlib.suppress(ConnectionError):
                while client.recv(1000):  # until the server cuts it
                    pass
        assert any(answers(desk) for _ in range(1000))
    assert desk.budgets.in_force().source == "schedule"


def answers(desk: Desk) -> bool:
    """Whether a request is taken on."""
    with desk.raw(f"GET /v1/budget HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()) as client:
        with contextlib.suppress(ConnectionError):
            return b" 200 " in client.recv(1000)
        return False


def test_closing_cuts_what_is_open() -> None:
    desk = Desk(connection_s=60.0)
    with desk.raw(b"GET /v1/bud") as client:
        desk.ask("GET")  # connections are taken on in order: the first is in
        desk.close()
        assert client.recv(1000) == b""
    with pytest.raises(OSError, match="refused"):
        desk.ask("GET")


def test_a_port_in_use_is_named(desk: Desk) -> None:
    with pytest.raises(ConfigError, match=rf"budget port {desk.port} on 127.0.0.1.*--budget-port"):
        serve_budget(desk.budgets, host="127.0.0.1", port=desk.port, token=TOKEN)


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        (TOKEN, 0o640, r"open to other users \(mode 640\): chmod 600"),
        (TOKEN, 0o604, "open to other users"),
        (TOKEN, 0o620, "open to other users"),
        ("", 0o600, "one token of 16 to 512"),
        ("short", 0o600, "one token of 16 to 512"),
        (f"{TOKEN} {TOKEN}", 0o600, "one token of 16 to 512"),
        ("0" * 600, 0o600, "one token of 16 to 512"),
        ("é" * 20, 0o600, "no plain ASCII"),
    ],
)
def test_a_token_that_others_may_read_or_guess_is_refused(text: str, mode: int, told: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=told):
        read_token(path)


def test_a_token_is_read_without_the_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(TOKEN + "\n")

    assert read_token(path) == TOKEN
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="must hold one token"):
        read_token(tmp_path / "pipe")
