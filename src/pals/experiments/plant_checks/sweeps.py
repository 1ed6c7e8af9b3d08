"""Measured sweeps of a power limit or a clock lock: reading them, and which two rows of each calibrate.

The rule is the same for every sweep and looks at no error: the highest setting, and the one nearest to the lowest plus a
sixth of the range (600 and 350 W where the limits run from 300 to 600 W). All other rows are predicted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals.experiments.plant_checks.measured import read_table

Floats = NDArray[np.float64]

LOW_POINT = 1.0 / 6.0  # of the range of settings
MMBT, CLUB = "mmbt-vllm-powercap", "club3090-powercap"
#: What the table of clock locks leaves to its README.
LOCK_GRID_MODEL, LOCK_GRID_GPU, LOCK_GRID_STREAMS = "Gemma-4-31B INT4 + MTP", "RTX 5090", 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One engine, model and load at several settings of one knob, rising."""

    data: str  # folder under data/
    name: str
    gpu: str
    kind: str  # "dense", "moe"
    phase: str  # "decode", "prefill"
    model: str
    lock: bool  # the knob is the SM clock; else the power limit
    setting: Floats  # W or MHz
    tokens_s: Floats
    draw_w: Floats
    clock_mhz: Floats  # NaN where it was not measured
    p99_w: Floats  # of the draw; NaN where it was not measured
    memory_share: float = 1.0  # of the board's top memory clock
    streams: int = 1  # requests in flight

    @property
    def key(self) -> str:
        """What it is called in the file of constants."""
        return f"{self.data}/{self.name}"

    @property
    def board(self) -> str:
        """The name of its board type among the plant's."""
        words = self.gpu.lower().split()
        return "-".join(words[:3] if "pro" in words else words[:2])

    @property
    def one_after_the_other(self) -> bool:
        """Whether a step is a sequence of unlike kernels (prefill; draft and verify), which do not overlap."""
        return self.phase == "prefill" or any(word in self.model for word in ("MTP", "EAGLE", "spec"))

    @property
    def x_axis(self) -> str:
        """What a plot's axis shows."""
        return "SM clock lock, MHz" if self.lock else "power limit, W"

    def calibration(self, low_point: float = LOW_POINT) -> NDArray[np.intp]:
        """Indices of the two calibration rows."""
        low = self.setting.min() + low_point * (self.setting.max() - self.setting.min())
        return np.unique([int(np.argmin(np.abs(self.setting - low))), len(self.setting) - 1])

    def rows_at(self, settings: Sequence[float]) -> NDArray[np.intp]:
        """Indices of the rows at these settings."""
        return np.flatnonzero(np.isin(self.setting, np.asarray(settings)))


def read_sweeps(folder: Path) -> list[Sweep]:
    """All sweeps at the boards' own memory clock.

    Raises:
        ConfigError: a file is missing, or lacks a column.
    """
    return [*_mmbt(folder), *_club(folder), *(s for s in read_lock_grid(folder) if s.memory_share == 1.0)]


def read_lock_grid(folder: Path) -> list[Sweep]:
    """The sweeps of the clock lock, one a memory clock; those below the top memory clock are never predicted."""
    t = read_table(
        folder / CLUB / "clock_lock_sweep_rtx5090.csv",
        ["sweep", "mem_mhz_locked", "sm_mhz_locked", "tps_narr", "tps_code", "draw_w"],
    )
    memory = np.asarray(t["mem_mhz_locked"], float)
    t |= {"tokens_s": _both_prompts(t), "setting": t["sm_mhz_locked"], "clock_mhz": t["sm_mhz_locked"]}
    fixed: dict[str, Any] = {
        "data": CLUB,
        "gpu": LOCK_GRID_GPU,
        "kind": "dense",
        "phase": "decode",
        "model": LOCK_GRID_MODEL,
    }
    fixed["streams"] = LOCK_GRID_STREAMS
    found = []
    for name, mhz in sorted(set(zip(t["sweep"], memory, strict=True))):
        rows = (t["sweep"] == name) & (memory == mhz)
        found.append(_sweep(t, rows, name=name, lock=True, memory_share=float(mhz / memory.max()), **fixed))
    return found


def _mmbt(folder: Path) -> list[Sweep]:
    t = read_table(
        folder / MMBT / "summary.csv",
        ["gpu", "model", "kind", "concurrency", "cap_w", "agg_tps", "power_mean_w", "power_p99_w", "sm_mhz_mean"],
    )
    t |= {"setting": t["cap_w"], "tokens_s": t["agg_tps"], "draw_w": t["power_mean_w"], "clock_mhz": t["sm_mhz_mean"]}
    t["p99_w"] = t["power_p99_w"]
    return [
        _sweep(
            t, rows, data=MMBT, name=f"{model}, {n} streams", gpu=gpu, kind=kind, phase="decode", model=model, lock=False,
            streams=int(n),
        )
        for (gpu, model, kind, n), rows in _groups(t, "gpu", "model", "kind", "concurrency")
    ]  # fmt: skip


def _club(folder: Path) -> list[Sweep]:
    names = ["sweep", "gpu", "model", "model_kind", "mode", "cap_w", "draw_w", "sm_mhz", "concurrency"]
    t = read_table(folder / CLUB / "power_cap_sweeps.csv", [*names, "tps_narr", "tps_code", "tps_prefill"])
    t["tokens_s"] = np.where(t["mode"] == "prefill", np.asarray(t["tps_prefill"], float), _both_prompts(t))
    t |= {"setting": t["cap_w"], "clock_mhz": t["sm_mhz"]}
    return [
        _sweep(
            t, rows, data=CLUB, name=f"{name}, {mode}", gpu=gpu, kind=kind, phase=mode, model=model, lock=False,
            streams=int(n),
        )
        for (name, gpu, kind, mode, model, n), rows in _groups(
            t, "sweep", "gpu", "model_kind", "mode", "model", "concurrency"
        )
    ]  # fmt: skip


def _both_prompts(t: dict[str, Any]) -> Floats:
    """Mean decode rate of the two prompt types of a point, tokens/s."""
    return np.asarray(0.5 * (np.asarray(t["tps_narr"], float) + np.asarray(t["tps_code"], float)))


def _groups(t: dict[str, Any], *names: str) -> list[tuple[tuple[Any, ...], NDArray[np.bool_]]]:
    members: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(*(t[n] for n in names), strict=True)):
        members[key].append(i)
    every = np.arange(len(t[names[0]]))
    return [(key, np.isin(every, rows)) for key, rows in members.items()]


def _sweep(t: dict[str, Any], rows: NDArray[np.bool_], **named: Any) -> Sweep:
    unknown = np.full(len(rows), np.nan)
    names = ("setting", "tokens_s", "draw_w", "clock_mhz", "p99_w")
    columns: dict[str, Any] = {n: np.asarray(t.get(n, unknown), float)[rows] for n in names}
    whole = np.isfinite(columns["tokens_s"]) & np.isfinite(columns["draw_w"])
    columns = {n: values[whole] for n, values in columns.items()}
    order = np.argsort(columns["setting"], kind="stable")
    return Sweep(**named, **{n: values[order] for n, values in columns.items()})
