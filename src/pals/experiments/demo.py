"""`pals demo`: a model on emulated boards serves one trace slice under three policies; table and figure.

It is made of the commands a user has: one `pals serve --no-agent`, then one `pals agent` per policy. The runs send the
same prompts, so prefix caching is off: otherwise the first would fill the cache for the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from pals.core.errors import EngineGoneError
from pals.core.quantities import Slo
from pals.engines.openai_client import RequestSpec, replay
from pals.engines.vllm_launcher import die_with_parent, tail
from pals.experiments.outcome import Outcome, outcome
from pals.experiments.plant_checks.validation import validation_note
from pals.experiments.scenarios import HEADROOM, TPOT_TARGET_S, TTFT_TARGET_S, Scenario, scenario_of, slo_for
from pals.experiments.trace import describe, load_slice
from pals.runtime.agent import load_profile
from pals.runtime.journal import read_journal
from pals.runtime.tick import TickRecord
from pals.views.figure import RunSeries, draw_runs
from pals.views.report import outcome_table, wide_console

LAUNCH_SEQUENCES = 64
TRACE_START_S = 0.0
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One policy of the comparison."""

    name: str
    policy: str
    budget: str | None


def runs_of(scenario: Scenario, seconds: float) -> tuple[Run, ...]:
    """The three runs; the budget steps down after 30 % of the slice and up again after 65 %."""
    high_w, low_w = scenario.high_budget_w, scenario.low_budget_w
    steps = f"0:{high_w:.0f},{0.3 * seconds:.0f}:{low_w:.0f},{0.65 * seconds:.0f}:{high_w:.0f}"
    return (
        Run(name="static", policy="static", budget=None),
        Run(name="pals-paper", policy="pals-paper", budget=None),
        Run(name="pals-paper, budget steps", policy="pals-paper", budget=steps),
    )


def demo(*, model: str | None, seconds: float, out: str) -> int:
    """Run all, print the table and the figure's path; 0 when every request was answered and every replay agreed."""
    console = wide_console()
    scenario = scenario_of(model)
    folder = Path(out).resolve() / ("" if model is None else scenario.slug)
    folder.mkdir(parents=True, exist_ok=True)
    specs = load_slice(seconds * scenario.load, start_s=TRACE_START_S, time_scale=1.0 / scenario.load)
    slo = slo_of(specs, seconds)
    profile = load_profile(scenario.profile)
    console.print(
        f"EMULATED: real vLLM serves {scenario.model} on {scenario.boards}; no GPU is used, watts and step times come from a simulated board.\n"
        f"Load: {describe(specs)}, at {scenario.load:g} of the trace's rate, seed {SEED}.\n"
        f"Profile: committed, {profile.source}, {len(profile.rows)} rows of {profile.made_at}; make it anew with `{profile.command}`.\n"
        f"Targets: {slo.throughput_tokens_s:.0f} tokens/s ({HEADROOM} × what the slice asks for), TTFT p95 {TTFT_TARGET_S:g} s, "
        f"TPOT p95 {TPOT_TARGET_S * 1e3:g} ms."
    )
    outcomes: list[Outcome] = []
    series: list[RunSeries] = []
    journals: list[Path] = []
    with (
        tempfile.TemporaryDirectory(prefix="pals-demo-") as run_folder,
        serving(scenario, Path(run_folder), folder, console) as url,
    ):
        for run in runs_of(scenario, seconds):
            console.print(f"[bold]{run.name}[/bold]: replaying {seconds:.0f} s of trace …")
            journal = folder / f"{run.name.replace(', ', '-').replace(' ', '-')}.jsonl"
            with steering(scenario, run, journal, slo, Path(run_folder), folder):
                results = asyncio.run(replay(specs, base_url=url, model=scenario.model, seed=SEED))
            records = list(read_journal(journal)[1])
            outcomes.append(outcome(run.name, results, records, slo))
            series.append(series_of(run, records, min(r.sent_s for r in results), slo))
            journals.append(journal)
    return conclude(console, scenario, folder, outcomes, series, journals)


