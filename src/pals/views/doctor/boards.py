"""Findings about the driver and each board: what it is, what can be measured, what can be set, what holds it back."""

from __future__ import annotations

from collections.abc import Iterator

from pals.core.diagnosis import (
    BoardFacts,
    BoardSettings,
    Finding,
    MeterFacts,
    NvmlFacts,
    SoftwareFacts,
    Status,
    finding,
)
from pals.core.quantities import BoardInfo, PowerSample

OK, UNKNOWN, WARNING, PROBLEM = Status.OK, Status.UNKNOWN, Status.WARNING, Status.PROBLEM
BINDS_WITHIN = 0.03  # power this close to the limit counts as bound by it
SLOW_REFRESH_S = 0.25  # half a control period of 0.5 s; above it, energy differences may read zero
HARMFUL = {"hardware slowdown", "temperature", "hardware temperature", "power brake"}
EMULATE = "pals serve MODEL --emulate 4xa100-sxm4-80gb"


def count(number: int, noun: str) -> str:
    """ "1 board", "2 boards"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def driver(nvml: NvmlFacts, software: SoftwareFacts) -> Iterator[Finding]:
    """Whether boards can be reached at all."""
    if nvml.emulated:
        yield _emulated(nvml)
        return
    status, remedy = PROBLEM, None
    if software.packages.get("nvidia-ml-py") is None:
        status, text = UNKNOWN, "the driver cannot be asked: nvidia-ml-py is not installed here"
        remedy = "pip install nvidia-ml-py"
    elif nvml.error is not None and nvml.kernel_driver:
        text = f"the kernel driver is loaded, but NVML does not answer ({nvml.error})"
        remedy = "in a container: start it with --gpus all; after a driver update: reboot or reload the nvidia modules"
    elif nvml.error is not None:
        text = f"no board can be measured or set here: {nvml.error.split(';')[0]}"
        remedy = f"without a GPU everything runs on emulated boards: {EMULATE}, or pals demo"
    elif not nvml.boards:
        text = "the driver answers, but lists no board"
        remedy = "in a container: pass the boards in (--gpus all); else see nvidia-smi and dmesg"
    else:
        version = next((b.info.driver for b in nvml.boards if b.info), "of unknown version")
        status, text = OK, f"NVIDIA driver {version}, {count(len(nvml.boards), 'board')}"
    yield finding(
        "driver", "nvml", status, text, remedy=remedy,
        boards=len(nvml.boards), error=nvml.error, kernel_driver=nvml.kernel_driver,
    )  # fmt: skip


def _emulated(nvml: NvmlFacts) -> Finding:
    status, remedy = OK, None
    if nvml.error is not None:
        status, text = PROBLEM, nvml.error
        remedy = f"set PALS_RUN_DIR to a folder of your own, or emulate there: {EMULATE}"
    elif not nvml.emulator_alive:
        status, text = WARNING, "EMULATED boards whose server was killed; no real board is looked at"
        remedy = f"rm {nvml.emulated} to see real boards again"
    else:
        whose = "pals emulate" if nvml.emulator_pid is None else f"pals serve (process {nvml.emulator_pid})"
        text = (
            f"EMULATED: {count(len(nvml.boards), 'board')} of {whose} beneath NVML; no real board is looked at in this "
            f"{'shell' if nvml.emulator_pid is None else 'run directory'}"
        )
    return finding(
        "driver", "nvml", status, text, remedy=remedy,
        boards=len(nvml.boards), error=nvml.error, bank=nvml.emulated, emulator_pid=nvml.emulator_pid,
    )  # fmt: skip


def board(facts: BoardFacts, *, steered: bool, tried: bool = False) -> Iterator[Finding]:
    """One board; `steered` says that a living agent sets it, `tried` that a clock lock was tried."""
    subject = f"board {facts.index}"
    info, now, settings = facts.info, facts.now, facts.settings
    if info is None or now is None or settings is None:
        yield finding(
            "boards", "usable", PROBLEM, f"cannot be used: {facts.error}", subject=subject,
            remedy="PALS needs power, limits and clock; keep the board out of CUDA_VISIBLE_DEVICES",
            index=facts.index, error=facts.error,
        )  # fmt: skip
        return
    yield finding(
        "boards", "identity", OK, f"{info.name}, {info.uuid}", subject=subject,
        index=info.index, name=info.name, uuid=info.uuid, driver=info.driver,
    )  # fmt: skip
    yield _limit(subject, info, now, steered=steered)
    yield _binding(subject, info, now, settings, facts.meter)
    yield _clock(subject, info, now, settings, tried=tried)
    yield _energy_counter(subject, now, facts.meter)
    yield _power_window(subject, facts.meter)
    yield _persistence(subject, settings.persistence_mode)
    yield _mig(subject, settings.mig_mode)


def _limit(subject: str, info: BoardInfo, now: PowerSample, *, steered: bool) -> Finding:
    requested_w, enforced_w = info.found_limit_w, now.enforced_limit_w
    text = (
        f"limit {enforced_w:.0f} W in force; {info.min_limit_w:.0f}..{info.max_limit_w:.0f} W can be set, "
        f"default {info.default_limit_w:.0f} W"
    )
    status, remedy = OK, None
    if enforced_w < requested_w - 0.5:
        status, text = (
            WARNING,
            f"{text}; {requested_w:.0f} W was asked for: something beneath the driver holds it lower",
        )
        remedy = "look at the BMC's or rack's power cap and at the power cables; PALS cannot raise it"
    elif info.max_limit_w - info.min_limit_w < 1.0:
        status, text = WARNING, f"{text}; the limit cannot be moved"
        remedy = "SM clock and active sequences are the levers that are left"
    elif requested_w < info.default_limit_w - 0.5:
        lowered = "the agent set it" if steered else "it was lowered, and PALS never goes above the limit it finds"
        text = f"{text}; {lowered}"
    return finding(
        "boards", "power-limit", status, text, subject=subject, remedy=remedy,
        min_limit_w=info.min_limit_w, default_limit_w=info.default_limit_w, max_limit_w=info.max_limit_w,
        requested_limit_w=requested_w, enforced_limit_w=enforced_w,
    )  # fmt: skip


def _binding(
    subject: str, info: BoardInfo, now: PowerSample, settings: BoardSettings, meter: MeterFacts | None
) -> Finding:
    power_w = meter.power_w if meter is not None and meter.power_w is not None else now.power_w
    capped = "power limit" in (settings.clock_reasons or ())
    binds = capped or power_w >= (1.0 - BINDS_WITHIN) * now.enforced_limit_w
    means = (
        "binds now: lower slows the work, higher speeds it up"
        if binds
        else f"does not bind now: down to about {max(info.min_limit_w, power_w / (1.0 - BINDS_WITHIN)):.0f} W costs no speed"
    )
    return finding(
        "boards", "limit-binds", OK, f"draws {power_w:.0f} W: the limit {means}",
        subject=subject, power_w=power_w, binds=binds, temperature_c=now.temperature_c,
        capped_by_driver=None if settings.clock_reasons is None else capped,
    )  # fmt: skip


def _clock(subject: str, info: BoardInfo, now: PowerSample, settings: BoardSettings, *, tried: bool) -> Finding:
    reasons = settings.clock_reasons or ()
    status, remedy = OK, None
    lock = "the driver can lock it" + ("" if tried else " (not tried)")
    if not settings.clock_lock_api:
        status, lock = WARNING, "this driver cannot lock it"
        remedy = "update the driver, or steer by power limit and active sequences alone"
    if harm := sorted(HARMFUL & set(reasons)):
        status, remedy = WARNING, f"the board slows itself down ({', '.join(harm)}): see to cooling and power supply"
    why = f" ({', '.join(reasons)})" if reasons else ""
    low_mhz = info.lockable_clocks_mhz[0]
    return finding(
        "boards", "sm-clock", status,
        f"SM clock {now.sm_clock_mhz} MHz of {low_mhz}..{info.max_sm_clock_mhz} MHz{why}; {lock}",
        subject=subject, remedy=remedy, min_sm_clock_mhz=low_mhz, sm_clock_mhz=now.sm_clock_mhz, max_sm_clock_mhz=info.max_sm_clock_mhz,
        memory_clock_mhz=now.memory_clock_mhz, clock_lock_api=settings.clock_lock_api,
        clock_reasons=None if settings.clock_reasons is None else list(reasons),
    )  # fmt: skip


def _energy_counter(subject: str, now: PowerSample, meter: MeterFacts | None) -> Finding:
    status, remedy = OK, None
    if now.energy_j is None:
        status, text = (
            WARNING,
            "no energy counter: power comes from the driver's own readings, which may lag by a second",
        )
    elif meter is None:
        status, text = UNKNOWN, "energy counter present; how often it refreshes was not watched"
        remedy = "run again with --watch-s 2"
    elif meter.energy_refresh_s is None:
        status, text = PROBLEM, f"the energy counter hardly moved in {meter.seconds:.1f} s: power cannot be measured"
        remedy = "PALS takes power from this counter; watch longer (--watch-s 5), else update the driver"
    else:
        refresh_s = meter.energy_refresh_s
        nearly = "at most" if refresh_s < 1.5 * meter.sampled_every_s else "about"
        text = f"energy counter present, refreshes every {nearly} {_rounded_ms(refresh_s)} ms"
        if refresh_s > SLOW_REFRESH_S:
            status, remedy = WARNING, f"use control periods of at least {4 * refresh_s:.1f} s (--period-s)"
    return finding(
        "boards", "energy-counter", status, text, subject=subject, remedy=remedy, energy_j=now.energy_j,
        energy_refresh_s=meter.energy_refresh_s if meter else None,
        sampled_every_s=meter.sampled_every_s if meter else None,
    )  # fmt: skip


def _rounded_ms(seconds: float) -> int:
    """To 10 ms, as far as watching can tell; the exact figure is among the values."""
    return max(1, round(seconds * 1e3)) if seconds < 0.02 else 10 * round(seconds * 1e2)


def _power_window(subject: str, meter: MeterFacts | None) -> Finding:
    status = UNKNOWN
    remedy: str | None = "run again while load comes and goes; PALS itself uses energy differences"
    if meter is None:
        text = "what the power reading averages over was not watched"
    elif meter.power_window_s is not None:
        status, remedy = OK, None
        text = f"the driver's power reading averages over about {meter.power_window_s:g} s{_shown_every(meter)}"
    elif meter.swing_w < 5.0:
        text = f"what the power reading averages over: unknown, power was steady (±{meter.swing_w:.1f} W){_shown_every(meter)}"
    else:
        text = f"what the power reading averages over: unknown, no known window fits {meter.seconds:.1f} s of readings{_shown_every(meter)}"
    return finding(
        "boards", "power-window", status, text, subject=subject, remedy=remedy,
        power_window_s=meter.power_window_s if meter else None,
        power_refresh_s=meter.power_refresh_s if meter else None, swing_w=meter.swing_w if meter else None,
    )  # fmt: skip


def _shown_every(meter: MeterFacts) -> str:
    if meter.power_refresh_s is None:
        return ""
    nearly = "at most" if meter.power_refresh_s < 1.5 * meter.sampled_every_s else "about"
    return f", and refreshes every {nearly} {_rounded_ms(meter.power_refresh_s)} ms"


def _persistence(subject: str, mode: bool | None) -> Finding:
    status, text, remedy = OK, "persistence mode on", None
    if mode is None:
        status, text = UNKNOWN, "persistence mode: the driver does not say"
    elif not mode:
        status, text = (
            WARNING,
            "persistence mode off: the driver unloads, and forgets limits and locks, when nobody has the board open",
        )
        remedy = "sudo nvidia-smi -pm 1, or run nvidia-persistenced"
    return finding("boards", "persistence-mode", status, text, subject=subject, remedy=remedy, persistence_mode=mode)


def _mig(subject: str, mode: bool | None) -> Finding:
    status, text, remedy = OK, "no MIG" if mode is None else "MIG off", None
    if mode:
        status, text = WARNING, "MIG on: limits and meters act on the whole board, not on an instance"
        remedy = "give PALS whole boards: turn MIG off where an engine shall be steered"
    return finding("boards", "mig", status, text, subject=subject, remedy=remedy, mig_mode=mode)
