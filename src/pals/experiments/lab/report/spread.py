"""From rows to values with a spread: a seed's value is the mean over its places, the error bars are the least and the most seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from pals.experiments.lab.experiment import Row
from pals.experiments.lab.ratios import Place, by_seed, ratios
from pals.views.charts import STYLES, Stat


def stat_of(values: Mapping[int, float]) -> Stat | None:
    """Mean, least and most over seeds; None where there is none, or one is no number."""
    found = list(values.values())
    if not found or not all(map(math.isfinite, found)):
        return None
    return Stat(value=fmean(found), low=min(found), high=max(found))


def figure_stat(rows: Sequence[Row], figure: str, *, scale: float = 1.0, over: str | None = None) -> Stat | None:
    """Of a column, or of its ratio to another; rows that lack it do not count."""
    values: dict[int, list[float]] = {}
    for r in rows:
        value, below = r.get(figure), 1.0 if over is None else r.get(over)
        if value is not None and below:
            values.setdefault(r["seed"], []).append(scale * float(value) / float(below))
    return stat_of({seed: fmean(v) for seed, v in values.items()})


def ratio_stat(
    rows: Sequence[Row], figure: str, policy: str, over: str, places: Sequence[str], *, fold: str = "mean"
) -> Stat | None:
    """Of `policy`'s figure over that of `over` in the same places."""
    known = [r for r in rows if r.get(figure) is not None]
    return stat_of(by_seed(ratios(known, figure, policy, over, places), fold))


def inverse_stat(
    rows: Sequence[Row], figure: str, policy: str, over: str, places: Sequence[str], *, fold: str = "mean"
) -> Stat | None:
    """The same of the inverse: joules per token, where `figure` is tokens per joule."""
    known = [r for r in rows if r.get(figure)]
    found: dict[Place, float] = {p: 1.0 / v for p, v in ratios(known, figure, policy, over, places).items() if v > 0}
    return stat_of(by_seed(found, fold))


def differences(
    rows: Sequence[Row], figure: str, policy: str, over: str, places: Sequence[str], *, scale: float = 1.0
) -> dict[Place, float]:
    """`policy`'s figure less that of `over`, by place and seed."""
    keys = (*places, "seed")
    mine, theirs = (
        {tuple(r[k] for k in keys): float(r[figure]) for r in rows if r["policy"] == name and r.get(figure) is not None}
        for name in (policy, over)
    )
    return {place: scale * (value - theirs[place]) for place, value in mine.items() if place in theirs}


def policies_in(rows: Sequence[Row]) -> list[str]:
    """The policies that rows have, in the order of their styles: cells finish in any order."""
    found = values_in(rows, "policy")
    known = list(STYLES)
    return sorted(found, key=lambda p: known.index(p) if p in known else len(known))


def values_in(rows: Sequence[Row], column: str) -> list[str]:
    """The values of a column, each once."""
    return list(dict.fromkeys(str(r[column]) for r in rows))


def where(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Rows with these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def seeds_told(rows: Sequence[Row]) -> str:
    """How the error bars are to be read."""
    count = len({r["seed"] for r in rows})
    return f"Error bars: least to most of {count} seeds." if count > 1 else "One seed: no spread is known."


def short(engine: str) -> str:
    """An engine's name for an axis: the model without its version, and the boards where they tell it from others."""
    model, _, boards = engine.partition("--")
    cut = {
        "olmoe-1b-7b-0924": "OLMoE", "qwen1.5-moe-a2.7b": "Qwen1.5-MoE", "deepseek-moe-16b-base": "DeepSeek-MoE",
        "phi-3.5-moe-instruct": "Phi-3.5-MoE", "mixtral-8x7b-v0.1": "Mixtral-8x7B", "gpt2": "GPT-2", "llama-2-7b-hf": "Llama-2-7B",
        "mistral-7b-v0.1": "Mistral-7B", "qwen3-30b-a3b": "Qwen3-30B", "llama-3.1-8b": "Llama-3.1-8B", "llama-3.1-70b": "Llama-3.1-70B",
        "mixtral-8x22b-v0.1": "Mixtral-8x22B", "qwen3-235b-a22b": "Qwen3-235B", "deepseek-v3": "DeepSeek-V3",
    }.get(model, model)  # fmt: skip
    return cut if not boards else f"{cut}, {boards_told(boards)}"


def boards_told(boards: str) -> str:
    """Number and kind: 4×A100."""
    count, by, kind = boards.partition("x") if boards[:1].isdigit() else ("", "", boards)
    return f"{count}{'×' if by else ''}{kind.split('-')[0].upper()}"
