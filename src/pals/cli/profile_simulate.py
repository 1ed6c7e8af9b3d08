"""`pals profile simulate`: the sweep of a simulated engine on simulated boards, in event time."""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import numpy as np

from pals.cli.agent import EXIT_INTERRUPTED, stopping
from pals.cli.main import say
from pals.cli.profile import counted_since, finish, forget_if_empty, out_of, partial_of, profile_of, with_popularity
from pals.cli.profile_plan import plan_of
from pals.cli.profile_progress import SweepNotes, showing
from pals.cli.simulate import engine_of
from pals.core.quantities import fingerprint_of
from pals.core.routing_reference import RoutingReference
from pals.experiments.simulated_profile import profiled_replica, simulated_sweep
from pals.experiments.simulated_run import Simulation
from pals.models.fitted import fit
from pals.profiler.sweep import Interrupted


def simulate(args: argparse.Namespace) -> int:
    """Sweep and write the profile; 130 and a partial file on Ctrl-C.

    Raises:
        ConfigError: an unknown model or board, sizes that do not fit, or a bad option; nothing was started.
    """
    sim, out, stop = engine_of(args), out_of(args.out), threading.Event()
    node = profiled_replica(sim, np.random.default_rng(args.seed))  # only to ask its boards
    plan = plan_of(args, node.rig.guard, min(sim.model_context, node.replica.kv_tokens))
    say(f"SIMULATED: {sim.model} on {sim.boards} × {sim.spec.nvml_name}; every watt and second is simulated")
    began_s, kept, notes = time.monotonic(), rows_of(out, sim), SweepNotes()
    try:
        with stopping(stop), showing(plan.mixes, notes) as tell:
            swept = simulated_sweep(
                sim, fit=fit, plan=plan, seed=args.seed, partial=kept, progress=tell, stop=stop.is_set
            )
    except Interrupted:
        say(f"interrupted: the rows in {kept} are kept; run the same command to go on")
        return EXIT_INTERRUPTED
    finally:
        forget_if_empty(kept)
    say(f"{swept.event_s:.0f} s of the engine's time in {time.monotonic() - began_s:.1f} s")
    fingerprint = fingerprint_of(sim.engine, [m.info for m in node.rig.meters])
    counted = counted_since(None, swept.counted) if args.count_experts else None
    made = profile_of(
        args, swept.rows, plan.mixes, with_popularity(swept.facts, counted), fingerprint=fingerprint, source="simulated",
        notes=notes.lines, routing=RoutingReference.of(counted) if counted is not None else None,
    )  # fmt: skip
    finish(out, made)
    kept.unlink(missing_ok=True)
    return 0


def rows_of(out: Path, sim: Simulation) -> Path:
    """Where the rows under way are kept: of each plant apart, since its engine says the same of itself on all of them."""
    if sim.perturb_seed is None and not sim.board_seed:
        return partial_of(out)
    plant = "default" if sim.perturb_seed is None else f"{sim.perturb_seed}-{sim.spread:g}"
    return partial_of(out).with_name(f"{out.stem}.plant-{plant}.boards-{sim.board_seed}.partial.jsonl")
