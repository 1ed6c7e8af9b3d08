"""A profile: measured rows of limit or SM clock × active sequences on one engine and board, and small models fitted to them.

Model: power = boards · the soft minimum of limit and natural draw(n) (`soft_limit`); throughput = exp of a quadratic in
(log of that power per board, log n). Both are inert far above natural draw, as boards are. Rows under a clock lock have
a model of their own (`clock_model`); where a limit binds too, the smaller figures of the two count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import ConfigError
from pals.core.plain import decode
from pals.core.quantities import FINGERPRINT_ADDED, Fingerprint, OperatingPoint, Prediction, refuse_nan
from pals.models.clock_model import ClockModel, fit_clocks
from pals.models.soft_limit import SoftLimit, fit_soft_limit

FORMAT = "pals-profile/1"
MIN_ROWS = 8
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRow:
    """One measured point: the engine had more work than `active_sequences` for `window_s` seconds."""

    power_limit_w: float  # per board, as enforced
    active_sequences: int
    power_w: float  # all boards, mean
    tokens_per_s: float  # output tokens
    sm_clock_mhz: int  # as measured
    window_s: float
    requested_clock_mhz: int | None = None  # None: no lock

    @property
    def point(self) -> OperatingPoint:
        """The configuration measured."""
        return OperatingPoint(
            power_limit_w=self.power_limit_w,
            sm_clock_mhz=self.requested_clock_mhz,
            active_sequences=self.active_sequences,
        )

    def to_dict(self) -> dict[str, float]:
        """The row for a file; what is unknown is left out."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def __post_init__(self) -> None:
        refuse_nan(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Rows, what they were measured on, and under which load; predicts any point within the measured grid."""

    fingerprint: Fingerprint
    rows: tuple[ProfileRow, ...]
    source: str  # "measured" on silicon or "emulated"
    load: str  # one line: prompts, outputs, where from
    made_at: str  # ISO date
    command: str  # how to make it anew

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """The measured configurations."""
        return tuple(r.point for r in self.rows)

    def model(self) -> FittedModel:
        """Fit the rows; raises `ConfigError` where there are too few."""
        return fit(self.rows, boards=self.fingerprint.boards)

    def to_json(self) -> str:
        """The profile as indented JSON, with the fit's residuals for the reader."""
        residuals = {k: v for k, v in asdict(self.model().residuals).items() if v is not None}
        data = {"format": FORMAT, **asdict(self), "fit": residuals}
        head = json.dumps({k: v for k, v in data.items() if k != "rows"}, indent=1)
        rows = ",\n  ".join(json.dumps(r.to_dict()) for r in self.rows)
        return head[:-2] + f',\n "rows": [\n  {rows}\n ]\n}}\n'

    @staticmethod
    def from_json(text: str, *, name: str = "profile") -> Profile:
        """Parse what `to_json` wrote.

        Raises:
            ConfigError: the text is no profile of this format; nothing was loaded.
        """
        try:
            data = json.loads(text)
            written_as = data.pop("format", None)
            if written_as != FORMAT:
                raise ConfigError(
                    f"{name}: format {written_as!r}, expected {FORMAT!r}; make it anew with `pals profile`"
                )
            data.pop("fit", None)  # for the reader; computed anew from the rows
            return decode(Profile, data, may_lack={"requested_clock_mhz", *FINGERPRINT_ADDED})  # type: ignore[no-any-return]
        except (TypeError, AttributeError, ValueError, RecursionError) as e:
            raise ConfigError(
                f"{name} is not a readable profile ({type(e).__name__}: {e}); make it anew with `pals profile`"
            ) from e


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """Mean absolute relative errors of the fit over its own rows (in sample)."""

    power_mape: float
    throughput_mape: float
    clock_power_mape: float | None = None  # of the rows under a clock lock; None without any
    clock_throughput_mape: float | None = None


@dataclass(frozen=True, slots=True)
class FittedModel:
    """The fitted model; a `PointModel` over the measured grid."""

    boards: int
    points: tuple[OperatingPoint, ...]
    power: SoftLimit  # of one board
    throughput: tuple[float, ...]  # coefficients of log tokens/s in (1, x, y, x², xy, y²)
    n_range: tuple[int, int]
    residuals: Residuals
    clock: ClockModel | None = None  # None: no row was measured under a lock

    def natural_draw_w(self, active_sequences: int) -> float:
        """Draw of one board with no limit binding, W."""
        return float(self.power.natural_draw_w(self._measured(active_sequences))[0])

    def predict(self, point: OperatingPoint) -> Prediction:
        """Throughput and power of all boards at `point` with enough work; `active_sequences` None means the largest.

        Raises:
            ValueError: `point` locks the clock and no row did.
        """
        n = point.active_sequences if point.active_sequences is not None else self.n_range[1]
        per_board_w = self.power.power_w(np.array([point.power_limit_w]), self._measured(n))
        features = _features(per_board_w, np.array([float(n)]))
        tokens_per_s = float(np.exp((features @ np.array(self.throughput))[0]))
        power_w = float(per_board_w[0]) * self.boards
        if point.sm_clock_mhz is not None:
            if self.clock is None:
                raise ValueError(f"no row of this profile locks the SM clock: {point.sm_clock_mhz} MHz is unknown")
            locked = self.clock.predict(np.array([float(point.sm_clock_mhz)]), np.array([float(n)]))
            tokens_per_s = min(tokens_per_s, float(locked[0][0]))
            power_w = min(point.power_limit_w * self.boards, float(locked[1][0]))
        return Prediction(point=point, tokens_per_s=tokens_per_s, power_w=power_w)

    def _measured(self, active_sequences: int) -> FloatArray:
        """`active_sequences` clipped to what was measured, shape (1,)."""
        return np.array([float(np.clip(active_sequences, *self.n_range))])


def _features(limit_w: FloatArray, n: FloatArray) -> FloatArray:
    x, y = np.log(limit_w / 200.0), np.log(n / 16.0)
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)