def conclude(
    console: Console,
    scenario: Scenario,
    folder: Path,
    outcomes: Sequence[Outcome],
    series: Sequence[RunSeries],
    journals: Sequence[Path],
) -> int:
    """Replay the journals, print the table, draw the figure."""
    agree = [subprocess.run([sys.executable, "-m", "pals.cli", "replay", str(j)]).returncode == 0 for j in journals]
    figure, name = folder / "demo.png", scenario.model.split("/")[-1]
    draw_runs(
        series,
        figure,
        title=f"One trace slice, three policies: {name} on {scenario.title}",
        subtitle="EMULATED: real vLLM, simulated boards · Azure 2023 conversation trace",
    )
    (folder / "outcomes.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    console.print(outcome_table(outcomes, title=f"Emulated: real vLLM, {name} on {scenario.title}, simulated boards"))
    console.print(validation_note(), soft_wrap=True)
    unanswered = sum(o.failed - o.refused + o.wrong_length for o in outcomes)
    if unanswered:
        console.print(f"[bold red]{unanswered} requests were not answered with exactly the tokens asked for[/bold red]")
    console.print(f"journals and figures of this run: {folder}\nfigure: {figure}", soft_wrap=True)
    return 0 if all(agree) and not unanswered else 1


def slo_of(specs: Sequence[RequestSpec], seconds: float) -> Slo:
    """The demo's targets for this slice."""
    return slo_for(sum(s.output_tokens for s in specs) / seconds)


@contextmanager
def serving(scenario: Scenario, run_folder: Path, out: Path, console: Console) -> Iterator[str]:
    """`pals serve --no-agent` for the duration; yields the base URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        "serve", scenario.model, "--emulate", scenario.boards, "--no-agent", "--port", str(port), "--log", str(out / "vllm.log"),
        "--max-num-seqs", str(LAUNCH_SEQUENCES), "--no-enable-prefix-caching",
    ]  # fmt: skip
    console.print("starting vLLM …")
    started_s = time.monotonic()
    with pals(command, run_folder, out / "serve.log") as process:
        while not healthy(url):
            if process.poll() is not None:
                raise EngineGoneError(f"the server ended while starting:\n{tail(out / 'serve.log')}")
            time.sleep(0.25)
        console.print(f"vLLM answers after {time.monotonic() - started_s:.0f} s")
        wait_for_engine(run_folder, process, out)
        yield url


@contextmanager
def steering(scenario: Scenario, run: Run, journal: Path, slo: Slo, run_folder: Path, out: Path) -> Iterator[None]:
    """`pals agent` for the duration; its first tick has been written when the body starts."""
    journal.unlink(missing_ok=True)
    command = [
        "agent", "--policy", run.policy, "--journal", str(journal), "--metrics-port", "0",
        "--target-tokens-s", str(slo.throughput_tokens_s), "--ttft-p95-s", str(slo.ttft_p95_s),
        "--tpot-p95-s", str(slo.tpot_p95_s),
        *(["--profile", str(scenario.profile)] if run.policy == "pals-paper" else []),
        *(["--budget-w", run.budget] if run.budget else []),
    ]  # fmt: skip
    log = out / f"agent-{journal.stem}.log"
    with pals(command, run_folder, log) as process:
        while not journal.exists() or journal.read_text().count("\n") < 2:
            if process.poll() is not None:
                raise EngineGoneError(f"the agent ended at once:\n{tail(log)}")
            time.sleep(0.05)
        yield
        time.sleep(1.0)  # two more ticks, so that the journal covers the last token


@contextmanager
def pals(command: Sequence[str], run_folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a `pals` command in the background; ended by SIGTERM, in order."""
    environ = {**os.environ, "PALS_RUN_DIR": str(run_folder)}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "pals.cli", *command], stdout=sink, stderr=subprocess.STDOUT, env=environ,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=90)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for_engine(run_folder: Path, process: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for the engine's channel, which `pals serve` checks too."""
    while not list(run_folder.glob("*.channel")):
        if process.poll() is not None:
            raise EngineGoneError(f"the server ended while starting:\n{tail(out / 'serve.log')}")
        time.sleep(0.1)


def healthy(url: str) -> bool:
    """Whether the server answers."""
    with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{url}/health", timeout=2):
        return True
    return False


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def series_of(run: Run, records: Sequence[TickRecord], start_s: float, slo: Slo) -> RunSeries:
    """A run's records as the columns of a figure; throughput over four periods."""
    kept = [r for r in records if r.sample.engine is not None and r.sample.time_s >= start_s - 1.0]
    span = 4
    rates = []
    for i, now in enumerate(kept):
        before = kept[max(0, i - span)]
        seconds = now.sample.time_s - before.sample.time_s
        tokens = now.sample.engine.output_tokens - before.sample.engine.output_tokens  # type: ignore[union-attr]
        rates.append(tokens / seconds if seconds > 0 else 0.0)
    engines = [r.sample.engine for r in kept if r.sample.engine is not None]
    return RunSeries(
        name=run.name,
        time_s=[r.sample.time_s - start_s for r in kept],
        power_w=[
            r.sample.power_w if r.sample.power_w is not None else sum(b.power_w for b in r.sample.boards) for r in kept
        ],
        limit_w=[sum(r.enforced_limits_w) for r in kept],
        budget_w=[r.budget.power_w for r in kept],
        active_limit=[e.active_limit for e in engines],
        running=[e.running for e in engines],
        waiting=[e.waiting for e in engines],
        tokens_per_s=rates,
        target_tokens_per_s=slo.throughput_tokens_s,
    )
