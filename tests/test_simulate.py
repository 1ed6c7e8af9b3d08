"""`pals simulate`: the live controller over a simulated replica; files, determinism, stopping early, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pals.cli import main
from pals.cli.main import parser
from pals.cli.simulate import simulation_of, tasks_of
from pals.core.errors import ConfigError, PalsError
from pals.experiments.plant_checks.measured import data_folder
from pals.experiments.simulated_load import LoadWish, workload_of
from pals.experiments.simulated_policies import run_policies
from pals.experiments.simulated_run import PolicyTask, Simulation, capacity_per_s
from pals.plant.specs import board_specs, usual_step_tokens
from pals.plant.workload import lengths_of
from pals.runtime.budgets import parse_budget

pytest.importorskip("numba")
pq = pytest.importorskip("pyarrow.parquet")

NODE = ["--model", "mixtral-8x7b", "--boards", "4xa100-sxm4-80gb"]
RUN = ["simulate", *NODE, "--hours", "0.05", "--policy", "static", "--policy", "pals-paper"]
STEPS = "0:1600,60:700,120:1600"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three minutes under two policies, a budget that steps down and up, with journals."""
    folder = tmp_path_factory.mktemp("simulated")
    assert main([*RUN, "--budget", STEPS, "--journal", "--out", str(folder)]) == 0
    return folder


def ticks_of(folder: Path, policy: str) -> dict[str, Any]:
    table = pq.read_table(folder / "ticks.parquet").to_pydict()
    rows = [i for i, p in enumerate(table["policy"]) if p == policy]
    return {
        k: np.array([v[i] for i in rows], object if k in ("policy", "reason", "notes") else float)
        for k, v in table.items()
    }


def made(*argv: str, folder: Path) -> tuple[Simulation, list[PolicyTask]]:
    """What the command line makes of these arguments."""
    args, _ = parser().parse_known_args([*RUN, *argv, "--out", str(folder)])
    args.given = []
    sim = simulation_of(args)
    return sim, tasks_of(args, sim)


def test_every_request_of_every_policy_is_in_the_file_with_its_times(out: Path) -> None:
    table = pq.read_table(out / "requests.parquet")
    r = table.to_pydict()
    n = table.num_rows // 2

    assert r["policy"] == ["static"] * n + ["pals-paper"] * n
    for key in ("request", "arrival_s", "prompt_tokens", "output_tokens"):
        assert r[key][:n] == r[key][n:]  # identical arrivals
    first, last, ttft, tpot = (np.array(r[k], float) for k in ("first_token_s", "last_token_s", "ttft_s", "tpot_s"))
    arrival, tokens = np.array(r["arrival_s"]), np.array(r["output_tokens"])
    assert np.allclose(first - arrival, ttft)
    assert np.allclose((last - first)[tokens > 1], (tpot * (tokens - 1))[tokens > 1])
    assert np.all(ttft > 0)


def test_the_ticks_agree_with_the_outcome_and_with_each_other(out: Path) -> None:
    outcomes = {o["name"]: o for o in json.loads((out / "outcomes.json").read_text())}
    for policy in ("static", "pals-paper"):
        t, o = ticks_of(out, policy), outcomes[policy]
        assert t["time_s"].tolist() == [0.5 * i for i in range(len(t["time_s"]))]
        counted_j = np.nansum(t["power_w"]) * 0.5
        assert counted_j == pytest.approx(t["energy_j"][-1], rel=0.01)
        assert o["gpu_energy_j"] == pytest.approx(t["energy_j"][-1], rel=0.03)
        assert o["output_tokens"] == t["output_tokens"].sum()
        assert o["basis"] == "simulated"
        assert o["requests"] > 500
        assert o["failed"] == 0


def test_a_budget_holds_for_every_policy(out: Path) -> None:
    for policy in ("static", "pals-paper"):
        t = ticks_of(out, policy)
        low = (t["time_s"] >= 60.0) & (t["time_s"] < 120.0)
        assert np.all(t["limit_w"] <= t["budget_w"])
        assert set(t["budget_w"][low]) == {700.0}
        assert np.nanmean(t["power_w"][low][2:]) <= 700.0
    assert np.nanmax(ticks_of(out, "static")["power_w"]) > 900.0


