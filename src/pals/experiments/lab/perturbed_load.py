"""Loads that change in the middle: lengths that become others, and a crowd that comes on top for a while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pals.core.load import Mix
from pals.experiments.lab.loads import arrivals_of
from pals.plant.workload import Workload


def scaled(mix: Mix, factor: float) -> Mix:
    """Prompts and answers longer by `factor`."""
    return replace(
        mix, prompt_tokens=max(1.0, factor * mix.prompt_tokens), output_tokens=max(1.0, factor * mix.output_tokens)
    )


def shifted(mix: Mix, factor: float, *, at_s: float, rate_per_s: float, duration_s: float, seed: int) -> Workload:
    """Poisson arrivals of `mix`, whose lengths are `factor` times as long from `at_s` on; arrival times do not change by that."""
    first, then = (
        arrivals_of(m, rate_per_s=rate_per_s, duration_s=duration_s, seed=seed) for m in (mix, scaled(mix, factor))
    )
    before = first.arrival_s < at_s
    return merged([first.take(before), then.take(~before)])


def crowded(
    mix: Mix, factor: float, *, at_s: float, for_s: float, rate_per_s: float, duration_s: float, seed: int
) -> Workload:
    """Poisson arrivals of `mix`, `factor` times as many between `at_s` and `at_s + for_s`."""
    usual = arrivals_of(mix, rate_per_s=rate_per_s, duration_s=duration_s, seed=seed)
    crowd = arrivals_of(mix, rate_per_s=(factor - 1.0) * rate_per_s, duration_s=for_s, seed=seed + 1000)
    return merged([usual, replace(crowd, arrival_s=crowd.arrival_s + at_s)])


def merged(parts: Sequence[Workload]) -> Workload:
    """The requests of all `parts` in the order of their arrival."""
    arrival_s = np.concatenate([p.arrival_s for p in parts])
    order = np.argsort(arrival_s, kind="stable")
    prompt, output, prefix = (
        np.concatenate([getattr(p, name) for p in parts])[order]
        for name in ("prompt_tokens", "output_tokens", "prefix_tokens")
    )
    return Workload(
        name=parts[0].name, arrival_s=arrival_s[order], prompt_tokens=prompt, output_tokens=output, prefix_tokens=prefix
    )  # fmt: skip
