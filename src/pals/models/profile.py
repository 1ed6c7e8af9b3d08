"""A profile: measured rows of limit × active sequences on one engine and board, and a small model fitted to them.

Model: power = boards · min(limit, natural draw(n)), natural draw a quadratic in log n fitted to the rows of the
highest limit; throughput = exp of a quadratic in (log effective limit, log n), the effective limit being the smaller
of limit and natural draw. Both forms are inert above natural draw, as boards are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import ConfigError
from pals.core.quantities import Fingerprint, OperatingPoint, Prediction, refuse_nan

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
    sm_clock_mhz: int
    window_s: float

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
        return tuple(
            OperatingPoint(power_limit_w=r.power_limit_w, active_sequences=r.active_sequences) for r in self.rows
        )

    def model(self) -> FittedModel:
        """Fit the rows; raises `ConfigError` where there are too few."""
        return fit(self.rows, boards=self.fingerprint.boards)

    def to_json(self) -> str:
        """The profile as indented JSON, with the fit's residuals for the reader."""
        data = {"format": FORMAT, **asdict(self), "fit": asdict(self.model().residuals)}
        head = json.dumps({k: v for k, v in data.items() if k != "rows"}, indent=1)
        rows = ",\n  ".join(json.dumps(r) for r in data["rows"])
        return head[:-2] + f',\n "rows": [\n  {rows}\n ]\n}}\n'

    @staticmethod
    def from_json(text: str, *, name: str = "profile") -> Profile:
        """Parse what `to_json` wrote.

        Raises:
            ConfigError: the text is no profile of this format; nothing was loaded.
        """
        try:
            data = json.loads(text)
            if data.get("format") != FORMAT:
                raise ConfigError(
                    f"{name}: format {data.get('format')!r}, expected {FORMAT!r}; make it anew with `pals profile`"
                )
            return Profile(
                fingerprint=Fingerprint(**data["fingerprint"]),
                rows=tuple(ProfileRow(**r) for r in data["rows"]),
                **{f.name: data[f.name] for f in fields(Profile) if f.name not in ("fingerprint", "rows")},
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as e:
            raise ConfigError(
                f"{name} is not a readable profile ({type(e).__name__}: {e}); make it anew with `pals profile`"
            ) from e


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """Mean absolute relative errors of the fit over its own rows (in sample)."""

    power_mape: float
    throughput_mape: float


@dataclass(frozen=True, slots=True)
class FittedModel:
    """The fitted model; a `PointModel` over the measured grid."""

    boards: int
    points: tuple[OperatingPoint, ...]
    natural: tuple[float, ...]  # coefficients of log natural draw per board in log n
    throughput: tuple[float, ...]  # coefficients of log tokens/s in (1, x, y, x², xy, y²)
    n_range: tuple[int, int]
    residuals: Residuals

    def natural_draw_w(self, active_sequences: int) -> float:
        """Draw of one board with no limit binding, W."""
        n = float(np.clip(active_sequences, *self.n_range))
        return float(np.exp(np.polynomial.polynomial.polyval(np.log(n), self.natural)))

    def predict(self, point: OperatingPoint) -> Prediction:
        """Throughput and power of all boards at `point` with enough work; `active_sequences` None means the largest."""
        n = point.active_sequences if point.active_sequences is not None else self.n_range[1]
        per_board_w = min(point.power_limit_w, self.natural_draw_w(n))
        features = _features(np.array([per_board_w]), np.array([float(n)]))
        return Prediction(
            point=point,
            tokens_per_s=float(np.exp((features @ np.array(self.throughput))[0])),
            power_w=per_board_w * self.boards,
        )


def _features(limit_w: FloatArray, n: FloatArray) -> FloatArray:
    x, y = np.log(limit_w / 200.0), np.log(n / 16.0)
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)


def fit(rows: Sequence[ProfileRow], *, boards: int) -> FittedModel:
    """Least squares in logs over `rows`.

    Raises:
        ConfigError: fewer than `MIN_ROWS` rows or a single active-sequence level.
    """
    levels = sorted({r.active_sequences for r in rows})
    if len(rows) < MIN_ROWS or len(levels) < 2:
        raise ConfigError(
            f"{len(rows)} rows at {len(levels)} active-sequence levels are too few to fit (need {MIN_ROWS} and 2); "
            "let `pals profile` finish"
        )
    top_w = max(r.power_limit_w for r in rows)
    top = [r for r in rows if r.power_limit_w == top_w]
    degree = min(2, len({r.active_sequences for r in top}) - 1)
    natural = np.polynomial.polynomial.polyfit(
        np.log([float(r.active_sequences) for r in top]), np.log([r.power_w / boards for r in top]), max(degree, 0)
    )
    n = np.array([float(r.active_sequences) for r in rows])
    draw_w = np.exp(np.polynomial.polynomial.polyval(np.log(n), natural))
    effective_w = np.minimum(np.array([r.power_limit_w for r in rows]), draw_w)
    tokens = np.array([r.tokens_per_s for r in rows])
    features = _features(effective_w, n)
    coefficients, *_ = np.linalg.lstsq(features, np.log(tokens), rcond=None)
    power = np.array([r.power_w for r in rows])
    return FittedModel(
        boards=boards,
        points=tuple(OperatingPoint(power_limit_w=r.power_limit_w, active_sequences=r.active_sequences) for r in rows),
        natural=tuple(float(c) for c in natural),
        throughput=tuple(float(c) for c in coefficients),
        n_range=(levels[0], levels[-1]),
        residuals=Residuals(
            power_mape=float(np.mean(np.abs(effective_w * boards / power - 1))),
            throughput_mape=float(np.mean(np.abs(np.exp(features @ coefficients) / tokens - 1))),
        ),
    )