def fit(rows: Sequence[ProfileRow], *, boards: int) -> FittedModel:
    """Least squares in logs over `rows`; those under a clock lock apart.

    Raises:
        ConfigError: fewer than `MIN_ROWS` rows without a lock, a single active-sequence level of them, or a row with a
            figure that is not above 0.
    """
    for i, r in enumerate(rows, start=1):
        if min(r.power_limit_w, r.active_sequences, r.power_w, r.tokens_per_s, r.requested_clock_mhz or 1) <= 0:
            raise ConfigError(
                f"row {i} of the profile has a figure that is not above 0: {r.to_dict()}; measure it anew"
            )
    every, rows = rows, [r for r in rows if r.requested_clock_mhz is None]
    levels = sorted({r.active_sequences for r in rows})
    if len(rows) < MIN_ROWS or len(levels) < 2:
        raise ConfigError(
            f"{len(rows)} rows without a clock lock at {len(levels)} active-sequence levels are too few to fit (need {MIN_ROWS} and 2); "
            "let `pals profile` finish"
        )
    n = np.array([float(r.active_sequences) for r in rows])
    limit_w = np.array([r.power_limit_w for r in rows])
    power = np.array([r.power_w for r in rows])
    model = fit_soft_limit(power_limit_w=limit_w, active_sequences=n, power_w=power / boards)
    effective_w = model.power_w(limit_w, n)
    tokens = np.array([r.tokens_per_s for r in rows])
    features = _features(effective_w, n)
    coefficients, *_ = np.linalg.lstsq(features, np.log(tokens), rcond=None)
    clock, clock_residuals = _fit_locked([r for r in every if r.requested_clock_mhz is not None])
    return FittedModel(
        boards=boards,
        points=tuple(r.point for r in every),
        power=model,
        throughput=tuple(float(c) for c in coefficients),
        n_range=(levels[0], levels[-1]),
        residuals=Residuals(
            power_mape=float(np.mean(np.abs(effective_w * boards / power - 1))),
            throughput_mape=float(np.mean(np.abs(np.exp(features @ coefficients) / tokens - 1))),
            **clock_residuals,
        ),
        clock=clock,
    )


def _fit_locked(rows: Sequence[ProfileRow]) -> tuple[ClockModel | None, dict[str, float]]:
    """The model of the rows under a lock, and its mean errors."""
    if not rows:
        return None, {}
    mhz = np.array([float(r.requested_clock_mhz or 0) for r in rows])
    n = np.array([float(r.active_sequences) for r in rows])
    tokens, power = np.array([r.tokens_per_s for r in rows]), np.array([r.power_w for r in rows])
    model = fit_clocks(sm_clock_mhz=mhz, active_sequences=n, tokens_per_s=tokens, power_w=power)
    told_tokens, told_power = model.predict(mhz, n)
    return model, {
        "clock_power_mape": float(np.mean(np.abs(told_power / power - 1))),
        "clock_throughput_mape": float(np.mean(np.abs(told_tokens / tokens - 1))),
    }
