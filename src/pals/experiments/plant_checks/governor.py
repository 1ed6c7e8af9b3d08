"""The governor against measured boards: the clocks a limit holds, how well it is kept, what a burst draws beyond it; and power.

Everything here comes out of a `BoardBank`, tick by tick; the references are read from the data folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from pals.experiments.plant_checks import kernel_power, silicon
from pals.experiments.plant_checks.measured import Table
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.experiments.plant_checks.silicon import B300, FOLDER, GEMM_MEMORY, H100, h100_rails, physics_constants
from pals.plant.boards import BoardBank
from pals.plant.governor import TICK_S
from pals.plant.silicon import Load, Silicon, core_power_w
from pals.plant.specs import BoardSpec, Variation, board_specs

SETTLE_S, MEASURE_S = 2.0, 2.0
BURST_LIMIT_W, BURST_S, BURSTS = 500.0, 0.5, 6
JOINED_TICKS = 5  # the instantaneous field of the measurement: a window of up to 50 ms
ClockLoad = Callable[[float], Load]


def check(folder: Path) -> list[CheckRow]:
    """Rows of the validation table; `folder` is the data folder."""
    rails, constants = h100_rails(folder), physics_constants(folder)
    h100, b300 = board_specs()["h100-sxm5-80gb"], board_specs()["b300-sxm-288gb"]
    jobs = (
        ("H100, ViT", h100, vit_on_h100(rails), constants[H100]["cap_to_sm_mhz_vit_tf32"]),
        ("B300, GEMM", b300, gemm_load(b300), constants[B300]["cap_to_sm_mhz_gemm_bf16"]),
    )
    clocks, means = [], []
    for name, spec, load, measured in jobs:
        for limit, mhz in measured.items():
            clock, mean_w = settled(spec, float(limit), load)
            clocks.append(Residual(group=name, x=float(limit), measured=float(mhz), predicted=clock))
            means.append((float(limit), mean_w))
    by_board = [[r for r in clocks if r.group == name] for name, *_ in jobs]
    return [
        error_row(
            "SM clock under a limit, H100", f"{FOLDER}; voltage fitted on these rows", by_board[0],
            at_most=5.0, x_axis="limit, W", in_sample=True, note="the job's two activities are those of the row that no limit binds",
        ),
        error_row(
            "SM clock under a limit, B300", f"{FOLDER}; voltage fitted on these rows", by_board[1],
            at_most=5.0, x_axis="limit, W", in_sample=True, note="linear voltage; the measured 1935 MHz at 900 W lies off any smooth curve",
        ),
        adherence_row(means),
        burst_row(b300, physics_constants(folder, "governor")["instant_peak_over_cap_ratio_for_50pct_duty"]),
        *silicon.check(folder),
        *kernel_power.check(folder),
    ]  # fmt: skip


def adherence_row(means: list[tuple[float, float]]) -> CheckRow:
    """Mean power less the limit, over the limits that bind."""
    bound = [(limit_w, mean_w) for limit_w, mean_w in means if mean_w > 0.98 * limit_w]
    off_w = np.array([mean_w - limit_w for limit_w, mean_w in bound])
    return CheckRow(
        check="mean power less a binding limit", data="published steady behaviour: -4 to +1 W; the governor was made to keep it",
        value=float(off_w.mean()), worst=float(off_w[np.argmax(np.abs(off_w))]), cases=len(off_w), target=(-4.0, 1.0), unit="W",
        note="H100 and B300, constant load", x_axis="limit, W", in_sample=True,
        residuals=tuple(Residual(group="limit", x=w, measured=w, predicted=m) for w, m in bound),
    )  # fmt: skip


def burst_row(spec: BoardSpec, measured: Mapping[str, float]) -> CheckRow:
    """Energy beyond the limit in a burst of matrix products of half a second, every other half second."""
    beyond_j, _ = bursts(spec, BURST_S)
    peaks = [
        f"{ms}: {bursts(spec, float(ms.removesuffix('ms')) / 1000.0)[1]:.0f} ({ratio * BURST_LIMIT_W:.0f})"
        for ms, ratio in measured.items()
    ]
    return CheckRow(
        check="energy beyond the limit in a burst, B300", data=f"published bursts under {BURST_LIMIT_W:.0f} W: about 21 J; the governor's constants were chosen on them",
        value=float(np.mean(beyond_j)), worst=float(max(beyond_j)), cases=len(beyond_j), target=(10.0, 35.0), unit="J",
        in_sample=True, note=f"highest mean over 50 ms by length of the burst, W (measured): {', '.join(peaks)}",
    )  # fmt: skip


def vit_on_h100(rails: Table) -> ClockLoad:
    """The job of the H100 rows: memory traffic follows the clock, activities are those of the fastest row."""
    mhz, core_w, memory_w = (rails[name] for name in ("sm_mhz", "core_rail_w", "memory_rail_w"))
    k = board_specs()["h100-sxm5-80gb"].silicon
    fastest = int(np.argmax(mhz))
    top_mhz = float(mhz[fastest])
    traffic_w = float(np.polyfit(mhz, memory_w, 1)[0] * top_mhz)
    memory = traffic_w / k.hbm_w
    whole_w = float(core_w[fastest] + memory_w[fastest])
    compute = compute_share(k, whole_w - k.static_w - traffic_w, memory, top_mhz)
    return lambda clock_mhz: Load(compute=compute, memory=min(1.0, memory * clock_mhz / top_mhz))


def gemm_load(spec: BoardSpec) -> ClockLoad:
    """A large matrix product, whose traffic follows the clock."""
    top_mhz = float(spec.max_sm_clock_mhz)
    return lambda clock_mhz: Load(compute=1.0, memory=GEMM_MEMORY * clock_mhz / top_mhz)


def compute_share(k: Silicon, core_w: float, memory: float, clock_mhz: float) -> float:
    """The compute share at which the core draws `core_w`, kernels running all the time."""
    without_w = core_power_w(k, 0.0, memory, 1.0, clock_mhz)
    return float((core_w - without_w) / (core_power_w(k, 1.0, memory, 1.0, clock_mhz) - without_w))


def settled(spec: BoardSpec, limit_w: float, load: ClockLoad) -> tuple[float, float]:
    """Mean clock MHz and mean power W of a nominal board that has run `load` under a limit for a while."""
    clocks = []
    with nominal(spec, limit_w) as bank:
        for n in range(round((SETTLE_S + MEASURE_S) / TICK_S)):
            now_s = n * TICK_S
            clock_mhz = bank.pace_mhz([0], now_s)
            if n == round(SETTLE_S / TICK_S):
                start_j = bank.energy_integral_j(0, now_s)
            if now_s >= SETTLE_S:
                clocks.append(clock_mhz)
            bank.book([0], now_s, now_s + TICK_S, load(clock_mhz), now_s)
        end_j = bank.energy_integral_j(0, SETTLE_S + MEASURE_S)
    return float(np.mean(clocks)), (end_j - start_j) / MEASURE_S


def bursts(spec: BoardSpec, burst_s: float) -> tuple[list[float], float]:
    """Energy beyond the limit in each burst J, and the highest mean over 50 ms W; bursts run half of the time."""
    load = gemm_load(spec)(float(spec.max_sm_clock_mhz))
    count = max(BURSTS, round(1.0 / burst_s))
    with nominal(spec, BURST_LIMIT_W) as bank:
        for n in range(count):
            start_s = burst_s * (2 * n + 1)
            bank.book([0], start_s, start_s + burst_s, load, 0.0)
        ends_s = np.arange(0, round(burst_s * 2 * count / TICK_S) + 1) * TICK_S
        powers = np.diff([bank.energy_integral_j(0, t) for t in ends_s]) / TICK_S
    beyond_j = np.maximum(powers - BURST_LIMIT_W, 0.0) * TICK_S
    steady_w = powers[len(powers) // 2 :]  # a burst that follows others finds the clock where they left it
    joined_w = np.convolve(steady_w, np.full(JOINED_TICKS, 1.0 / JOINED_TICKS), "valid")
    return [float(part.sum()) for part in np.array_split(beyond_j, count)], float(joined_w.max())


@contextmanager
def nominal(spec: BoardSpec, limit_w: float) -> Iterator[BoardBank]:
    """One board without the variation of specimens, setters at once, time from 0."""
    even = replace(spec, variation=Variation(0.0, 0.0, 0.0, 0.0))
    with tempfile.TemporaryDirectory(prefix="pals-check-") as folder:
        bank = BoardBank.create(Path(folder) / "boards.bank", even, 1, setter_latency_s=0.0, now_s=0.0)
        try:
            bank.set_limit(0, limit_w, 0.0)
            yield bank
        finally:
            bank.close()
