"""A profile: measured rows, the parameters fitted to them, and how far they may be trusted; at most 8 KB of JSON, and 1 KB for the routing of experts.

Nothing is fitted when a file is read. Field by field: docs/models/profile.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from pals.core.errors import ConfigError
from pals.core.load import Load, Mix
from pals.core.plain import decode
from pals.core.quantities import FINGERPRINT_ADDED, Fingerprint, OperatingPoint
from pals.core.routing_reference import RoutingReference
from pals.models.engine_facts import EngineFacts
from pals.models.fit import Calibration
from pals.models.fitted import Fitted, fit
from pals.models.observed import FIRST_NOISE, OBSERVED, UNSEEN
from pals.models.parameters import NAMES, deviations_of, values_by_name
from pals.models.row import ProfileRow

FORMAT = "pals-profile/2"
MOST_BYTES = 8192
DIGITS = 5  # significant, of what was fitted
ROW_DIGITS = 4  # of what was measured
MIN_ROWS = 8
WIDEST = 1e3  # that noise or width may be; far beyond either
COLUMNS = tuple(f.name for f in fields(ProfileRow))
_QUANTITIES = (*OBSERVED, *UNSEEN)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a sweep came to. Rows and parameters belong together: `Profile.of` fits, `from_json` reads."""

    fingerprint: Fingerprint
    facts: EngineFacts
    mixes: tuple[Mix, ...]
    rows: tuple[ProfileRow, ...]
    parameters: Mapping[str, float]
    calibration: Calibration
    source: str  # "measured" on silicon, "emulated" or "simulated"
    made_at: str  # ISO date
    command: str  # how to make it anew
    notes: tuple[str, ...] = ()  # what the sweep left out, how repeats drifted
    routing: RoutingReference | None = None  # of the sweep; None: a dense model, or its experts were not counted
    wider: float = 1.0  # factor on the intervals; of this use, not of the file

    @staticmethod
    def of(
        rows: Sequence[ProfileRow],
        mixes: Sequence[Mix],
        facts: EngineFacts,
        fingerprint: Fingerprint,
        *,
        source: str,
        made_at: str,
        command: str,
        notes: Sequence[str] = (),
        routing: RoutingReference | None = None,
    ) -> Profile:
        """Fit `rows`.

        Raises:
            ConfigError: too few rows, or scipy is not installed.
        """
        if len(rows) < MIN_ROWS:
            raise ConfigError(
                f"{len(rows)} rows are too few for a profile (need {MIN_ROWS}); let `pals profile` finish"
            )
        rows = [_rounded(r) for r in rows]
        fitted = fit(rows, mixes, facts)
        c = Calibration(*(np.array([_short(v) for v in values]) for values in fitted.calibration))
        return Profile(
            fingerprint=fingerprint, facts=facts, mixes=tuple(mixes), rows=tuple(rows),
            parameters={n: _short(v) for n, v in values_by_name(fitted.x).items()}, calibration=c, source=source,
            made_at=made_at, command=command, notes=tuple(notes), routing=routing,
        )  # fmt: skip

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """The measured configurations."""
        return tuple(r.point for r in self.rows)

    def model(self) -> Fitted:
        """The fitted model."""
        return self._fitted

    @cached_property
    def _fitted(self) -> Fitted:
        return Fitted(
            facts=self.facts, mixes=self.mixes, rows=self.rows, x=deviations_of(self.parameters),
            calibration=self.calibration, wider=self.wider,
        )  # fmt: skip

    def widened(self, factor: float) -> Profile:
        """The same with intervals `factor` times as wide: measured on something else, and accepted."""
        return replace(self, wider=self.wider * factor)

    def to_json(self) -> str:
        """The profile as JSON for people: one line a row, one a parameter."""
        columns = [name for name in COLUMNS if any(getattr(r, name) is not None for r in self.rows)]
        head = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in ("source", "made_at", "command")},
            "fingerprint": asdict(self.fingerprint),
            "facts": _plain_facts(self.facts),
            "mixes": [asdict(m) for m in self.mixes],
            "notes": list(self.notes),
            "intervals": {
                name: [_number(values[i]) for values in self.calibration] for i, name in enumerate(_QUANTITIES)
            },
            "parameters": dict(self.parameters),
            **({"routing": asdict(self.routing)} if self.routing is not None else {}),
            "columns": columns,
        }
        lines = [f" {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in head.items()]
        rows = ",\n".join(
            "  " + json.dumps([_integral(getattr(r, c)) for c in columns], separators=(",", ":")) for r in self.rows
        )
        return "{\n" + ",\n".join(lines) + f',\n "rows": [\n{rows}\n ]\n}}\n'

    @staticmethod
    def from_json(text: str, *, name: str = "profile", refit: bool = False) -> Profile:
        """Parse what `to_json` wrote; `refit`: leave its parameters aside and fit its rows anew.

        Raises:
            ConfigError: the text is no profile of this format; nothing was loaded.
        """
        try:
            data = json.loads(text, parse_constant=_refuse)
            if not isinstance(data, dict):
                raise ValueError("it holds no object")  # noqa: TRY004 - one kind for all that is wrong with a file
            written_as = data.pop("format", None)
            if written_as != FORMAT:
                raise ConfigError(
                    f"{name}: format {written_as!r}, expected {FORMAT!r}; make it anew with `pals profile`"
                )
            if not refit and set(data["parameters"]) != set(NAMES):
                odd = ", ".join(sorted(set(data["parameters"]) ^ set(NAMES)))
                raise ConfigError(
                    f"{name}: parameters missing or unknown: {odd}. Another version of PALS fitted it; nothing was loaded. "
                    "`pals profile refit FILE` fits its rows anew, without an engine"
                )
            return _read(data, refit=refit)
        except (TypeError, AttributeError, ValueError, KeyError, IndexError, ArithmeticError, RecursionError) as e:
            raise ConfigError(
                f"{name} is not a readable profile ({type(e).__name__}: {e}). Nothing was loaded; make it anew with `pals profile`"
            ) from e


def _read(data: dict[str, Any], *, refit: bool) -> Profile:
    """Raises `ValueError` and the like for anything that is not as `to_json` writes it."""
    known = {
        "source",
        "made_at",
        "command",
        "fingerprint",
        "facts",
        "mixes",
        "notes",
        "intervals",
        "parameters",
        "columns",
        "rows",
    }
    if odd := set(data) - {"routing"} ^ known:
        raise ValueError(f"{', '.join(sorted(odd))}: missing or unknown")
    columns = data["columns"]
    if unknown := set(columns) - set(COLUMNS):
        raise ValueError(f"columns {', '.join(sorted(unknown))} are unknown")
    rows = tuple(_row(columns, r, at=f"rows[{i}]") for i, r in enumerate(data["rows"]))
    if len(rows) < MIN_ROWS:
        raise ValueError(f"{len(rows)} rows are too few for a profile (need {MIN_ROWS})")
    mixes = decode(tuple[Mix, ...], data["mixes"], at="mixes")
    if bad := [i for i, r in enumerate(rows) if not 0 <= r.mix < len(mixes)]:
        raise ValueError(f"rows[{bad[0]}] names mix {rows[bad[0]].mix} of {len(mixes)}")
    facts = decode(EngineFacts, data["facts"], may_lack=FACTS_LACK, at="facts")
    fingerprint = decode(Fingerprint, data["fingerprint"], at="fingerprint", may_lack=FINGERPRINT_ADDED)
    source, made_at, command = (decode(str, data[k], at=k) for k in ("source", "made_at", "command"))
    notes = decode(tuple[str, ...], data["notes"], at="notes")
    routing = decode(RoutingReference | None, data.get("routing"), at="routing")
    if refit:
        return Profile.of(
            rows, mixes, facts, fingerprint, source=source, made_at=made_at, command=command, notes=notes, routing=routing
        )  # fmt: skip
    parameters = decode(dict[str, float], data["parameters"], at="parameters")
    deviations_of(parameters)
    found = Profile(
        fingerprint=fingerprint, facts=facts, mixes=mixes, rows=rows, parameters=parameters,
        calibration=_calibration(data["intervals"]), source=source, made_at=made_at, command=command, notes=notes,
        routing=routing,
    )  # fmt: skip
    _refuse_mute(found)
    return found


def _refuse_mute(p: Profile) -> None:
    """Raise `ValueError` where no figure follows from facts and parameters: here it is a message, in a controller a crash."""
    try:
        with np.errstate(all="ignore"):
            told = [p.model().told([p.rows[0].point], Load(mix=mix)) for mix in p.mixes]
            told.append(p.model().covariance)  # and with an interval, which every row has a part in
    except (ArithmeticError, IndexError, ValueError) as e:
        raise ValueError(f"no prediction follows from its facts and parameters: {e}") from e
    if not all(np.isfinite(part).all() for part in told):
        raise ValueError("no finite prediction follows from its facts and parameters")


#: Fields that stand at their default where a file leaves them out.
FACTS_LACK = frozenset(
    {
        "shape",
        "popularity",
        "tied",
        "window",
        "window_layers",
        "chunked_layers",
        "attention_format",
        "ffn_format",
        "expert_format",
    }
)


def _row(columns: Sequence[str], values: Sequence[Any], *, at: str) -> ProfileRow:
    if len(values) != len(columns):
        raise ValueError(f"{at} has {len(values)} values, not {len(columns)}")
    for name, value in zip(columns, values, strict=True):
        if type(value) not in _TYPES[name] or (isinstance(value, int) and value.bit_length() > 63):
            raise ValueError(f"{at}.{name} is {str(value)[:60]!r}, no number of the kind it must be")
    return ProfileRow(**dict(zip(columns, values, strict=True)))


#: What JSON may hold in each column: a whole number, a number, or nothing where that means unknown.
_TYPES: dict[str, tuple[type, ...]] = {
    f.name: (int, *((float,) if "float" in str(f.type) else ()), *((type(None),) if "None" in str(f.type) else ()))
    for f in fields(ProfileRow)
}


def _calibration(table: Any) -> Calibration:
    if set(table) != set(_QUANTITIES):
        raise ValueError(f"intervals {', '.join(sorted(set(table) ^ set(_QUANTITIES)))}: missing or unknown")
    rows = [decode(tuple[float | None, ...], table[name], at=f"intervals.{name}") for name in _QUANTITIES]
    values = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
    if (
        values.shape != (len(FIRST_NOISE), len(Calibration._fields))
        or not ((values[:, :2] > 0) & (values[:, :2] < WIDEST)).all()
    ):
        raise ValueError(f"intervals need noise and width between 0 and {WIDEST:g}, and two errors, of each quantity")
    return Calibration(*values.T)


def _plain_facts(facts: EngineFacts) -> dict[str, Any]:
    """Without what stands at its default."""
    plain = asdict(facts)
    if facts.shape is not None:
        defaults = {f.name: f.default for f in fields(facts.shape)}
        plain["shape"] = {k: _integral(v) for k, v in plain["shape"].items() if v != defaults[k]}
    return {k: v for k, v in plain.items() if v is not None}


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _rounded(row: ProfileRow) -> ProfileRow:
    shorter: dict[str, Any] = {k: _short(v, ROW_DIGITS) for k, v in asdict(row).items() if isinstance(v, float)}
    return replace(row, **shorter)


def _short(value: float, digits: int = DIGITS) -> float:
    return float(f"{value:.{digits}g}")


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON; unknown values are null, never NaN")
