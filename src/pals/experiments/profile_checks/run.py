"""All cases judged, several at a time, each kept as soon as it is done."""

from __future__ import annotations

import multiprocessing
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pals.core.errors import PalsError
from pals.experiments.profile_checks.case import Case
from pals.experiments.profile_checks.combination import Combination
from pals.experiments.profile_checks.judge import Judged, judge_case, methods_of
from pals.experiments.profile_checks.kept import JUDGED, keep, read_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One case to judge, and where its result is kept."""

    subject: Combination | Case  # a combination is simulated by whoever judges it
    rivals: bool
    levels: bool = True  # of a simulated grid are withheld too
    folder: Path

    @property
    def path(self) -> Path:
        """Of the result."""
        name = self.subject.slug if isinstance(self.subject, Combination) else self.subject.name
        return self.folder / "judged" / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.json"


def usable(kept: Mapping[str, Any], job: Job) -> bool:
    """Whether a kept result answers the job: one with more serves where less is asked for."""
    return (bool(kept["rivals"]) or not job.rivals) and (bool(kept["levels"]) or not job.levels)


class Unjudged(NamedTuple):
    """A case that could not be judged, and why; the others go on."""

    name: str
    why: str


def run_job(job: Job) -> Judged | Unjudged:
    """Judge it, or take what is kept."""
    kept = read_kept(job.path, JUDGED)
    if kept is not None and usable(kept, job):
        return Judged.from_dict(kept["judged"])
    try:
        judged = _judged(job)
    except PalsError as e:
        return Unjudged(job.path.stem, str(e))
    keep(job.path, JUDGED, {"rivals": job.rivals, "levels": job.levels, "judged": judged.to_dict()})
    return judged


def _judged(job: Job) -> Judged:
    methods = methods_of(job.rivals)
    if isinstance(job.subject, Case):
        return judge_case(job.subject, methods, {})
    from pals.experiments.profile_checks.cost import costs_of
    from pals.experiments.profile_checks.world import world_of

    world = world_of(job.subject, job.folder, choices=job.levels)
    case = replace(world.case, levels=job.levels)
    return judge_case(case, methods, costs_of(job.subject, world))


def run_jobs(
    jobs: Sequence[Job], *, workers: int, stop: Callable[[], bool], done: Callable[[Job], None]
) -> list[Judged | Unjudged]:
    """Results in the order of the jobs; fewer where `stop` said so."""
    results: dict[int, Judged | Unjudged] = {}
    if workers == 1:
        for i, job in enumerate(jobs):
            if stop():
                break
            results[i] = run_job(job)
            done(job)
        return list(results.values())
    spawn, left = multiprocessing.get_context("spawn"), iter(enumerate(jobs))
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_ignore_interrupts) as pool:
        running: dict[Future[Judged | Unjudged], int] = {}
        while True:  # none is handed over before its turn: what is begun is waited for
            for i, job in islice(left, 0 if stop() else workers - len(running)):
                running[pool.submit(run_job, job)] = i
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                i = running.pop(future)
                results[i] = future.result()
                done(jobs[i])
    return [results[i] for i in sorted(results)]


def _ignore_interrupts() -> None:
    """Ctrl-C in a terminal reaches every process; whoever started the workers decides, and a case ends whole."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
