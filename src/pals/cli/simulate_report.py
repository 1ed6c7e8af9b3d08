"""What `pals simulate` shows and leaves behind: lines, progress, table, figure, files; all of it marked as simulated."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pals.cli.emulate import reproducing
from pals.cli.main import say
from pals.core.quantities import Slo

if TYPE_CHECKING:
    from pals.experiments.simulated_policies import Report
    from pals.experiments.simulated_run import PolicyResult, PolicyTask, Simulation

EXIT_INTERRUPTED = 130
PACKAGES = ("numpy", "numba", "pyarrow")


def describe(sim: Simulation, tasks: Sequence[PolicyTask]) -> None:
    """What will be simulated, on stderr."""
    slo, longer = (
        tasks[0].config.slo,
        f"; {sim.left_out} requests above {sim.context_tokens} tokens are left out" * bool(sim.left_out),
    )
    say(
        f"SIMULATED: {sim.model} on {sim.boards} × {sim.spec.nvml_name}; no GPU is used, every watt and second is simulated"
    )
    say(
        f"engine: launch batch {sim.max_num_seqs}, {sim.max_num_batched_tokens} tokens a step, "
        f"prefix caching {'on' if sim.prefix_caching else 'off'}"
    )
    if sim.perturb_seed is not None:
        say(f"plant: constants moved by seed {sim.perturb_seed}, spread {sim.spread:g}")
    if events := sim.faults.events:
        say(f"faults: {', '.join(f'{e.kind} at {e.time_s:g} s' for e in events)}")
    say(f"load: {sim.workload.described()}{longer}")
    say(f"targets: {targets_text(slo)}")


def targets_text(slo: Slo) -> str:
    """The targets that were given, in a few words."""
    told = [
        (slo.throughput_tokens_s, "{:g} tokens/s", 1.0),
        (slo.throughput_share, "{:g} % of the most tokens/s", 100.0),
        (slo.ttft_p95_s, "TTFT p95 {:g} s", 1.0),
        (slo.ttft_p99_s, "TTFT p99 {:g} s", 1.0),
        (slo.tpot_p95_s, "TPOT p95 {:g} ms", 1e3),
        (slo.tpot_p99_s, "TPOT p99 {:g} ms", 1e3),
    ]
    return ", ".join(text.format(factor * value) for value, text, factor in told if value is not None) or "none"


@contextmanager
def progress_of(sim: Simulation, tasks: Sequence[PolicyTask]) -> Iterator[Report]:
    """A bar for each policy, on stderr; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    total_s = float(sim.workload.arrival_s[-1])
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars = [progress.add_task(t.name, total=total_s, told="") for t in tasks]
        began = dict[int, float]()

        def report(i: int, event_s: float) -> None:
            spent_s = time.perf_counter() - began.setdefault(i, time.perf_counter())
            speed = f", {event_s / spent_s:,.0f}x real time" if spent_s > 0.2 else ""
            told = f"{hours_text(event_s)} of {hours_text(total_s)}{speed}"
            progress.update(bars[i], completed=min(event_s, total_s), told=told)

        yield report


