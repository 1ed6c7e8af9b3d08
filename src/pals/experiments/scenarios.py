"""What `pals demo` can show: a model on emulated boards, its committed profile, and a budget low enough to bite."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pals.core.errors import ConfigError
from pals.core.quantities import Slo
from pals.engines.model_zoo import full_name

TTFT_TARGET_S, TPOT_TARGET_S = 2.0, 0.1
HEADROOM = 1.15  # throughput target over what a load asks for on average


def slo_for(tokens_per_s: float) -> Slo:
    """Targets for a load that asks for so many output tokens per second, where nobody gave others."""
    target = HEADROOM * tokens_per_s
    return Slo(
        throughput_tokens_s=round(target) if target >= 10 else float(f"{target:.2g}"),
        ttft_p95_s=TTFT_TARGET_S,
        tpot_p95_s=TPOT_TARGET_S,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One model on one set of emulated boards."""

    model: str  # as on the hub
    boards: str  # as for --emulate
    title: str  # boards as a person writes them
    high_budget_w: float  # all boards; does not bind
    low_budget_w: float  # all boards; well below what this load draws by default
    load: float  # arrivals as a share of the trace's own rate: two thirds or so of what the engine can answer

    @property
    def slug(self) -> str:
        """The scenario as part of a file name."""
        return f"{self.model.split('/')[-1].lower()}-{self.boards}"

    @property
    def profile(self) -> Path:
        """The committed profile."""
        return Path(str(files("pals.experiments") / "data" / f"profile-{self.slug}.json"))


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        model="mistralai/Mixtral-8x7B-v0.1",
        boards="4xa100-sxm4-80gb",
        title="4 × A100 SXM4 80 GB",
        high_budget_w=1600.0,
        low_budget_w=800.0,
        load=0.8,
    ),
    Scenario(
        model="Qwen/Qwen3-30B-A3B",
        boards="h100-sxm5-80gb",
        title="1 × H100 SXM5 80 GB",
        high_budget_w=700.0,
        low_budget_w=360.0,
        load=0.9,
    ),
    Scenario(
        model="deepseek-ai/DeepSeek-V3",
        boards="8xh200-sxm5-141gb",
        title="8 × H200 SXM5 141 GB",
        high_budget_w=5600.0,
        low_budget_w=2800.0,
        load=0.5,
    ),
)


def scenario_of(model: str | None) -> Scenario:
    """The scenario of `model` (None: the first); the name may stop short where that is unambiguous.

    Raises:
        ConfigError: no scenario for that model.
    """
    if model is None:
        return SCENARIOS[0]
    name = full_name(model)
    for scenario in SCENARIOS:
        if scenario.model == name:
            return scenario
    known = ", ".join(s.model for s in SCENARIOS)
    raise ConfigError(
        f"the demo has no profile for {name}; it shows {known}. For others: `pals serve {name} --emulate …`, then `pals profile`. "
        "Nothing was started"
    )
