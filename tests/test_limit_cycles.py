"""At a constant load the pals policy comes to rest: no more than one change a minute once settled (simulated)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pals.core.errors import ConfigError
from pals.core.load import Mix
from pals.core.quantities import Slo, fingerprint_of
from pals.engines.model_zoo import model_names
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.loads import ClosedLoop, MixLengths, OpenLoop
from pals.experiments.lab.run import RunTask, run
from pals.experiments.scenarios import SCENARIOS
from pals.experiments.simulated_profile import plan_of, profiled_replica, simulated_sweep
from pals.experiments.simulated_run import Simulation, capacity_per_s
from pals.models.fitted import fit
from pals.models.profile import Profile
from pals.plant.workload import Workload, generated

CHAT = Mix(name="chat", prompt_tokens=600, output_tokens=150)
SETTLED_S, WATCHED_S = 300.0, 300.0
MOST_A_MINUTE = 1.0
SLO = Slo(ttft_p95_s=2.0, tpot_p95_s=0.1)
BOARDS = ("4xa100-sxm4-80gb", "h100-sxm5-80gb", "8xh200-sxm5-141gb")


def evenly(sim: Simulation, load: float) -> Workload:
    """Arrivals at equal distances, so that nothing but the policy moves."""
    lengths = MixLengths(mix=CHAT if sim.model_context > 2000 else replace(CHAT, prompt_tokens=300, output_tokens=80))
    rate = load * capacity_per_s(sim, lengths, np.random.default_rng(1))
    count = int(rate * (SETTLED_S + WATCHED_S))
    return generated("even", np.arange(1, count + 1) / rate, lengths, np.random.default_rng(2))


def changes(sim: Simulation, profile: Profile, load: ClosedLoop | OpenLoop, slo: Slo = SLO) -> float:
    return run(RunTask(sim=sim, load=load, policy="pals", profile=profile, slo=slo)).figures.changes_per_min


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.slug)
def test_it_rests_on_the_engines_of_the_demo(scenario: object) -> None:
    assert isinstance(scenario, type(SCENARIOS[0]))
    sim = replace(EngineCase(model=scenario.model, boards=scenario.boards, seed=1).simulation(), perturb_seed=None)
    profile = Profile.from_json(scenario.profile.read_text(encoding="utf-8"))
    for load in (0.3, 0.7):
        even = OpenLoop(workload=evenly(sim, load), warmup_s=SETTLED_S, end_s=SETTLED_S + WATCHED_S)
        assert changes(sim, profile, even) <= MOST_A_MINUTE, f"open, {load:.0%}"
    for in_flight, share in ((16, None), (96, 0.8)):
        slo = replace(SLO, ttft_p95_s=None, throughput_share=share)
        closed = ClosedLoop(mix=CHAT, in_flight=in_flight, warmup_s=SETTLED_S, span_s=WATCHED_S)
        assert changes(sim, profile, closed, slo) <= MOST_A_MINUTE, f"closed, {in_flight}"


@pytest.mark.slow
@pytest.mark.parametrize("boards", BOARDS)
@pytest.mark.parametrize("model", model_names())
def test_it_rests_on_every_shipped_model_and_board(model: str, boards: str, tmp_path: Path) -> None:
    """Each engine on a plant of its own with a short sweep's profile."""
    case = EngineCase(model=model, boards=boards, seed=3)
    try:
        sim = case.simulation()
    except ConfigError:
        pytest.skip("the model does not fit these boards")
    swept = simulated_sweep(sim, fit=fit, seed=3, plan=plan_of(sim, points=24, seed=3))
    node = profiled_replica(sim, np.random.default_rng(3))
    profile = Profile.of(
        swept.rows, swept.mixes, swept.facts, fingerprint_of(sim.engine, [m.info for m in node.rig.meters]), source="simulated",
        made_at="1970-01-01", command="a test",
    )  # fmt: skip
    for load in (0.3, 0.7):
        even = OpenLoop(workload=evenly(sim, load), warmup_s=SETTLED_S, end_s=SETTLED_S + WATCHED_S)
        assert changes(sim, profile, even) <= MOST_A_MINUTE, f"open, {load:.0%}"
