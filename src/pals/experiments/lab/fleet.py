"""What experiments on several engines under one budget share: engines as found, node power of boards, figures of all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pals.core.errors import ConfigError
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Wish
from pals.experiments.lab.figures import Figures, node_energy_j
from pals.experiments.lab.fleet_meter import FleetLedger
from pals.experiments.lab.fleet_truth import GUARDED, ORACLE, STATIC_BEST
from pals.experiments.lab.loads import ClosedLoop
from pals.experiments.lab.paper_single_node import BOARDS, IN_FLIGHT, LAUNCH, LENGTHS
from pals.experiments.lab.rivals import BASELINE
from pals.experiments.lab.run import RunTask, run
from pals.models.node_power import OFFSET_W, SLOPE, share_of_nodes
from pals.runtime.config import POLICIES

#: What decides rows of several engines beside an experiment's own module.
SOURCES = ("runtime/sharing.py", "experiments/lab/fleet*.py", "experiments/lab/paper_single_node.py")
FOUND_LOAD = ClosedLoop(mix=LENGTHS, in_flight=IN_FLIGHT, warmup_s=30.0, span_s=120.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsFound:
    """What an engine gives and draws with the highest limit, no clock lock and the launch batch."""

    tokens_per_s: float
    boards_w: float  # all its boards


def as_found(engine: EngineCase) -> AsFound:
    """Measured on its plant, in the saturated closed loop."""
    figures = run(RunTask(sim=engine.simulation(), load=FOUND_LOAD, policy=BASELINE, seed=engine.seed)).figures
    return AsFound(tokens_per_s=figures.tokens_per_s, boards_w=figures.mean_power_w)


def engine_of(model: str, seed: int, boards: str = BOARDS) -> EngineCase:
    """A model on a node, launched as in the paper."""
    return EngineCase(model=model, boards=boards, seed=seed, launch=LAUNCH)


def node_w_of(boards_w: float, engines: int, boards: int) -> float:
    """Power of the nodes of so many engines of so many boards each, by the paper's line."""
    return SLOPE * boards_w + OFFSET_W * share_of_nodes(boards) * engines


def boards_w_of(node_w: float, engines: int, boards: int) -> float:
    """What of the nodes' power their boards may draw.

    Raises:
        ConfigError: nothing.
    """
    left_w = (node_w - OFFSET_W * share_of_nodes(boards) * engines) / SLOPE
    if left_w <= 0:
        raise ConfigError(
            f"a budget of {node_w:.0f} W leaves nothing for the boards of {engines} nodes. Nothing was run"
        )
    return left_w


def fleet_policies(wish: Wish, usual: Sequence[str]) -> tuple[str, ...]:
    """The policies to run, the baseline first.

    Raises:
        ConfigError: one that does not exist.
    """
    known = (*POLICIES, STATIC_BEST, ORACLE, GUARDED)
    if unknown := [p for p in wish.policies if p not in known]:
        raise ConfigError(f"unknown policy {unknown[0]!r}; known: {', '.join(known)}. Nothing was run")
    return (BASELINE, *(p for p in wish.policies or usual if p in known and p != BASELINE))


def fleet_columns(ledger: FleetLedger, members: Sequence[Figures], boards: int) -> dict[str, Any]:
    """Figures of all engines together, for a row; `boards` of each engine."""
    gpu_j = float((ledger.energy_j[-1] - ledger.energy_j[0]).sum())
    tokens = sum(m.output_tokens for m in members)
    node_j = sum(node_energy_j(m.gpu_energy_j, m.span_s, boards) for m in members)
    _, power_w, budget_w = ledger.windows()
    over_w = power_w - budget_w  # NaN without a budget: never above it
    over = over_w > 0
    return {
        "output_tokens": tokens, "span_s": ledger.span_s, "tokens_per_s": tokens / ledger.span_s,
        "gpu_energy_j": gpu_j, "node_energy_j": node_j, "tokens_per_j_gpu": tokens / gpu_j, "tokens_per_j_node": tokens / node_j,
        "mean_power_w": gpu_j / ledger.span_s, "over_budget_s": float(over.sum()), "over_budget_share": float(over.mean()),
        "most_over_w": float(over_w[over].max()) if over.any() else 0.0,
    }  # fmt: skip
