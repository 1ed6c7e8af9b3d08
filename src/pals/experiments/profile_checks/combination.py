"""Which simulated engines are profiled: every shipped model on three sets of boards, each on plants with moved constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.core.load import Mix
from pals.core.quantities import OperatingPoint
from pals.engines.model_zoo import full_name, model_names, shipped_config
from pals.experiments.simulated_run import EMPTY, Simulation
from pals.plant.perturb import SPREAD
from pals.plant.specs import CLOCK_STEP_MHZ, parse_boards
from pals.profiler.plan import default_mixes, fitting

#: Boards, and the tokens of a step that vLLM's server takes on them.
BOARDS = {"4xa100-sxm4-80gb": 2048, "h100-sxm5-80gb": 8192, "8xh200-sxm5-141gb": 8192}
SEEDS = tuple(range(1, 11))
LIMITS = 7  # levels of the grid
BATCHES = (32, 8, 4, 2, 1)  # the launch limit over these
LOCK_SHARES = (0.4, 0.55, 0.7, 0.85)  # of the top clock
FINE_LIMITS, FINE_LOCKS = 19, (0.4, 0.95, 16)  # where points are chosen: limits; locks from, to, how many
LAUNCH, LEAST_LAUNCH = 256, 16  # active sequences; the most that the KV cache holds of the longest mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One model on one set of boards on one plant."""

    model: str  # as on the hub
    boards: str
    seed: int  # of the plant's constants

    @property
    def slug(self) -> str:
        """As a file name."""
        return f"{self.model.split('/')[-1].lower()}--{self.boards}--{self.seed}"


def combinations(
    models: Sequence[str] = (), boards: Sequence[str] = (), seeds: Sequence[int] = SEEDS
) -> list[Combination]:  # fmt: skip
    """Those that fit: weights and a KV cache for `LEAST_LAUNCH` sequences in the boards' memory, heads divided evenly.

    Raises:
        ConfigError: an unknown model or board.
    """
    names = [full_name(m) for m in models] or model_names()
    places = list(boards) or list(BOARDS)
    if unknown := [b for b in places if b not in BOARDS]:
        raise ConfigError(f"boards {', '.join(unknown)}: known here are {', '.join(BOARDS)}. Nothing was evaluated")
    fitting = [(m, b) for b in places for m in names if fits(m, b)]
    return [Combination(model=m, boards=b, seed=s) for m, b in fitting for s in seeds]


def fits(model: str, boards: str) -> bool:
    """Whether the boards can serve the model."""
    _, count = parse_boards(boards)
    if ModelShape.from_config(shipped_config(model)).heads % count:
        return False
    try:
        return launch_of(_simulation(model, boards, None, LEAST_LAUNCH)) >= LEAST_LAUNCH
    except ConfigError:
        return False


def simulation_of(c: Combination) -> Simulation:
    """The engine on its plant."""
    launch = launch_of(_simulation(c.model, c.boards, None, LEAST_LAUNCH))
    return _simulation(c.model, c.boards, c.seed, launch)


def _simulation(model: str, boards: str, seed: int | None, launch: int) -> Simulation:
    spec, count = parse_boards(boards)
    return Simulation(
        model=model, config=shipped_config(model), spec=spec, boards=count, max_num_seqs=launch,
        max_num_batched_tokens=BOARDS[boards], prefix_caching=False, board_seed=seed or 0, context_tokens=1,
        workload=EMPTY, perturb_seed=seed, spread=SPREAD,
    )  # fmt: skip


def launch_of(sim: Simulation) -> int:
    """The largest power of two of sequences, at most `LAUNCH`, that the KV cache holds of every mix.

    Raises:
        ConfigError: the weights do not fit the boards.
    """
    longest = max(m.context_tokens for m in default_mixes(sim.model_context))
    held = int(sim.replica().kv_tokens / longest)
    return 0 if held < 1 else min(LAUNCH, 1 << (held.bit_length() - 1))


def grid_of(sim: Simulation) -> list[OperatingPoint]:
    """Limits × sequences without a lock, and locks × sequences at the default limit."""
    return _crossed(sim, LIMITS, LOCK_SHARES)


def choices_of(sim: Simulation) -> list[OperatingPoint]:
    """As the grid, with limits and locks so near to one another that a controller would hardly want them nearer."""
    return _crossed(sim, FINE_LIMITS, tuple(np.linspace(*FINE_LOCKS).tolist()))


def _crossed(sim: Simulation, limits: int, lock_shares: Sequence[float]) -> list[OperatingPoint]:
    spec = sim.spec
    limits_w = [float(5 * round(w / 5)) for w in np.linspace(spec.min_limit_w, spec.default_limit_w, limits)]
    locks = [CLOCK_STEP_MHZ * round(share * spec.max_sm_clock_mhz / CLOCK_STEP_MHZ) for share in lock_shares]
    levels: list[tuple[float, int | None]] = [*((w, None) for w in limits_w), *((limits_w[-1], mhz) for mhz in locks)]
    batches = sorted({max(1, sim.max_num_seqs // share) for share in BATCHES})
    return [OperatingPoint(power_limit_w=w, sm_clock_mhz=mhz, active_sequences=n) for w, mhz in levels for n in batches]


def unswept_mix(sim: Simulation) -> Mix:
    """A mix between those of the sweep, which the profile never saw."""
    return fitting(Mix(name="unswept", prompt_tokens=500, output_tokens=120), sim.model_context)
