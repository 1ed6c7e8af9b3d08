"""`pals profile evaluate`: what is kept of a run, what is refused, and the whole of it on one engine."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from pals.cli.profile_evaluate import add_evaluate, evaluate
from pals.core.errors import ConfigError
from pals.core.load import Mix
from pals.experiments.profile_checks.case import SILICON, Case
from pals.experiments.profile_checks.combination import combinations, simulation_of
from pals.experiments.profile_checks.judge import Judged
from pals.experiments.profile_checks.kept import JUDGED, SOURCES, keep, read_kept
from pals.experiments.profile_checks.run import Job, Unjudged, run_job, run_jobs, usable
from pals.models.engine_facts import EngineFacts

FACTS = EngineFacts(
    board="toy", boards=1, min_limit_w=100, max_limit_w=400, min_sm_clock_mhz=200, max_sm_clock_mhz=1400,
    launch_sequences=64,
)  # fmt: skip


def nothing(name: str = "toy") -> Case:
    """A case without rows."""
    mix = Mix(name="chat", prompt_tokens=500, output_tokens=200)
    return Case(name=name, group="toy", basis=SILICON, facts=FACTS, mixes=(mix,), rows=(), seed=0, knob="limit")


def test_every_source_that_decides_a_result_is_in_its_digest(tmp_path: Path) -> None:
    for pattern in JUDGED:
        assert list(SOURCES.glob(pattern)), pattern
    keep(tmp_path / "a.json", JUDGED, {"figure": 1.5})
    assert (read_kept(tmp_path / "a.json", JUDGED) or {})["figure"] == 1.5
    assert read_kept(tmp_path / "a.json", ("core",)) is None  # other code made it
    assert read_kept(tmp_path / "none.json", JUDGED) is None


def test_a_result_without_rivals_does_not_serve_where_they_are_asked_for(tmp_path: Path) -> None:
    job = Job(subject=nothing(), rivals=False, folder=tmp_path)
    keep(
        job.path,
        JUDGED,
        {
            "rivals": False,
            "levels": True,
            "judged": Judged(name="toy", group="toy", basis=SILICON, seed=0, marks=()).to_dict(),
        },
    )
    served = run_job(job)
    assert isinstance(served, Judged)
    assert served.name == "toy"
    assert job.path == replace(job, rivals=True).path
    kept = read_kept(job.path, JUDGED)
    assert kept is not None
    assert not usable(kept, replace(job, rivals=True))
    assert usable(kept, job)


def test_combinations_fit_their_boards_and_never_take_the_default_constants() -> None:
    found = combinations(seeds=(1,))
    names = {(c.model, c.boards) for c in found}
    assert ("meta-llama/Llama-3.1-70B", "h100-sxm5-80gb") not in names  # 140 GB of weights
    assert ("openai-community/gpt2", "8xh200-sxm5-141gb") not in names  # 12 heads on 8 boards
    assert ("deepseek-ai/DeepSeek-V3", "8xh200-sxm5-141gb") in names
    assert all(simulation_of(c).perturb_seed == 1 for c in found[:2])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seeds", "0"], "at least 1"),
        (["--seeds", "a"], "whole numbers"),
        (["--workers", "0"], "--workers"),
        (["--record", "--quick"], "every case"),
        (["--quick", "--models", "gpt2"], "leave out what names others"),
        (["--boards", "l4"], "known here"),
        (
            ["--models", "mistral-7b", "--boards", "h100-sxm5-80gb", "--seeds", "1", "--data", "/nowhere"],
            "not in /nowhere",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_runs(
    options: list[str], says: str, tmp_path: Path
) -> None:
    parser = argparse.ArgumentParser()
    add_evaluate(parser.add_subparsers())
    args = parser.parse_args(["evaluate", "--out", str(tmp_path / "out"), *options])
    with pytest.raises(ConfigError, match=says):
        evaluate(args)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quick_evaluation_prints_its_table_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_evaluate(parser.add_subparsers())
    args = parser.parse_args(["evaluate", "--quick", "--workers", "1", "--out", str(tmp_path)])
    assert evaluate(args) in (0, 1)
    first = capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json") if path.name != "summary.json"}
    assert evaluate(args) in (0, 1)
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert "regret in tokens/J" in first
    assert (tmp_path / "profile-evaluation.md").read_text().startswith("# Profiles against truth")


def test_jobs_come_back_in_their_order_and_stop_between_two(tmp_path: Path) -> None:
    jobs = [Job(subject=nothing(f"case {i}"), rivals=False, folder=tmp_path) for i in range(3)]
    told: list[str] = []

    def done(job: Job) -> None:
        told.append(job.path.stem)

    found = run_jobs(jobs, workers=1, stop=lambda: len(told) == 2, done=done)
    assert [case.name for case in found] == ["case 0", "case 1"]
    assert told == ["case-0", "case-1"]
    assert not any(isinstance(case, Unjudged) for case in found)
    assert [path.stem for path in sorted((tmp_path / "judged").iterdir())] == ["case-0", "case-1"]
