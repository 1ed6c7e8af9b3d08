"""One line of the validation table, and the points behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pals.core.quantities import Checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual(Checked):
    """One measured point beside what the plant says of it."""

    group: str  # a curve or colour of the plot: a model, a board, an operation
    x: float  # what the plot's axis shows: batch, limit, clock, tokens
    measured: float
    predicted: float

    @property
    def error_pct(self) -> float:
        """Signed, % of the measured value."""
        return 100.0 * (self.predicted / self.measured - 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow(Checked):
    """One figure of the table; `value` is a mean absolute error in % unless `unit` says otherwise."""

    check: str  # e.g. "TPOT against batch, H100, held-out models"
    data: str  # folder under data/, and what was fitted on which part
    value: float
    worst: float  # of the same unit
    cases: int
    target: tuple[float, float]  # the value must lie inside; (0, 10) for an error of at most 10 %
    unit: str = "%"
    basis: str = "silicon"  # what the plant is compared with: "silicon", "emulated"
    note: str = ""  # rows left out, and why; why a target is missed
    x_axis: str = ""
    in_sample: bool = False  # constants were fitted on these very rows
    residuals: tuple[Residual, ...] = ()

    @property
    def reached(self) -> bool:
        """Whether the target is reached."""
        return self.target[0] <= self.value <= self.target[1]

    @property
    def verdict(self) -> str:
        """What the table says."""
        return f"{'reached' if self.reached else 'MISSED'}{', in sample' if self.in_sample else ''}"


def error_row(
    check: str,
    data: str,
    residuals: Sequence[Residual],
    *,
    at_most: float,
    x_axis: str,
    note: str = "",
    in_sample: bool = False,
) -> CheckRow:
    """The row of a mean absolute percentage error.

    Raises:
        ValueError: there is no residual: a check without cases is no check.
    """
    if not residuals:
        raise ValueError(f"{check}: the data hold no case")
    errors = np.abs([r.error_pct for r in residuals])
    return CheckRow(
        check=check,
        data=data,
        value=float(errors.mean()),
        worst=float(errors.max()),
        cases=len(residuals),
        target=(0.0, at_most),
        note=note,
        x_axis=x_axis,
        in_sample=in_sample,
        residuals=tuple(residuals),
    )
