"""What is to be known beside the table: cases, seeds, splits, rivals, and what was assumed."""

from __future__ import annotations

from collections.abc import Sequence

from pals.experiments.plant_checks.validation import validation_note
from pals.experiments.profile_checks.combination import BATCHES, LIMITS, LOCK_SHARES, Combination
from pals.experiments.profile_checks.regret import MULTIPLES, SHARES
from pals.experiments.profile_checks.run import Job
from pals.experiments.profile_checks.silicon import ASSUMED
from pals.experiments.profile_checks.splits import DRAWN_SHARE, DRAWS, SHORT, TRAIN_ROWS
from pals.plant.perturb import SPREAD

RIVALS_TOLD = (
    "rivals learn the same rows, with limit, clock ceiling, batch, prompt and output tokens as features; both they and the targets in logarithms. random "
    "forest: scikit-learn, 300 trees; polynomial: nine terms (limit and batch with their squares, clock, prompt, output, batch × prompt/output); boosting: "
    "scikit-learn's defaults; interpolation: cubic radial basis functions through every row, clipped to the rows' range. They answer "
    "everywhere and have no interval; methods are compared on the rows that pals answered"
)
REGRET_TOLD = (
    f"regret: targets of {', '.join(f'{100 * s:.0f}' for s in SHARES)} % of a mix's largest throughput, each with TPOT p95 and TTFT p95 of at most "
    f"{' or '.join(f'{m:g}' for m in MULTIPLES)} × the lowest among points that reach it; the pick is the most predicted tokens/J among the points of a finer grid (19 limits and 16 locks × 5 batches) that keep all "
    "by the pessimistic end of the interval (rivals: by their value), else the one that is likeliest to keep all; learned from the sweep"
)


def remarks_of(jobs: Sequence[Job]) -> tuple[str, ...]:
    """One sentence or two each."""
    simulated = [job for job in jobs if isinstance(job.subject, Combination)]
    measured = [job for job in jobs if not isinstance(job.subject, Combination)]
    told = []
    if simulated:
        told += [_plants(simulated), _simulated_splits(), RIVALS_TOLD, REGRET_TOLD, validation_note()]
    if measured:
        told += [_measured_splits(len(measured)), ASSUMED]
    return tuple(told)


def _plants(jobs: Sequence[Job]) -> str:
    subjects = [job.subject for job in jobs if isinstance(job.subject, Combination)]
    engines = len({(c.model, c.boards) for c in subjects})
    seeds = sorted({c.seed for c in subjects})
    each = len(subjects) / engines
    parts = (("rivals are judged", "rivals"), ("levels are withheld, and points chosen,", "levels"))
    thinned = "".join(
        f"; {what} on {share:g} of the plants of each engine, others for each"
        for what, name in parts
        if (share := sum(getattr(job, name) for job in jobs) / engines) < each
    )
    return (
        f"simulated: {engines} engines (model on boards) on plants with every constant moved (spread {SPREAD:g}), seeds {_listed(seeds)}{'' if each == len(seeds) else f', each engine on {each:g} of them'}; the "
        f"default constants are not among them{thinned}"
    )


def _simulated_splits() -> str:
    return (
        f"simulated splits: the grid is {LIMITS} limits and {len(LOCK_SHARES)} locks × {len(BATCHES)} batches × the sweep's mixes. Random: {TRAIN_ROWS} rows drawn by the "
        "plant's seed, the others tested. Sweep: the rows of the sweep itself, the whole grid tested. Withheld: the same draw without "
        "one level, all rows of the grid at it tested, each interior level in turn. First 10 rows, and a mix that no row has: learned from the sweep. Priors alone: nothing learned"
    )


def _measured_splits(count: int) -> str:
    return (
        f"silicon: {count} public sweeps, one knob each; none measured by us, no data-centre GPU was at hand. Random: {DRAWS} draws of {100 * DRAWN_SHARE:.0f} % of the rows, leave-one-out below "
        f"{SHORT} rows; each level withheld in turn from all other rows"
    )


def _listed(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds)) or "none"
