"""Tables of outcomes for terminals."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.table import Table


def wide_console() -> Console:
    """A console that shows a table of three runs unbroken, also into a file."""
    return Console(highlight=False, width=max(100, min(160, shutil.get_terminal_size((120, 40)).columns)))


class OutcomeRow(Protocol):
    """What the table shows of one run; see `pals.experiments.outcome.Outcome`."""

    @property
    def name(self) -> str: ...
    @property
    def tokens_per_j_gpu(self) -> float: ...
    @property
    def tokens_per_j_node(self) -> float: ...
    @property
    def tokens_per_s(self) -> float: ...
    @property
    def mean_power_w(self) -> float: ...
    @property
    def ttft_s(self) -> tuple[float, float, float]: ...
    @property
    def tpot_s(self) -> tuple[float, float, float]: ...
    @property
    def ttft_missed(self) -> float: ...
    @property
    def tpot_missed(self) -> float: ...
    @property
    def throughput_missed(self) -> float: ...
    @property
    def over_budget_s(self) -> float: ...
    @property
    def requests(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def refused(self) -> int: ...


def outcome_table(outcomes: Sequence[OutcomeRow], *, title: str) -> Table:
    """One column a run, one row a figure; gains are against the first run."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for o in outcomes:
        table.add_column(o.name, justify="right")

    def against_first(values: list[float], form: str) -> list[str]:
        return [f"{v:{form}}" + (f" ({v / values[0] - 1:+.1%})" if i else "") for i, v in enumerate(values)]

    def triple(values: tuple[float, float, float], scale: float) -> str:
        return " / ".join(f"{v * scale:.0f}" for v in values)

    table.add_row("tokens/J, GPUs", *against_first([o.tokens_per_j_gpu for o in outcomes], ".3f"))
    table.add_row("tokens/J, node (1.05·GPU + 345 W)", *against_first([o.tokens_per_j_node for o in outcomes], ".3f"))
    table.add_row("output tokens/s", *against_first([o.tokens_per_s for o in outcomes], ".0f"))
    table.add_row("mean power, GPUs, W", *against_first([o.mean_power_w for o in outcomes], ".0f"))
    table.add_row("TTFT p50 / p95 / p99, ms", *(triple(o.ttft_s, 1e3) for o in outcomes))
    table.add_row("TPOT p50 / p95 / p99, ms", *(triple(o.tpot_s, 1e3) for o in outcomes))
    table.add_row("missed: TTFT, of requests", *(f"{o.ttft_missed:.1%}" for o in outcomes))
    table.add_row("missed: TPOT, of requests", *(f"{o.tpot_missed:.1%}" for o in outcomes))
    table.add_row("missed: throughput, of periods", *(f"{o.throughput_missed:.1%}" for o in outcomes))
    table.add_row("over budget, s", *(f"{o.over_budget_s:.1f}" for o in outcomes))
    table.add_row("requests answered", *(f"{o.requests - o.failed} of {o.requests}" for o in outcomes))
    if any(o.refused for o in outcomes):
        table.add_row("requests refused (503)", *(str(o.refused) for o in outcomes))
    return table
