"""Random arrivals: what a profile, learned from a closed loop, says of an open one, against the simulated replica; simulated.

For each engine: the default sweep on a plant with moved constants, then Poisson arrivals at shares of the predicted capacity under three
settings. Prints relative errors of power, throughput and latency, and their means.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.experiments.profile_checks.combination import Combination, simulation_of
from pals.experiments.simulated_profile import plan_of, simulated_sweep
from pals.experiments.simulated_run import Simulation
from pals.models.fitted import Fitted, fit
from pals.plant.workload import Workload

ENGINES = (
    ("mistralai/Mixtral-8x7B-v0.1", "4xa100-sxm4-80gb"),
    ("Qwen/Qwen3-30B-A3B", "h100-sxm5-80gb"),
    ("meta-llama/Llama-3.1-8B", "h100-sxm5-80gb"),
)
SHARES = (0.1, 0.3, 0.5, 0.7, 0.85)
WARM_S, SPAN_S = 60.0, 600.0
QUANTITIES = ("power_w", "tokens_per_s", "tpot_p50_s", "tpot_p95_s", "ttft_p50_s", "ttft_p95_s")


class Served(NamedTuple):
    """What a window of random arrivals came to."""

    arriving: float  # prompt tokens per second
    figures: dict[str, float]  # of QUANTITIES


def main() -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--seed", type=int, default=1, help="of plant, sweep and arrivals (default 1)")
    args = p.parse_args()
    errors: dict[float, list[list[float]]] = {share: [] for share in SHARES}
    inside: list[list[bool]] = []
    print(f"{'engine':22}{'limit':>7}{'lock':>6}{'load':>6}" + "".join(f"{q:>14}" for q in QUANTITIES))
    for model, boards in ENGINES:
        sim = simulation_of(Combination(model=model, boards=boards, seed=args.seed))
        mix = plan_of(sim).mixes[0]
        swept = simulated_sweep(sim, fit=fit, seed=args.seed)
        fitted = fit(swept.rows, swept.mixes, swept.facts)
        top_w, top_mhz = sim.spec.default_limit_w, sim.spec.max_sm_clock_mhz
        for limit_w, lock in ((top_w, None), (0.5 * top_w, None), (top_w, 15 * round(0.04 * top_mhz))):
            point = OperatingPoint(power_limit_w=limit_w, sm_clock_mhz=lock, active_sequences=sim.max_num_seqs)
            capacity = float(fitted.forecast([point], Load(mix=mix)).tokens_per_s.value[0])
            for share in SHARES:
                served = serve(sim, point, mix, requests_per_s=share * capacity / mix.output_tokens, seed=args.seed)
                off, held = judged(fitted, point, mix, served)
                errors[share].append(off)
                inside.append(held)
                name = model.split("/")[-1]
                print(
                    f"{name:22}{limit_w:7.0f}{lock or '-':>6}{share:6.2f}" + "".join(f"{100 * e:+13.1f}%" for e in off)
                )
    for share, rows in errors.items():
        print(
            f"mean absolute, load {share:4.2f}{'':17}" + "".join(f"{100 * e:13.1f}%" for e in np.abs(rows).mean(axis=0))
        )
    held = np.array(inside).mean(axis=0)
    print(f"{'truth in the 90 % interval':41}" + "".join(f"{100 * h:13.0f}%" for h in held))


def serve(sim: Simulation, point: OperatingPoint, mix: Mix, *, requests_per_s: float, seed: int) -> Served:
    """Poisson arrivals for `SPAN_S` after a warm-up."""
    rng = np.random.default_rng([seed, 11])
    count = int(1.2 * requests_per_s * (WARM_S + SPAN_S)) + 10
    low, high = 1.0 - mix.spread, 1.0 + mix.spread

    def lengths(mean: float) -> NDArray[np.int32]:
        return np.asarray(np.maximum(1, np.rint(mean * rng.uniform(low, high, count))), dtype=np.int32)

    arrival_s = np.cumsum(rng.exponential(1.0 / requests_per_s, count))
    prompt, output = lengths(mix.prompt_tokens), lengths(mix.output_tokens)
    replica = sim.replica()
    replica.set_limit_w(point.power_limit_w)
    replica.set_clock_lock(point.sm_clock_mhz)
    replica.submit(
        Workload(
            name=mix.name, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output,
            prefix_tokens=np.zeros(count, np.int32),
        )
    )  # fmt: skip
    replica.advance(WARM_S)
    before, before_j = replica.counters(), replica.energy_j()
    replica.advance(WARM_S + SPAN_S)
    after, times = replica.counters(), replica.results()
    begun, ended = times.first_token_s > WARM_S, (times.last_token_s > WARM_S) & (output > 1)
    ttft_s = (times.first_token_s - arrival_s)[begun]
    tpot_s = (times.last_token_s - times.first_token_s)[ended] / (output[ended] - 1)
    figures = (
        (replica.energy_j() - before_j) / SPAN_S,
        (after.output_tokens - before.output_tokens) / SPAN_S,
        *np.percentile(tpot_s, [50, 95]),
        *np.percentile(ttft_s, [50, 95]),
    )
    arriving = (after.arrived_prompt_tokens - before.arrived_prompt_tokens) / SPAN_S
    return Served(arriving, dict(zip(QUANTITIES, map(float, figures), strict=True)))


def judged(fitted: Fitted, point: OperatingPoint, mix: Mix, served: Served) -> tuple[list[float], list[bool]]:
    """Predicted over served, less 1, of each of QUANTITIES, and whether the truth lies in the 90 % interval."""
    told = fitted.forecast([point], Load(mix=mix, prefill_tokens_per_s=served.arriving))
    estimates = [(getattr(told, q), served.figures[q]) for q in QUANTITIES]
    off = [float(e.value[0]) / truth - 1.0 for e, truth in estimates]
    return off, [bool(e.low[0] <= truth <= e.high[0]) for e, truth in estimates]


if __name__ == "__main__":
    main()
