"""The agent's boards as dcgm-exporter shows them, for tools that read power there; filled from tick records alone.

Same names, units and labels as dcgm-exporter. What the records do not know is absent, never 0.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from pals.core.quantities import BoardInfo, PowerSample
from pals.runtime.tick import TickRecord
from pals.views.endpoint import serve

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class DcgmField:
    """One metric of dcgm-exporter and where a reading holds it."""

    name: str
    kind: str  # "gauge" or "counter"
    text: str  # dcgm-exporter's own words, with the unit
    value: Callable[[PowerSample], float | None]


FIELDS: tuple[DcgmField, ...] = (
    DcgmField("DCGM_FI_DEV_SM_CLOCK", "gauge", "SM clock frequency (in MHz).", lambda s: s.sm_clock_mhz),
    DcgmField("DCGM_FI_DEV_MEM_CLOCK", "gauge", "Memory clock frequency (in MHz).", lambda s: s.memory_clock_mhz),
    DcgmField("DCGM_FI_DEV_GPU_TEMP", "gauge", "GPU temperature (in C).", lambda s: s.temperature_c),
    DcgmField("DCGM_FI_DEV_POWER_USAGE", "gauge", "Power draw (in W).", lambda s: s.power_w),
    DcgmField(
        "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
        "counter",
        "Total energy consumption since boot (in mJ).",
        lambda s: None if s.energy_j is None else s.energy_j * 1e3,
    ),
    DcgmField("DCGM_FI_DEV_POWER_MGMT_LIMIT", "gauge", "Current power limit (in W).", lambda s: s.enforced_limit_w),
    DcgmField(
        "DCGM_FI_DEV_GPU_UTIL",
        "gauge",
        "GPU utilization (in %).",
        lambda s: None if s.busy_ratio is None else 100.0 * s.busy_ratio,
    ),
)


class DcgmCollector(Collector):
    """The newest reading of every board, as dcgm-exporter's metrics."""

    def __init__(self, *, emulated: bool, hostname: str | None = None) -> None:
        self._emulated, self._hostname = emulated, hostname or socket.gethostname()
        self._newest: dict[str, tuple[BoardInfo, PowerSample]] = {}  # by UUID

    def engine(self, boards: Sequence[BoardInfo]) -> DcgmEngine:
        """What observes the records of an engine that runs on `boards`."""
        return DcgmEngine(self, boards)

    def replace(self, boards: Sequence[BoardInfo], read: Sequence[tuple[BoardInfo, PowerSample]]) -> None:
        """Show these readings, and none of those among `boards` that could not be read."""
        mine = {b.uuid for b in boards}
        newest = {b.uuid: (b, s) for b, s in read}
        self._newest = {k: v for k, v in self._newest.items() if k not in mine} | newest

    def collect(self) -> Iterator[Metric]:
        """One family per metric that at least one board knows."""
        boards = list(self._newest.values())
        for field in FIELDS:
            family = Metric(field.name, field.text, "gauge" if field.kind == "gauge" else "unknown")
            for info, sample in boards:
                if (value := field.value(sample)) is not None:
                    family.add_sample(field.name, self._labels(info), float(value))
            if family.samples:
                yield family

    def _labels(self, info: BoardInfo) -> dict[str, str]:
        return {
            "gpu": str(info.index),
            "UUID": info.uuid,
            "device": f"nvidia{info.index}",
            "modelName": f"{info.name} (EMULATED)" if self._emulated else info.name,
            "Hostname": self._hostname,
            "DCGM_FI_DRIVER_VERSION": info.driver,
        }


class DcgmEngine:
    """Observes one engine's tick records."""

    def __init__(self, collector: DcgmCollector, boards: Sequence[BoardInfo]) -> None:
        self._collector, self._boards = collector, tuple(boards)

    def observe(self, record: TickRecord) -> None:
        """Take one record; a sink of the agent."""
        sample = record.sample
        read = [(self._boards[i], s) for i, s in zip(sample.positions, sample.boards, strict=True)]
        self._collector.replace(self._boards, read)

    def close(self) -> None:
        """The engine is no longer steered: its boards are no longer shown."""
        self._collector.replace(self._boards, ())


def dcgm_text(collector: DcgmCollector) -> bytes:
    """The page as dcgm-exporter writes it.

    prometheus_client insists that a counter's name ends in `_total`; dcgm-exporter's energy counter does not. Collected as
    "unknown", it gets its type back here.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry)
    for field in FIELDS:
        if field.kind == "counter":
            text = text.replace(f"# TYPE {field.name} untyped".encode(), f"# TYPE {field.name} counter".encode())
    return text


def serve_dcgm(collector: DcgmCollector, port: int) -> Callable[[], None]:
    """Expose `collector` on 127.0.0.1:`port`; return a function that stops it.

    Raises:
        ConfigError: the port is taken.
    """

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        if environ["PATH_INFO"] not in ("/", "/metrics"):
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"only /metrics is here\n"]
        body = dcgm_text(collector)
        start_response("200 OK", [("Content-Type", CONTENT_TYPE), ("Content-Length", str(len(body)))])
        return [body] if environ["REQUEST_METHOD"] != "HEAD" else []

    return serve(application, port, what="DCGM port", flag="--dcgm-port")
