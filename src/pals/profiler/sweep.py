"""The sweep behind `pals profile`: visit limit or clock × active sequences under saturating load, keep each row at once.

Rows already in the partial file are not measured again, so Ctrl-C loses at most the point being measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from pals.core.errors import ConfigError, DeviceLostError, ProfileMismatchError
from pals.core.protocols import EngineActuator
from pals.core.quantities import Fingerprint, OperatingPoint, TelemetrySample
from pals.models.profile import ProfileRow
from pals.runtime.loop import GridClock
from pals.runtime.tick import Rig, mean_power_w, read_sample


class LoadDriver(Protocol):
    """Keeps requests in flight."""

    def set_concurrency(self, n: int) -> None:
        """Keep `n` requests in flight from now on."""
        ...


class Interrupted(Exception):
    """The sweep was told to stop; the rows so far are in the partial file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """Which points, and how long at each."""

    limits_w: tuple[float, ...]
    sequences: tuple[int, ...]
    clocks_mhz: tuple[int, ...] = ()  # locked in turn, at `found_limit_w`
    found_limit_w: float | None = None  # None: the highest of `limits_w`
    settle_s: float = 3.0
    window_s: float = 8.0

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """All points; few sequences first (an engine fills faster than it drains), high limits and clocks first."""
        found_w = self.found_limit_w if self.found_limit_w is not None else max(self.limits_w)
        levels: list[tuple[float, int | None]] = [(w, None) for w in sorted(self.limits_w, reverse=True)]
        levels += [(found_w, mhz) for mhz in sorted(self.clocks_mhz, reverse=True)]
        return tuple(
            OperatingPoint(power_limit_w=w, sm_clock_mhz=mhz, active_sequences=n)
            for n in sorted(self.sequences)
            for w, mhz in levels
        )

    @property
    def seconds_per_point(self) -> float:
        """Least time a point takes."""
        return self.settle_s + self.window_s


def default_limits_w(min_w: float, max_w: float) -> tuple[float, ...]:
    """Six limits from the boards' floor region to the ceiling: 37.5, 50, 62.5, 75, 87.5 and 100 % of the ceiling."""
    wanted = [round(max_w * share / 5) * 5.0 for share in (0.375, 0.5, 0.625, 0.75, 0.875, 1.0)]
    return tuple(sorted({max(min_w, min(max_w, w)) for w in wanted}))


def default_sequences(launch: int) -> tuple[int, ...]:
    """Powers of two from 4 up to the launch limit, and the launch limit itself."""
    return tuple(sorted({n for n in (4, 8, 16, 32, 64, 128, 256, 512) if n < launch} | {launch}))


class PartialRows:
    """The rows measured so far, in a JSON-lines file headed by the fingerprint and the load."""

    def __init__(self, path: Path, fingerprint: Fingerprint, load: str) -> None:
        self._path = path
        head: dict[str, object] = {"fingerprint": asdict(fingerprint), "load": load}
        self.rows: list[ProfileRow] = []
        if path.exists():
            self._read(head, fingerprint)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(head) + "\n")

    def _read(self, head: dict[str, object], fingerprint: Fingerprint) -> None:
        lines = self._path.read_text().splitlines()
        try:
            found = json.loads(lines[0])
            differences = Fingerprint(**found["fingerprint"]).differences(fingerprint)
            self.rows = [ProfileRow(**json.loads(line)) for line in lines[1:] if line.endswith("}")]
        except (IndexError, KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"{self._path} is damaged ({e}); remove it to start the sweep anew") from e
        if differences or found["load"] != head["load"]:
            told = "\n  ".join(differences) or f"load: {found['load']!r} before, {head['load']!r} now"
            raise ProfileMismatchError(
                f"{self._path} holds rows of another sweep; it was left alone:\n  {told}\nRemove it, or choose another --out"
            )

    def add(self, row: ProfileRow) -> None:
        """Keep one row."""
        self.rows.append(row)
        with self._path.open("a") as f:
            f.write(json.dumps(row.to_dict()) + "\n")

    def has(self, point: OperatingPoint) -> bool:
        """Whether `point` was measured already."""
        return any(
            (r.active_sequences, r.requested_clock_mhz) == (point.active_sequences, point.sm_clock_mhz)
            and abs(r.power_limit_w - point.power_limit_w) < 0.5
            for r in self.rows
        )

    def discard(self) -> None:
        """Remove the file, once the profile is written."""
        self._path.unlink(missing_ok=True)


