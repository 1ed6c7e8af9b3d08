"""A server's end: signals in turn, a drain that is waited for, and what was cut is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pals.cli.agent import stopping
from pals.cli.server_life import Server, Signals, unfinished_in
from pals.runtime.channel import EngineChannel, find_engines
from pals.runtime.group import EngineGroup
from tests.node_world import busy
from tests.worlds import engine_info

ENDS_AT_SIGTERM = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print(flush=True); signal.pause()"
IGNORES_SIGTERM = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True)\nwhile True: signal.pause()"


def child(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


@pytest.mark.usefixtures("hangups_arrive")
def test_a_closed_terminal_stops_in_order_too(capsys: pytest.CaptureFixture[str]) -> None:
    signals = Signals()
    with stopping(signals.ended, also=signals.arrived):
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.ended.wait(5)
    assert "SIGHUP: stopping in order" in capsys.readouterr().err


@pytest.mark.usefixtures("hangups_arrive")
def test_a_hangup_that_was_ignored_from_the_start_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a process
    signals = Signals()
    with stopping(signals.ended, also=signals.arrived):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.ended.wait(0.05)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_second_signal_waits_and_the_third_drops(capsys: pytest.CaptureFixture[str]) -> None:
    signals = Signals()
    signals.unfinished = lambda: 3

    signals.arrived()
    assert capsys.readouterr().err == ""
    signals.arrived()
    assert "goes on in order (3 requests); once more drops them" in capsys.readouterr().err
    assert not signals.dropped.is_set()
    signals.arrived()
    signals.arrived()
    assert capsys.readouterr().err.count("3 requests are dropped") == 1
    assert signals.dropped.is_set()


def test_before_the_server_is_up_there_is_nothing_to_count(capsys: pytest.CaptureFixture[str]) -> None:
    signals = Signals()
    for _ in range(3):
        signals.arrived()
    told = capsys.readouterr().err
    assert "once more ends it at once" in told
    assert "stopping at once\n" in told


def test_a_drain_that_ends_in_time_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    signals = Signals()
    signals.unfinished = lambda: 0
    server = Server(child(ENDS_AT_SIGTERM), signals, 20)

    server.shut_down()

    assert (server.cut, server.process.returncode) == (0, 0)
    assert "cut off" not in capsys.readouterr().err


def test_what_a_third_signal_drops_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    signals = Signals()
    signals.unfinished = lambda: 2
    signals.dropped.set()
    server = Server(child(IGNORES_SIGTERM), signals, 600)

    server.shut_down()

    assert (server.cut, server.process.returncode) == (2, -signal.SIGKILL)
    assert "2 requests accepted and not fully answered: dropped" in capsys.readouterr().err


def test_a_server_that_ended_by_itself_is_watched() -> None:
    signals = Signals()
    server = Server(child("print(flush=True)"), signals, 1)

    gone = server.watch()

    assert signals.ended.wait(20)
    assert gone.is_set()


def test_unfinished_requests_are_known_after_the_engines_end(tmp_path: Path) -> None:
    engine = EngineChannel(tmp_path, engine_info(os.getpid()), name="vllm-test")
    busy(engine, running=4)
    group = EngineGroup(find_engines(tmp_path))
    engine.close()

    assert unfinished_in(group) == 4
