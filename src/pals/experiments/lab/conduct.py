"""Runs the cells of experiments that are not kept yet, over worker processes, and keeps each as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pals.experiments.lab.experiment import Cell, Experiment
from pals.experiments.lab.store import Kept, Store, digest_of_cell
from pals.experiments.lab.workers import Failed, in_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One cell to run."""

    experiment: Experiment
    cell: Cell
    place: Path  # folder of all experiments

    @property
    def store(self) -> Store:
        """Where its rows go."""
        return Store(self.place / self.experiment.name)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.experiment.name}: {self.cell.slug}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conducted:
    """What came of a number of jobs."""

    ran: int
    failed: tuple[tuple[str, str], ...]  # job, why
    complete: bool  # False: stopped before the end


def jobs_of(experiment: Experiment, cells: Sequence[Cell], place: Path) -> list[Job]:
    """One for each cell.

    Raises:
        ValueError: two cells have one name.
    """
    slugs = [c.slug for c in cells]
    if twice := {s for s in slugs if slugs.count(s) > 1}:
        raise ValueError(f"{experiment.name}: several cells are called {', '.join(sorted(twice))}")
    return [Job(experiment=experiment, cell=cell, place=place) for cell in cells]


def pending(jobs: Sequence[Job]) -> list[Job]:
    """Those that are not kept, or were run by other sources."""
    kept = {name: Store(place / name).kept() for name, place in {(j.experiment.name, j.place) for j in jobs}}
    return [
        j
        for j in jobs
        if (k := kept[j.experiment.name].get(j.cell.slug)) is None or k.digest != digest_of_cell(j.experiment, j.cell)
    ]


def conduct(
    jobs: Sequence[Job], *, workers: int, stop: Callable[[], bool], done: Callable[[Job], None] = lambda job: None
) -> Conducted:
    """Run `jobs`; `done` is told of each that ends, well or not."""
    ran, failed = 0, list[tuple[str, str]]()
    for i, result in in_workers(run_job, jobs, workers=workers, stop=stop):
        job = jobs[i]
        if isinstance(result, Failed):
            failed.append((job.name, result.why))
        else:
            job.store.keep(result)
            ran += 1
        done(job)
    for name, place in {(j.experiment.name, j.place) for j in jobs} if ran else ():
        Store(place / name).tidy()
    return Conducted(ran=ran, failed=tuple(failed), complete=ran + len(failed) == len(jobs))


def run_job(job: Job) -> Kept:
    """In a worker.

    Raises:
        PalsError: the cell cannot be run.
    """
    began_s, digest = time.perf_counter(), digest_of_cell(job.experiment, job.cell)
    rows = job.experiment.run(job.cell, job.place)
    return Kept(
        cell=job.cell.slug, digest=digest, seconds=round(time.perf_counter() - began_s, 3), rows=rows
    )  # fmt: skip
