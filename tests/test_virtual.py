"""Real vLLM in virtual time: the same run twice, ticks on the grid, budgets, leases, lost boards and sweeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pals.cli import main
from pals.core.load import Mix
from pals.core.quantities import OperatingPoint
from pals.engines.emulated_device import open_bank
from pals.engines.emulated_world import emulating
from pals.engines.model_zoo import local_folder
from pals.engines.openai_client import RequestResult, RequestSpec
from pals.experiments.outcome import energy_between_j
from pals.models.profile import Profile
from pals.plant.boards import BoardBank
from pals.plant.specs import parse_boards
from pals.runtime.config import Config, OutputConfig, load_config
from pals.runtime.journal import read_journal
from pals.runtime.loop import GridClock
from pals.runtime.tick import TickRecord

pytest.importorskip("vllm")
from pals.engines.virtual_engine import VirtualClosedLoop
from pals.experiments.virtual_run import LiveNode, VirtualNode, running, serve_trace

MODEL = "Qwen/Qwen3-30B-A3B"
LOAD = [RequestSpec(at_s=0.02 * i, prompt_tokens=200, output_tokens=300 + i % 7) for i in range(400)]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose context takes every prompt of the trace."""
    return local_folder(MODEL, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def twice(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """One seeded command run twice, in a process of its own and in this one: both folders, and what the first printed."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    command = ["emulate", "run", str(qwen), "--boards", "2xa100-sxm4-80gb", "--seconds", "10", "--time-scale", "0.3",
               "--budget-w", "0:800,2:300,4:800", "--max-num-seqs", "32", "--out"]  # fmt: skip
    first = subprocess.Popen(
        [sys.executable, "-m", "pals.cli", *command, str(one)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PALS_")},
    )  # fmt: skip
    codes = [main([*command, str(two)])]
    told = first.communicate(timeout=120)[0]
    assert [*codes, first.returncode] == [0, 0], told
    return one, two, told


def records_of(path: Path) -> list[TickRecord]:
    return list(read_journal(path)[1])


def test_a_seeded_run_gives_the_same_journal_twice(twice: tuple[Path, Path, str]) -> None:
    one, two, _ = twice

    assert (one / "static.jsonl").read_bytes() == (two / "static.jsonl").read_bytes()
    assert (one / "outcomes.json").read_bytes() == (two / "outcomes.json").read_bytes()
    header, records = read_journal(one / "static.jsonl")
    assert (header.clock, header.emulated, header.engine.pid) == ("virtual", True, 0)
    assert len(list(records)) > 10


def test_it_says_what_is_emulated_and_how_fast_it_was(twice: tuple[Path, Path, str]) -> None:
    told = twice[2]

    assert "EMULATED, virtual clock" in told
    assert "x real time" in told
    assert "tokens/J, node" in told


def test_ticks_lie_exactly_on_the_grid_and_replay_agrees(
    twice: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = twice[0] / "static.jsonl"
    records = records_of(path)

    assert [r.sample.time_s for r in records] == [0.5 * i for i in range(len(records))]
    assert main(["replay", str(path)]) == 0
    assert f"{len(records)} of {len(records)} decisions identical" in capsys.readouterr().out


def test_a_budget_step_is_obeyed_in_virtual_time(twice: tuple[Path, Path, str]) -> None:
    records = records_of(twice[0] / "static.jsonl")
    before, under = ([r for r in records if a <= r.sample.time_s <= b] for a, b in ((1.0, 2.0), (3.0, 4.0)))

    assert max(r.sample.power_w or 0.0 for r in before) > 300.0
    assert all(r.budget.power_w == 300.0 for r in under[:-1])
    assert all(sum(r.enforced_limits_w) <= 300.0 for r in under[:-1])
    mean_w = energy_between_j(under[0], under[-1]) / (under[-1].sample.time_s - under[0].sample.time_s)
    assert mean_w <= 300.0


@contextmanager
def node(olmoe: Path, *options: str) -> Iterator[LiveNode]:
    """Two A100s and a new engine, in this process."""
    spec, count = parse_boards("2xa100-sxm4-80gb")
    made = VirtualNode(
        model=olmoe, options=["-tp", "2", "--max-num-seqs", "32", *options], spec=spec, count=count, board_seed=3,
        folder=Path(os.environ["PALS_RUN_DIR"]),
    )  # fmt: skip
    with running(made) as live:
        yield live


def settings(journal: Path, **control: object) -> Config:
    return replace(load_config(None, {"control": control}), output=OutputConfig(journal=str(journal), metrics_port=0))


def test_the_journals_energy_is_the_plants_integral(olmoe: Path, tmp_path: Path) -> None:
    with node(olmoe) as live:
        integral_j: list[float] = []

        def look() -> None:
            integral_j.append(sum(live.bank.energy_integral_j(i, live.clock.now_s()) for i in range(2)))

        for at_s in (1.0, 6.0):
            live.clock.call_at(at_s, look)
        result = serve_trace(
            live, LOAD, settings(tmp_path / "j.jsonl"), name="static", seed=1, command="", stop=threading.Event(),
            say=lambda text: None,
        )  # fmt: skip
    assert result is not None
    assert result.outcome.failed == result.outcome.wrong_length == 0
    ticks = {r.sample.time_s: r for r in records_of(tmp_path / "j.jsonl")}
    counted_j = energy_between_j(ticks[1.0], ticks[6.0])
    # the boards publish their counters every 50 ms
    assert counted_j == pytest.approx(integral_j[1] - integral_j[0], abs=0.06 * 2 * 400.0)
    assert counted_j > 5.0 * 2 * 100.0


def test_a_schedule_of_faults_strikes_the_boards_when_it_says(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = tmp_path / "faults.csv"
    faults.write_text("time_s,kind,board,value\n1.2,external_limit,1,250\n2.2,lost,0,1\n3.2,lost,0,0\n")
    command = ["emulate", "run", str(qwen), "--boards", "2xa100-sxm4-80gb", "--seconds", "4", "--out", str(tmp_path)]

    assert main([*command, "--faults", str(faults)]) == 0
    records = {r.sample.time_s: r for r in records_of(tmp_path / "static.jsonl")}
    assert records[1.0].enforced_limits_w[1] > 250.0 >= records[1.5].enforced_limits_w[1]
    assert [records[t].sample.absent for t in (2.0, 2.5, 3.0, 3.5)] == [(), (0,), (0,), ()]

    faults.write_text("time_s,kind,board,value\n1,routing_drift,,0.5\n")
    capsys.readouterr()
    assert main([*command, "--faults", str(faults)]) == 2
    assert "only its boards can fail. Nothing was started" in capsys.readouterr().err
    faults.write_text("time_s,kind,board\n1,lost,2\n")
    assert main([*command, "--faults", str(faults)]) == 2
    assert "names board 2; there are 2" in capsys.readouterr().err


def test_a_lost_board_is_noted_and_the_engine_serves_on(olmoe: Path, tmp_path: Path) -> None:
    with node(olmoe) as live:
        live.clock.call_at(2.2, lambda: live.bank.inject(1, "lost", 1, live.clock.now_s()))
        live.clock.call_at(4.2, lambda: live.bank.inject(1, "lost", 0, live.clock.now_s()))
        result = serve_trace(
            live, LOAD, settings(tmp_path / "j.jsonl", power_limit_w=200.0), name="static", seed=1, command="",
            stop=threading.Event(), say=lambda text: None,
        )  # fmt: skip
    assert result is not None
    assert result.outcome.failed == 0
    records = records_of(tmp_path / "j.jsonl")
    assert [r.sample.time_s for r in records if len(r.sample.boards) < 2] == [2.5, 3.0, 3.5, 4.0]
    assert all("lost" in r.notes[0] for r in records if r.sample.absent)
    assert {r.sample.absent for r in records} == {(), (1,)}
    assert records[-1].enforced_limits_w == (200.0, 200.0)


def test_requests_beyond_the_bound_are_refused_in_virtual_time_too(olmoe: Path) -> None:
    results: list[RequestResult] = []
    with node(olmoe) as live:
        live.channel.apply(4, lease_s=60.0, most_waiting=3)
        for spec in LOAD[:20]:
            live.engine.send(spec, [100] * spec.prompt_tokens, results.append)
        live.engine.serve(until_s=50.0, done=lambda: len(results) == 20)
        seen = live.channel.read()
        live.channel.release()
        live.engine.send(LOAD[0], [100] * 8, results.append)
        live.engine.serve(until_s=60.0, done=lambda: len(results) == 21)

    assert [r.refused for r in results] == [True] * 13 + [False] * 8
    assert [r.error for r in results[13:]] == [None] * 8
    assert (seen.arrived_requests, seen.refused_requests) == (7, 13)


def test_a_setpoint_expires_in_virtual_time_and_nothing_is_lost(olmoe: Path) -> None:
    results: list[RequestResult] = []
    with node(olmoe) as live:
        for spec in LOAD[:60]:
            live.engine.send(spec, [100] * spec.prompt_tokens, results.append)
        live.channel.apply(4, lease_s=1.5)
        seen = []
        for until_s in (1.4, 2.0):
            live.engine.serve(until_s=until_s, done=lambda: False)
            seen.append(live.channel.read())
        live.engine.serve(until_s=60.0, done=lambda: len(results) == 60)

    assert [s.active_limit for s in seen] == [4, 32]
    assert [s.running for s in seen] == [4, 32]
    assert [r.error for r in results] == [None] * 60
    assert sorted(r.output_tokens for r in results) == sorted(s.output_tokens for s in LOAD[:60])


def test_an_idle_engine_takes_no_steps_and_its_clock_jumps(olmoe: Path) -> None:
    with node(olmoe) as live:
        grid: GridClock = live.grid_clock(threading.Event())
        results: list[RequestResult] = []

        def arrive() -> None:
            live.engine.send(RequestSpec(at_s=0, prompt_tokens=5, output_tokens=2), [9] * 5, results.append)

        live.clock.call_at(3600.0, arrive)
        assert not grid.wait(3599.0)
        assert live.channel.read().steps == 0
        assert not grid.wait(10.0)
        first_limit_w = live.nvml.boards[0].apply(OperatingPoint(power_limit_w=250.0)).power_limit_w

    assert grid.now_s() == 3609.0
    assert results[0].sent_s == 3600.0
    assert 0.0 < (results[0].ttft_s or 0.0) < 0.1
    assert first_limit_w == 250.0


def test_a_sweep_in_virtual_time_makes_a_profile_that_a_policy_takes(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = [str(qwen), "--boards", "2xa100-sxm4-80gb", "--max-num-seqs", "32"]
    profile, out = tmp_path / "p.json", tmp_path / "out"

    swept = main(
        ["emulate", "profile", *target, "--out", str(profile), "--limits-w", "400,200", "--sequences", "4,16,32",
         "--clocks", "none", "--window-s", "3", "--points", "8"]
    )  # fmt: skip

    assert swept == 0
    made = Profile.from_json(profile.read_text())
    rows = {(r.power_limit_w, r.active_sequences): r for r in made.rows if r.mix == 0}
    assert len(made.rows) == 8
    assert rows[400.0, 32].tokens_per_s > rows[400.0, 4].tokens_per_s
    assert rows[200.0, 32].power_w <= 2 * 200.0 * 1.01
    assert made.facts.shape is not None
    assert not list(tmp_path.glob("*.partial.jsonl"))
    assert "left out" in capsys.readouterr().out

    served = main(
        ["emulate", "run", *target, "--out", str(out), "--policy", "static,pals-paper", "--profile", str(profile),
         "--seconds", "5", "--target-tokens-s", "800"]
    )  # fmt: skip

    assert served == 0
    both = json.loads((out / "outcomes.json").read_text())
    assert [o["name"] for o in both] == ["static", "pals-paper"]
    assert both[0]["requests"] == both[1]["requests"]
    assert "pals-paper" in capsys.readouterr().out


def test_a_closed_loop_keeps_its_load_and_times_it_in_virtual_time(olmoe: Path) -> None:
    chat = Mix(name="chat", prompt_tokens=200, output_tokens=50)
    with node(olmoe) as live:
        load, grid = VirtualClosedLoop(live.engine, seed=1), live.grid_clock(threading.Event())
        load.set_load(chat, 12)
        assert not grid.wait(5.0)
        sample = live.channel.read()
        seen = load.latencies(2.0)
        assert (
            9 <= sample.running + sample.waiting <= 12
        )  # those that ended with the last step are about to be followed
        assert (seen.failed, load.last_error) == (0, None)
        assert len(seen.tpot_s) > 12
        assert 0.0 < min(seen.ttft_s) <= max(seen.ttft_s) < 5.0
        fewer = load.latencies(4.0)
        assert 0 < len(fewer.tpot_s) < len(seen.tpot_s)

        load.set_load(chat, 600)  # far more than the engine runs at a time: they wait
        assert not grid.wait(1.0)
        assert live.channel.read().waiting > 400
        load.set_load(Mix(name="short", prompt_tokens=20, output_tokens=4), 12)
        assert not grid.wait(5.0)
        assert live.channel.read().waiting + live.channel.read().running <= 12  # nobody works off the old queue
        assert len(load.latencies(0.0).ttft_s) > 50

        load.set_load(Mix(name="too-long", prompt_tokens=2 * live.engine.context_tokens, output_tokens=50), 12)
        assert not grid.wait(30.0)
        refused = load.latencies(0.0).failed
        assert 12 <= refused < 12 * 30  # each that is refused makes the next ones wait
        assert load.last_error is not None

        load.set_load(chat, 4)
        assert not grid.wait(5.0)
        assert live.channel.read().running in (3, 4)


def test_what_means_nothing_in_virtual_time_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = ["emulate", "run", MODEL, "--boards", "h100-sxm5-80gb", "--out", str(tmp_path)]

    assert main([*run, "--metrics-port", "9477"]) == 2
    assert main([*run, "--journal", "x.jsonl"]) == 2
    assert main([*run, "--time-scale", "0"]) == 2
    assert main([*run, "--policy", "static,pals-papr"]) == 2
    assert main(["emulate", "run", "Mixtral-9x7B", "--boards", "h100-sxm5-80gb"]) == 2
    told = capsys.readouterr().err
    assert told.count("Nothing was started") == 5
    assert list(tmp_path.iterdir()) == []


def test_the_platform_answers_for_the_boards_named_now(tmp_path: Path) -> None:
    """vLLM picks its defaults by the board's name: an earlier engine of this process must not decide them."""
    names = []
    for boards in ("h100-sxm5-80gb", "2xa100-sxm4-80gb"):
        bank = tmp_path / f"{boards}.bank"
        BoardBank.create(bank, *parse_boards(boards)).close()
        with emulating("any", tmp_path, bank):
            names.append(open_bank().spec.name)
    assert names == ["h100-sxm5-80gb", "a100-sxm4-80gb"]
