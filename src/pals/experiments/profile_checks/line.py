"""One line of the table: a figure over many cases beside its target and the rivals' figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pals.core.quantities import Checked
from pals.experiments.profile_checks.own import OWN

TIE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Line(Checked):
    """Mean over cases, with median and worst; where methods are compared, the least figure wins."""

    section: str
    basis: str  # "simulated" or "silicon"
    check: str
    cases: int
    value: float  # the mean over cases, unless the check says otherwise
    median: float
    worst: float
    unit: str = "%"
    target: tuple[float, float] | None = None  # the value must lie inside; None: shown for itself
    beside: float | None = None  # of the profile, on the cases that the rivals were judged on
    rivals: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None: there is none."""
        return None if self.target is None else self.target[0] <= self.value <= self.target[1]

    @property
    def verdict(self) -> str:
        """What the table says."""
        return {None: "", True: "reached", False: "MISSED"}[self.reached]

    @property
    def winners(self) -> tuple[str, ...]:
        """Who has the least figure, on the same rows of the same cases; empty: nobody was compared."""
        if not self.rivals or self.beside is None:
            return ()
        compared = {OWN: self.beside, **self.rivals}
        least = min(compared.values())
        return tuple(name for name, value in compared.items() if value <= least + TIE)

    def to_dict(self) -> dict[str, Any]:
        """For a file; figures to four digits."""
        return {
            "section": self.section, "basis": self.basis, "check": self.check, "cases": self.cases,
            "value": _short(self.value), "median": _short(self.median), "worst": _short(self.worst), "unit": self.unit,
            "target": list(self.target) if self.target else None, "reached": self.reached,
            "same_cases": None if self.beside is None else _short(self.beside),
            "rivals": {name: _short(value) for name, value in self.rivals.items()}, "winners": list(self.winners),
            "note": self.note,
        }  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.4g}")
