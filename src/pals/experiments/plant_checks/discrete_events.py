"""The discrete-event simulator against real vLLM: its scheduler over emulated boards, and request timelines of real runs.

Run as a module with `--record`, it serves the emulated cases anew and writes their file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pals.experiments.plant_checks.emulated_runs import (
    BOARD_SEED,
    FILE,
    Case,
    Figures,
    digest,
    figures,
    record,
    recorded,
    step_model,
    workload_of,
)
from pals.experiments.plant_checks.request_timelines import timeline_rows
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.plant.replica import Replica


def simulate(case: Case, *, until_s: float, pace_when_planned: bool = True) -> Figures:
    """The case in the simulator; energy is that up to `until_s`, when the emulated run had its last token.

    By default a step's duration is fixed when it is planned, as the emulated engine books it.
    """
    model, spec, count = step_model(case)
    replica = Replica(
        model, spec, boards=count, max_num_seqs=case.max_num_seqs, max_num_batched_tokens=case.max_num_batched_tokens,
        board_seed=BOARD_SEED, pace_when_planned=pace_when_planned, setter_latency_s=0.0,
    )  # fmt: skip
    replica.set_limit_w(case.power_limit_w)
    replica.set_clock_lock(case.sm_clock_mhz)
    specs = case.specs
    replica.submit(workload_of(specs, case.name))
    replica.advance(specs[0].at_s)
    before_j = replica.energy_j()
    replica.advance(until_s)
    energy_j = replica.energy_j() - before_j
    replica.run()
    times = replica.results()
    return figures(
        specs, times.first_token_s, times.last_token_s, energy_j=energy_j, preemptions=int(times.preemptions.sum())
    )


MODULE = "pals.experiments.plant_checks.discrete_events"
COMPARED: tuple[tuple[str, str, float], ...] = (
    ("tpot_mean_s", "TPOT mean", 2.0),
    ("tokens_per_j", "tokens/J", 2.0),
    ("ttft_p95_s", "TTFT p95", 8.0),
)


def emulated_rows() -> list[CheckRow]:
    """Discrete events against real vLLM in virtual time, from the recorded runs."""
    cases = recorded()
    booked = [simulate(case, until_s=found.last_token_s) for case, _, found in cases]
    own = [simulate(case, until_s=found.last_token_s, pace_when_planned=False) for case, _, found in cases]
    stale = sorted({case.name for case, kept, _ in cases if kept != digest(case)})
    again = (
        f"recorded with other constants of the plant, record anew (python -m {MODULE} --record): {'; '.join(stale)}; "
    )
    rows = []
    for name, words, at_most in COMPARED:
        apart = max(abs(getattr(o, name) / getattr(f, name) - 1.0) for o, (_, _, f) in zip(own, cases, strict=True))
        row = error_row(
            f"discrete events against real vLLM's scheduler, {words}",
            f"emulated: experiments/data/{FILE}",
            [
                Residual(group=case.model, x=1 / case.time_scale, measured=getattr(f, name), predicted=getattr(s, name))
                for s, (case, _, f) in zip(booked, cases, strict=True)
            ],
            at_most=at_most,
            x_axis="rate, times the trace's",
            note=f"{again if stale else ''}duration of a step fixed when it is planned, as the emulated engine does; where a "
            f"running step follows the clock instead, the default, the largest difference is {100 * apart:.1f} %",
        )
        rows.append(replace(row, basis="emulated"))
    return rows


def check(folder: Path) -> list[CheckRow]:
    """All rows; `folder` holds the measured data."""
    return [*emulated_rows(), *timeline_rows(folder)]


def main(argv: Sequence[str]) -> int:
    """Print both sides of every case; with `--record`, serve the emulated side anew first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="serve every case with real vLLM, minutes, and keep it")
    args = parser.parse_args(argv)
    if args.record:
        record(Path(__file__).parents[1] / "data" / FILE, print)
    for case, _, emulated in recorded():
        simulated = simulate(case, until_s=emulated.last_token_s)
        print(case.name)
        for name in Figures.__dataclass_fields__:
            a, b = getattr(emulated, name), getattr(simulated, name)
            print(f"  {name:14} emulated {a:12.5f} simulated {b:12.5f} {100 * (b / a - 1) if a else np.nan:+7.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
