"""Engines of the experiments: each on a plant whose constants are moved by a seed, with a profile learned by a sweep of that very plant.

A profile is learned at most once: whoever wants one that another process is learning waits for it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import numpy as np

from pals.core.errors import ConfigError
from pals.core.experts import summarise
from pals.core.quantities import fingerprint_of
from pals.core.routing_reference import RoutingReference
from pals.engines.model_zoo import read_config
from pals.experiments.profile_checks.kept import digest_of
from pals.experiments.simulated_profile import plan_of, profiled_replica, simulated_sweep
from pals.experiments.simulated_run import EMPTY, Simulation
from pals.models.fitted import fit
from pals.models.profile import Profile
from pals.plant.perturb import SPREAD
from pals.plant.specs import parse_boards, usual_step_tokens
from pals.profiler.plan import SweepPlan, default_mixes

#: What decides a profile's contents, as patterns of `src/pals`.
LEARNING = (
    "plant", "core/architecture.py", "core/load.py", "core/quantities.py", "models", "profiler", "experiments/simulated_*.py",
    "experiments/lab/engines.py", "engines/model_configs/*.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCase:
    """One engine on one plant; everything in it is plain, so that it travels to workers and names files."""

    model: str  # as on the hub, or a folder with a config.json
    boards: str  # "4xa100-sxm4-80gb"
    seed: int  # of the plant's constants, its boards and the sweep; at least 1
    launch: int = 64  # active sequences that the engine was launched with
    step_tokens: int | None = None  # of one step; None: as vLLM's server takes on such boards
    prefix_caching: bool = False
    context_tokens: int | None = None  # longest request; None: what model and KV cache take
    spread: float = SPREAD  # standard deviation of the factors on the constants
    prompt_tokens: float | None = None  # of the user's own mix, which is profiled first; None: the default's
    output_tokens: float | None = None
    counted: bool = False  # whether the sweep's profile stores the routing of experts, as of an engine that counts them
    sizes: str = ""  # digest of a folder's config, so that another one is another engine; empty: a shipped model

    @property
    def name(self) -> str:
        """Model and boards, without the seed."""
        return f"{Path(self.model).name.lower()}--{self.boards}"

    @property
    def slug(self) -> str:
        """As a file name."""
        return f"{self.name}--{self.launch}--{self.seed}"

    def simulation(self) -> Simulation:
        """The engine without requests.

        Raises:
            ConfigError: an unknown model or board, or weights that do not fit.
        """
        if self.seed < 1:
            raise ConfigError(f"seed {self.seed} must be at least 1: 0 would look like the plant's own constants")
        spec, count = parse_boards(self.boards)
        model, config = read_config(self.model)
        sim = Simulation(
            model=model, config=config, spec=spec, boards=count, max_num_seqs=self.launch,
            max_num_batched_tokens=self.step_tokens or usual_step_tokens(spec, self.launch),
            prefix_caching=self.prefix_caching, board_seed=self.seed, context_tokens=1, workload=EMPTY,
            perturb_seed=self.seed, spread=self.spread,
        )  # fmt: skip
        room = min(sim.model_context, sim.replica().kv_tokens)
        return replace(sim, context_tokens=min(room, self.context_tokens or room))

    def profile(self, place: Path) -> Profile:
        """What the default sweep of `pals profile` learns of it; kept below `place`.

        Raises:
            ConfigError: as `simulation`, or too few points could be measured.
        """
        key = sha256(f"{asdict(self)} {digest_of(*LEARNING)}".encode()).hexdigest()[:12]
        path = place / "profiles" / f"{self.slug}--{key}.json"
        if not path.exists():
            with locked(path.with_suffix(".lock")):
                if not path.exists():
                    written = path.with_suffix(f".{os.getpid()}.new")
                    written.write_text(self._learned().to_json(), encoding="utf-8")
                    written.replace(path)
        return Profile.from_json(path.read_text(encoding="utf-8"))

    def _learned(self) -> Profile:
        sim = self.simulation()
        swept = simulated_sweep(sim, fit=fit, seed=self.seed, plan=self._plan(sim))
        node = profiled_replica(sim, np.random.default_rng(self.seed))
        counted = swept.counted if self.counted else None
        facts = swept.facts if counted is None else replace(swept.facts, popularity=summarise(counted).popularity)
        return Profile.of(
            swept.rows, swept.mixes, facts, fingerprint_of(sim.engine, [m.info for m in node.rig.meters]),
            source="simulated", made_at=datetime.fromtimestamp(0, UTC).isoformat(timespec="seconds"),
            command=f"{sim.how_to_profile} --seed {self.seed} --seed-boards {self.seed}{self._mix_told}"
            + (" --count-experts" if counted is not None else ""),
            routing=RoutingReference.of(counted) if counted is not None else None,
        )  # fmt: skip

    def _plan(self, sim: Simulation) -> SweepPlan:
        told = {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        own = {name: tokens for name, tokens in told.items() if tokens is not None}
        return replace(plan_of(sim, seed=self.seed), mixes=default_mixes(sim.model_context, **own))

    @property
    def _mix_told(self) -> str:
        """The mix as options of the command."""
        told = (("--prompt-tokens", self.prompt_tokens), ("--output-tokens", self.output_tokens))
        return "".join(f" {option} {tokens:g}" for option, tokens in told if tokens is not None)


def model_of(name: str) -> tuple[str, str]:
    """The `model` and `sizes` of an `EngineCase`: of a shipped model by a name that may stop short, or of a folder.

    Raises:
        ConfigError: neither, or its config.json cannot be read.
    """
    model, config = read_config(name)
    if not Path(name).is_dir():
        return model, ""
    return str(Path(model).resolve()), sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` as long as the context; the kernel frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
