"""The bytes of a bank file, known here alone: Python maps them through these types, C through the header made from them.

Sections in order: head, boards (registers and state), readings (what the sensors show), processes, segments, clockwork.
Every member is eight bytes wide or a string of a multiple of eight, so no compiler pads anything.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from pals.core.errors import ConfigError
from pals.plant.governor import Firmware
from pals.plant.silicon import Silicon
from pals.plant.specs import CLOCK_STEP_MHZ, DRIVER, BoardSpec

MAGIC = b"PALSBANK"
RING = 100  # ticks kept for the windowed mean
SEGMENTS = 256
PROCESSES = 64
GIB = 2**30  # boards are named in GB and hold about that many GiB
FAULTS = ("lost", "not_supported", "denied", "limit_denied", "no_clock_lock", "stuck", "thermal")  # 1 or 0 each
REGISTERS = ("limit_w", "lock_lo_mhz", "lock_hi_mhz")  # what setters write; each acts a while later
STALE_S = 2.0  # readings that nobody refreshed for so long are not shown as truth

HEAD = np.dtype(
    [
        ("magic", "S8"),
        ("layout", "u8"),
        *((name, "S96") for name in ("spec", "nvml_name", "driver")),
        *((name, "i8") for name in ("count", "writable", "capability_major", "capability_minor", "memory_bytes")),
        *((name, "i8") for name in ("min_sm_clock_mhz", "max_sm_clock_mhz", "memory_clock_mhz", "clock_step_mhz")),
        *((name, "f8") for name in ("min_limit_w", "default_limit_w", "max_limit_w")),
        *((name, "f8") for name in ("setter_latency_s", "setter_tail_sigma", "setter_longest_s")),
        ("seed", "u8"),
        ("silicon", "f8", (len(Silicon._fields),)),  # the physics of this bank, which may be a perturbed type's
        ("firmware", "f8", (len(Firmware._fields),)),
        ("refreshed_s", "f8"),  # when the readings were last brought up to date; NaN: never
        ("virtual_s", "f8"),  # the boards' clock where a simulator drives it; NaN: CLOCK_MONOTONIC
        ("keeper_pid", "i8"),  # who drives virtual time
        ("sequence", "u8"),  # odd while somebody writes; who reads without the lock reads again when it moved
    ]
)
BOARD = np.dtype(
    [
        ("uuid", "S96"),
        *((name, "f8") for name in REGISTERS),
        ("writes", "i8"),  # how often one of them was written
        *((f"seen_{name}", "f8") for name in REGISTERS),
        *((f"acting_{name}", "f8") for name in REGISTERS),
        ("acts_at_s", "f8"),  # when what was seen begins to act
        *((name, "f8") for name in ("external_w", "setter_extra_s", "ambient_c")),  # injected
        *((name, "i8") for name in FAULTS),
        *((name, "f8") for name in ("clock_mhz", "filtered_w", "debt_j", "temperature_c", "power_w", "energy_j")),
        *((name, "f8") for name in ("published_j", "busy", "memory_busy", "busy_until_s")),
        *((name, "f8") for name in ("core_factor", "idle_factor", "counter_factor", "top_mhz")),  # of this specimen
        *((name, "f8") for name in ("next_dip_s", "dip_until_s")),
        ("dips", "i8"),
        ("throttle", "i8"),
        ("ring_w", "f8", (RING,)),
    ]
)
READING = np.dtype(
    [
        *((name, "f8") for name in ("power_avg_w", "power_instant_w", "energy_j", "temperature_c")),
        *((name, "f8") for name in ("busy", "memory_busy")),  # shares of the last quarter second, 0..1
        *((name, "i8") for name in ("sm_clock_mhz", "throttle")),
    ]
)
PROCESS = np.dtype([("pid", "i8"), ("boards", "u8"), ("memory_bytes", "i8"), ("order", "i8")])
SEGMENT = np.dtype(
    [("start_s", "f8"), ("end_s", "f8"), ("compute", "f8"), ("memory", "f8"), ("kernels", "f8"), ("boards", "u8")]
)
CLOCKWORK = np.dtype([("time_s", "f8"), ("busy_until_s", "f8"), ("ticks", "i8"), ("next", "i8")])
_SAME_IN_SPEC = (
    "nvml_name", "min_limit_w", "default_limit_w", "max_limit_w", "min_sm_clock_mhz", "max_sm_clock_mhz", "memory_clock_mhz",
)  # fmt: skip
_TYPES = {
    "head": HEAD, "board": BOARD, "reading": READING, "process": PROCESS, "segment": SEGMENT, "clockwork": CLOCKWORK,
}  # fmt: skip
_MEANING = repr((_TYPES, Silicon._fields, Firmware._fields))
#: Changes whenever a type above does; a library and a bank of different layouts refuse each other.
LAYOUT = int.from_bytes(hashlib.blake2b(_MEANING.encode(), digest_size=7).digest())


@dataclass(slots=True)
class Sections:
    """A mapped bank as arrays; `head` and `clockwork` have one row."""

    head: np.ndarray
    boards: np.ndarray
    readings: np.ndarray
    processes: np.ndarray
    segments: np.ndarray
    clockwork: np.ndarray


def bank_size(count: int) -> int:
    """Bytes of a bank of `count` boards."""
    return sum(kind.itemsize * rows for kind, rows in _rows(count))


def map_sections(mapped: mmap.mmap, count: int) -> Sections:
    """Lay the arrays over the mapped bytes."""
    arrays, at = [], 0
    for kind, rows in _rows(count):
        arrays.append(np.ndarray((rows,), kind, mapped, at))
        at += arrays[-1].nbytes
    return Sections(*arrays)


def read_head(data: bytes, name: str) -> Any:
    """The head from the file's first bytes, checked.

    Raises:
        ConfigError: not a bank, or one of another version.
    """
    head = np.frombuffer(data, HEAD, 1)[0] if len(data) >= HEAD.itemsize else None
    if head is None or head["magic"] != MAGIC or int(head["layout"]) != LAYOUT:
        raise ConfigError(
            f"{name} is not a file of emulated boards, or one of another PALS version; nothing was changed"
        )
    return head


def board_uuid(spec_name: str, i: int, apart: str = "") -> str:
    """A UUID in NVIDIA's form, the same in every run; its first group of zeros says that the board is emulated.

    `apart` tells boards of a bank of their own from those that engines of the same node run on.
    """
    digits = hashlib.blake2b(f"{apart}{spec_name}/{i}".encode(), digest_size=12).hexdigest()
    return f"GPU-00000000-{digits[:4]}-{digits[4:8]}-{digits[8:12]}-{digits[12:]}"


def make_head(spec: BoardSpec, count: int, *, seed: int, writable: bool, setter_latency_s: float) -> np.ndarray:
    """What a bank says of itself, shape (1,)."""
    head = np.zeros((1,), HEAD)
    values = {
        "magic": MAGIC,
        "layout": LAYOUT,
        "driver": DRIVER,
        "spec": spec.name,
        "count": count,
        "writable": writable,
        "setter_latency_s": setter_latency_s,
        "setter_tail_sigma": spec.setter.tail_sigma,
        "setter_longest_s": spec.setter.longest_s,
        "seed": seed,
        "silicon": spec.silicon,
        "firmware": spec.firmware,
        "capability_major": spec.capability[0],
        "capability_minor": spec.capability[1],
        "memory_bytes": round(spec.memory_gb * GIB),
        "clock_step_mhz": CLOCK_STEP_MHZ,
        "refreshed_s": math.nan,
        "virtual_s": math.nan,
    }
    for name, value in values.items():
        head[name] = value
    for name in _SAME_IN_SPEC:
        head[name] = getattr(spec, name)
    return head


def c_header() -> str:
    """The same types for C."""
    lines = ["/* Made from pals.plant.bank_layout; do not edit. */", "#pragma once", "#include <stdint.h>", ""]
    lines += [
        f"#define PALS_LAYOUT {LAYOUT}ULL",
        f"#define PALS_PROCESSES {PROCESSES}",
        f"#define PALS_STALE_S {STALE_S}",
    ]
    for name, kind in _TYPES.items():
        lines += [
            "",
            "typedef struct {",
            *(f"    {_member(kind, field)};" for field in kind.names or ()),
            f"}} pals_{name};",
        ]
        lines.append(f'_Static_assert(sizeof(pals_{name}) == {kind.itemsize}, "padding in pals_{name}");')
    return "\n".join(lines) + "\n"


def _rows(count: int) -> list[tuple[np.dtype, int]]:
    return [(HEAD, 1), (BOARD, count), (READING, count), (PROCESS, PROCESSES), (SEGMENT, SEGMENTS), (CLOCKWORK, 1)]


def _member(kind: np.dtype, name: str) -> str:
    field = kind[name]
    if field.subdtype is not None:
        return f"double {name}[{field.shape[0]}]"
    if field.kind == "S":
        return f"char {name}[{field.itemsize}]"
    return f"{ {'f': 'double', 'i': 'int64_t', 'u': 'uint64_t'}[field.kind] } {name}"