def test_a_journal_of_a_simulation_replays(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(out / "pals-paper.jsonl")]) == 0
    assert "decisions identical" in capsys.readouterr().out


def test_files_say_how_they_came_about(out: Path) -> None:
    for name in ("requests", "ticks"):
        told = {k.decode(): v.decode() for k, v in pq.read_schema(out / f"{name}.parquet").metadata.items()}
        assert told["pals.basis"] == "simulated"
        assert told["pals.seed"] == "0"
        assert "--policy static,pals-paper" in told["pals.command"]
        assert "--out" not in told["pals.command"]
        assert {"pals", "numpy", "numba", "pyarrow"} == set(json.loads(told["pals.versions"]))
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob(".*"))


def test_one_seed_gives_the_same_bytes_whatever_the_workers(out: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main([*RUN, "--budget", STEPS, "--journal", "--out", str(again), "--workers", "2"]) == 0

    for name in ("requests.parquet", "ticks.parquet", "outcomes.json", "static.jsonl", "pals-paper.jsonl"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name


def test_the_table_marks_every_column_as_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["simulate", *NODE, "--hours", "0.02", "--limit-w", "200", "--clock-mhz", "1200", "--active-sequences", "32",
           "--rate", "6", "--scaling", "thin", "--arrivals", "gamma:2", "--out", str(tmp_path)]  # fmt: skip
    assert main(run) == 0
    told, t = capsys.readouterr(), ticks_of(tmp_path, "static")

    assert "static (simulated)" in told.out
    assert "the plant's" in told.out
    assert "x real time" in told.out
    assert "SIMULATED: mistralai/Mixtral-8x7B-v0.1 on 4 ×" in told.err
    assert "Gamma CV 2" in told.err
    assert set(t["limit_w"][1:]) == {800.0}
    assert max(t["sm_clock_mhz"][2:]) <= 1200.0
    assert max(t["active_limit"][1:]) == 32


def test_advise_decides_and_writes_nothing(tmp_path: Path) -> None:
    run = ["simulate", *NODE, "--hours", "0.01", "--policy", "pals-paper", "--mode", "advise", "--out", str(tmp_path)]
    assert main(run) == 0
    t = ticks_of(tmp_path, "pals-paper")

    assert set(t["limit_w"]) == {1600.0}
    assert set(t["active_limit"]) == {64.0}
    assert "inputs-changed" in t["reason"]


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_early_there_is_what_was_done_so_far(workers: int, tmp_path: Path) -> None:
    sim, tasks = made("--hours", "50", folder=tmp_path)
    stop = threading.Event()

    def report(i: int, event_s: float) -> None:
        if event_s > 100.0:
            stop.set()

    results = run_policies(sim, tasks, workers=workers, stop=stop, report=report)

    assert [r.task.name for r in results] == [t.name for t in tasks[:workers]]
    for r in results:
        assert not r.complete
        assert 0 <= r.event_s < 50 * 3600.0
        assert len(r.answers.sent_s) < len(sim.workload)
        assert np.all(r.answers.sent_s <= r.event_s)
        assert r.outcome is None or r.outcome.requests == len(r.answers.sent_s)
        assert pq.read_table(r.task.ticks).num_rows == round(r.event_s / 0.5) + 1


def test_ctrl_c_writes_partial_files_says_so_and_ends_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pals.cli", *RUN, "--hours", "200", "--out", str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    part, until_s = tmp_path / ".ticks-0.parquet", time.monotonic() + 60
    while (not part.exists() or part.stat().st_size < 1000) and process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=60)

    assert process.returncode == 130, errors
    assert "static (simulated, stopped at" in told
    assert f"stopped early: what there is so far was written to {tmp_path}; not finished: static, pals-paper" in errors
    ticks = pq.read_table(tmp_path / "ticks.parquet")
    assert ticks.num_rows >= 7200
    assert ticks.schema.metadata[b"pals.complete"] == b"false"
    assert set(pq.read_table(tmp_path / "requests.parquet", columns=["policy"])["policy"].to_pylist()) == {"static"}


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path: Path) -> None:
    sim, tasks = made("--hours", "50", folder=tmp_path)

    def report(i: int, event_s: float) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(PalsError, match=r"worker process ended early .*killed"):
        run_policies(sim, tasks, workers=2, stop=threading.Event(), report=report)