def sweep(
    rig: Rig,
    plan: SweepPlan,
    *,
    load: LoadDriver,
    partial: PartialRows,
    clock: GridClock,
    progress: Callable[[OperatingPoint, ProfileRow | None], None],
) -> list[ProfileRow]:
    """Measure every point of `plan` that `partial` lacks; return all rows.

    Raises:
        Interrupted: the clock said stop.
        EngineGoneError, PermissionDeniedError, DeviceLostError: as the parts raise them.
    """
    if rig.setter is None or not rig.actuators:
        raise ConfigError(
            "a sweep writes limits: it needs --mode auto and a process that may write; nothing was changed"
        )
    for point in plan.points:
        if partial.has(point):
            progress(point, None)
            continue
        row = measure_point(rig, rig.setter, point, plan, load, clock)
        partial.add(row)
        progress(point, row)
    return partial.rows


def measure_point(
    rig: Rig, setter: EngineActuator, point: OperatingPoint, plan: SweepPlan, load: LoadDriver, clock: GridClock
) -> ProfileRow:
    """Go to `point`, wait until it has settled, and measure it for the plan's window."""
    sequences = point.active_sequences or rig.guard.launch_sequences
    accepted_w = min(a.apply(point).power_limit_w for a in rig.actuators)
    load.set_concurrency(sequences + max(2, sequences // 8))
    lease_s = 10 * plan.seconds_per_point
    setter.apply(sequences, lease_s=lease_s)
    _wait(clock, plan.settle_s)
    for _ in range(40):  # let a larger batch drain, a smaller one fill
        if rig.engine.read().running in (sequences, sequences - 1):
            break
        _wait(clock, 0.5)
    first = _read(rig, clock)
    _wait(clock, plan.window_s)
    last = _read(rig, clock)
    return _row(replace(point, power_limit_w=accepted_w, active_sequences=sequences), first, last)


def _wait(clock: GridClock, seconds: float) -> None:
    if clock.wait(seconds):
        raise Interrupted


def _read(rig: Rig, clock: GridClock) -> TelemetrySample:
    notes: list[str] = []
    sample = read_sample(rig, None, clock.now_s(), notes)
    if sample.absent:  # a row of the other boards alone would be false
        raise DeviceLostError("; ".join(notes))
    return sample


def _row(point: OperatingPoint, first: TelemetrySample, last: TelemetrySample) -> ProfileRow:
    limit_w, sequences = point.power_limit_w, point.active_sequences or 0
    power_w = mean_power_w(first.boards, last.boards)
    window_s = last.time_s - first.time_s
    if power_w is None or first.engine is None or last.engine is None:
        raise ConfigError("the boards' energy counters stood still during the window; lengthen it with --window-s")
    tokens = last.engine.output_tokens - first.engine.output_tokens
    if tokens <= 0:
        raise ConfigError(
            f"no token came out in {window_s:.1f} s at {limit_w:.0f} W and {sequences} sequences: does the load reach "
            "this engine? The rows so far are kept"
        )
    return ProfileRow(
        power_limit_w=limit_w,
        active_sequences=sequences,
        power_w=round(power_w, 2),
        tokens_per_s=round(tokens / window_s, 2),
        sm_clock_mhz=min(b.sm_clock_mhz for b in last.boards),
        window_s=round(window_s, 3),
        requested_clock_mhz=point.sm_clock_mhz,
    )
