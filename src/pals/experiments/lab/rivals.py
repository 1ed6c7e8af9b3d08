"""Which policies an experiment can run: those of the configuration, and rivals that know the truth of the simulated plant.

A policy of an experiment's usual list that this build does not have is left out, and the page says so; one that a user
names must exist.
"""

from __future__ import annotations

from collections.abc import Sequence

from pals.core.errors import ConfigError
from pals.experiments.lab.experiment import Wish
from pals.experiments.lab.truth import TRUTHFUL
from pals.runtime.config import POLICIES

BASELINE = "static"  # as found: highest limit, no lock, launch batch


def policies_of(wish: Wish, usual: Sequence[str]) -> tuple[str, ...]:
    """The policies to run, the baseline first: all others are compared with it.

    Raises:
        ConfigError: one that does not exist.
    """
    known = (*POLICIES, *TRUTHFUL)
    if unknown := [p for p in wish.policies if p not in known]:
        raise ConfigError(f"unknown policy {unknown[0]!r}; known: {', '.join(known)}. Nothing was run")
    wanted = wish.policies or tuple(p for p in usual if p in known)
    return (BASELINE, *(p for p in wanted if p != BASELINE))


def left_out(usual: Sequence[str]) -> str:
    """A sentence on those of `usual` that do not exist here; empty where there is none."""
    missing = [p for p in usual if p not in (*POLICIES, *TRUTHFUL)]
    return f"Left out, since this build has no such policy: {', '.join(missing)}." if missing else ""