def refusals(folder: Path) -> Sequence[tuple[list[str], str]]:
    static = Path("src/pals/experiments/data/profile-qwen3-30b-a3b-h100-sxm5-80gb.json").resolve()
    wrong, far = folder / "wrong.csv", folder / "far.csv"
    wrong.write_text("time_s,kind\n1,hot_water\n")
    far.write_text("time_s,kind,board\n1,lost,9\n")
    return [
        (["--policy", "static"], "--policy static is given twice"),
        (["--policy", "magic"], "unknown policy 'magic'"),
        (["--trace", "azure-2025"], "no trace 'azure-2025'"),
        (["--trace", "vidur-arxiv"], "lengths without arrival times"),
        (["--trace", "servegen-m-tiny"], "there is no file"),
        (["--trace-format", "excel"], "unknown format 'excel'"),
        (["--hours", "0"], "--hours 0 must be above 0"),
        (["--start-s", "-1"], "--start-s -1 must be 0 or more"),
        (["--start-s", "99999"], "no request arrives"),
        (["--rate", "3", "--load", "0.5"], "give one"),
        (["--arrivals", "poisson"], "generated arrivals need a rate"),
        (["--arrivals", "gamma"], "known are trace, poisson and gamma:CV"),
        (["--arrivals", "poisson:2", "--rate", "1"], "known are trace, poisson and gamma:CV"),
        (["--scaling", "magic"], "--scaling magic: known are time, thin"),
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--budget", "12:x"], "expected watts, steps"),
        (["--budget", str(folder / "none.csv")], "cannot read the budget"),
        (["--limit-w", "900"], "power limit 900 W lies outside 100..400 W"),
        (["--max-num-seqs", "32"], "launch_sequences: 64 in the profile, 32 here"),
        (["--max-num-seqs", "0"], "at least 1"),
        (["--max-model-len", "1"], "leaves no room"),
        (["--max-model-len", "3"], "every request is longer than 3 tokens"),
        (["--boards", "2xa100-sxm4-80gb"], "weights need|needs a profile, and none comes with PALS"),
        (["--profile", str(static)], "was measured on something else"),
        (["--model", "deepseek-v3"], "weights need"),
        (["--model", str(folder)], "config.json"),
        (["--spread", "0.1"], "--spread needs --perturb-seed"),
        (["--perturb-seed", "1", "--spread", "0.9"], "must lie in 0..0.5"),
        (["--faults", str(folder / "none.csv")], "cannot read the faults"),
        (["--faults", str(wrong)], "row 2: unknown kind 'hot_water'; did you mean 'hot_air'?"),
        (["--faults", str(far)], "names board 9; there are 4"),
    ]