def hours_text(seconds: float) -> str:
    """Event time for people."""
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def conclude(
    args: argparse.Namespace, sim: Simulation, tasks: Sequence[PolicyTask], results: Sequence[PolicyResult]
) -> int:
    """Write the files, print the table and where things are."""
    from pals.experiments.plant_checks.validation import validation_note
    from pals.views.report import outcome_table, wide_console

    folder, console = Path(args.out), wide_console()
    seen = [(r, replace(r.outcome, name=title_of(r))) for r in results if r.outcome is not None]
    figure = draw(args, sim, folder, [r for r, _ in seen])
    write_files(args, sim, folder, results)
    if seen:
        title = f"SIMULATED: {sim.model} on {sim.boards} × {sim.spec.nvml_name}, {sim.workload.name}"
        console.print(outcome_table([o for _, o in seen], title=title))
    console.print(validation_note(), soft_wrap=True)
    for r in results:
        console.print(
            f"{r.task.name}: {hours_text(r.event_s)} simulated in {r.wall_s:.1f} s, {r.event_s / r.wall_s:,.0f}x real time"
        )
        if r.first_note is not None:
            console.print(
                f"{r.task.name}: {r.noted} ticks carry notes (column `notes`), the first at {r.first_note}",
                soft_wrap=True,
            )
    console.print(f"requests.parquet, ticks.parquet, outcomes.json{figure}: {folder}", soft_wrap=True)
    done = {r.task.name for r in results if r.complete}
    if rest := [t.name for t in tasks if t.name not in done]:
        say(f"stopped early: what there is so far was written to {folder}; not finished: {', '.join(rest)}")
        return EXIT_INTERRUPTED
    return 0


def title_of(result: PolicyResult) -> str:
    """A policy's name over its figures."""
    stopped = "" if result.complete else f", stopped at {hours_text(result.event_s)}"
    return f"{result.task.name} (simulated{stopped})"


def draw(args: argparse.Namespace, sim: Simulation, folder: Path, results: Sequence[PolicyResult]) -> str:
    """Draw the figure, if there is anything; its name for the list of files."""
    from pals.experiments.simulated_files import series_of_ticks
    from pals.views.figure import draw_runs

    if not results:
        return ""
    series = [
        series_of_ticks(r.task.ticks, title_of(r), target_tokens_s=r.task.config.slo.throughput_tokens_s)
        for r in results
    ]
    draw_runs(
        series,
        folder / "figure.png",
        title=f"Simulated: {sim.model.split('/')[-1]} on {sim.boards} × {sim.spec.nvml_name}",
        subtitle=f"SIMULATED engine and boards · {sim.workload.name}, {sim.workload.rate_per_s:.3g} requests/s",
    )
    return ", figure.png"


def write_files(args: argparse.Namespace, sim: Simulation, folder: Path, results: Sequence[PolicyResult]) -> None:
    """Requests, ticks and outcomes of every policy that was begun."""
    from pals.experiments.simulated_files import REQUEST_COLUMNS, merge_ticks, request_rows
    from pals.plant.columnar import ParquetWriter

    metadata = metadata_of(args, sim, results)
    requests = ParquetWriter(folder / "requests.parquet", REQUEST_COLUMNS, metadata)
    for r in results:
        requests.write(request_rows(r.task.name, sim.workload, r.answers, r.extra))
    requests.close()
    merge_ticks([r.task.ticks for r in results], folder / "ticks.parquet", metadata)
    told = [
        {**asdict(r.outcome), "complete": r.complete, "basis": "simulated"} for r in results if r.outcome is not None
    ]
    (folder / "outcomes.json").write_text(json.dumps(told, indent=1) + "\n")


def metadata_of(args: argparse.Namespace, sim: Simulation, results: Sequence[PolicyResult]) -> Mapping[str, str]:
    """What a file says of how it came about; equal for equal runs."""
    from pals import __version__

    policies = ",".join(r.task.name for r in results)
    return {
        "pals.basis": "simulated",
        "pals.command": reproducing(args.given, policies, without=("--out", "--workers")),
        "pals.seed": str(args.seed),
        "pals.seed_boards": str(args.seed_boards),
        "pals.perturb": json.dumps(None if sim.perturb_seed is None else [sim.perturb_seed, sim.spread]),
        "pals.faults": json.dumps([asdict(e) for e in sim.faults.events]),
        "pals.model": sim.model,
        "pals.boards": f"{sim.boards}x{sim.spec.name}",
        "pals.load": sim.workload.described(),
        "pals.complete": json.dumps(all(r.complete for r in results)),
        "pals.versions": json.dumps({"pals": __version__, **{name: version(name) for name in PACKAGES}}),
    }