@pytest.mark.parametrize("i", range(31))
def test_what_cannot_be_simulated_is_one_clear_message(
    i: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, told = refusals(tmp_path)[i]

    assert main([*RUN, *wrong, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.split("pals: ")[-1]
    assert any(part in error for part in told.split("|")), error
    assert not (tmp_path / "out").exists()


def test_a_load_is_a_share_of_what_the_engine_answers(tmp_path: Path) -> None:
    sim, _ = made(folder=tmp_path)
    lengths = lengths_of(sim.workload)
    full = capacity_per_s(sim, lengths, np.random.default_rng(1))
    wish = LoadWish(trace="azure-2023-conv", folder=data_folder() / "traces", load=0.5, hours=0.3)
    half = workload_of(wish, lambda lengths, rng: full)

    assert full == pytest.approx(capacity_per_s(sim, lengths, np.random.default_rng(2)), rel=0.2)
    assert half.rate_per_s == pytest.approx(0.5 * full, rel=0.2)


@pytest.mark.parametrize(("trace", "more"), [
    ("mooncake-synthetic", {}), ("servegen-m-large", {"rate_per_s": 3.0, "start_s": 86400.0, "hours": 0.1}),
    ("azure-2023-code", {"lengths": "vidur-arxiv"}), ("vidur-arxiv", {"cv": 1.0, "rate_per_s": 2.0}),
])  # fmt: skip
def test_committed_traces_make_loads_and_a_seed_makes_them_again(trace: str, more: dict[str, Any]) -> None:
    def load(seed: int) -> Any:
        return workload_of(LoadWish(trace=trace, folder=data_folder() / "traces", seed=seed, **more), lambda a, b: 1.0)

    one, two, other = load(1), load(1), load(2)
    assert np.array_equal(one.arrival_s, two.arrival_s)
    assert np.array_equal(one.output_tokens, two.output_tokens)
    if more:
        assert not (
            np.array_equal(one.arrival_s, other.arrival_s) and np.array_equal(one.output_tokens, other.output_tokens)
        )


def test_a_budget_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "budget.csv"
    path.write_text("time_s,power_w\n0,none\n30,1000\n60,1600.5\n")

    assert parse_budget(str(path)) == parse_budget("0:none,30:1000,60:1600.5")
    for wrong in ("time_s,power_w\n30,1000\n10,900\n", "time_s,power_w\n", "t,w\n0,1\n", "time_s,power_w\n0,1,2\n"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="budget"):
            parse_budget(str(path))


def test_steps_are_as_large_as_vllms_server_makes_them() -> None:
    specs = board_specs()
    assert usual_step_tokens(specs["a100-sxm4-80gb"], 64) == 2048
    assert usual_step_tokens(specs["h100-sxm5-80gb"], 64) == 8192
    assert usual_step_tokens(specs["b200-sxm-180gb"], 64) == 16384
    assert usual_step_tokens(specs["l4"], 4096) == 4096


FAULTS = """time_s,kind,board,value
20.25,external_limit,1,120
60,external_limit,1,0
70,lost,2,1
80,lost,2,0
90,stuck_meter,0,1
95,stuck_meter,0,0
100,engine_build,,200
120,denied,3,1
"""


def test_faults_begin_and_end_when_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = tmp_path / "faults.csv"
    faults.write_text(FAULTS)
    run = ["simulate", *NODE, "--hours", "0.05", "--policy", "pals-paper", "--rate", "3", "--faults", str(faults)]
    assert main([*run, "--budget", "0:1600,150:420", "--out", str(tmp_path)]) == 0
    told, t = capsys.readouterr(), ticks_of(tmp_path, "pals-paper")

    def during(start_s: float, end_s: float, key: str) -> Any:
        return t[key][(t["time_s"] > start_s) & (t["time_s"] < end_s)]

    assert set(during(21, 60, "limit_w")) == {480.0}  # all boards go to what the other hand left one of them
    assert min(during(61, 70, "limit_w")) > 480.0
    assert all("board 2 is lost" in n for n in during(70, 80, "notes"))
    assert np.all(np.isnan(during(70.5, 80, "power_w")))
    assert not any(n and "lost" in n for n in during(81, 90, "notes"))
    refused = [i for i, n in enumerate(t["notes"]) if n and "no permission" in n]
    assert 120.0 <= t["time_s"][refused[0]] <= 150.0  # at the first write after that
    assert len(set(t["limit_w"][refused[0] + 1 :])) == 1  # advises from there on
    assert set(t["active_limit"][refused[0] + 2 :]) == {64.0}
    pace = [np.sum(during(a, b, "output_tokens")) / np.sum(during(a, b, "running")) for a, b in ((82, 99), (101, 119))]
    assert pace[1] < 0.5 * pace[0]  # each sequence waits for the host
    assert "ticks carry notes" in told.out
    assert "warning" not in told.err
    metadata = pq.read_schema(tmp_path / "ticks.parquet").metadata
    assert len(json.loads(metadata[b"pals.faults"])) == 8


def test_a_perturbed_plant_is_another_world_and_the_same_one_twice(tmp_path: Path) -> None:
    def energy(*argv: str) -> float:
        assert main(["simulate", *NODE, "--hours", "0.01", "--out", str(tmp_path), *argv]) == 0
        return float(json.loads((tmp_path / "outcomes.json").read_text())[0]["gpu_energy_j"])

    plain, moved = energy(), energy("--perturb-seed", "3")

    assert moved == energy("--perturb-seed", "3")
    assert abs(moved / plain - 1) > 0.005
    assert energy("--perturb-seed", "3", "--spread", "0") == plain
