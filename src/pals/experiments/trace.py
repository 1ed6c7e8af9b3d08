"""The shipped trace slice: ten minutes of the Azure 2023 conversation trace, as it arrived; nothing is synthesised."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib.resources import files

from pals.core.errors import ConfigError
from pals.engines.openai_client import RequestSpec

SLICE = "azure-2023-conversation-slice.csv"
SLICE_S = 600.0


def load_slice(duration_s: float, *, start_s: float = 0.0) -> list[RequestSpec]:
    """Requests that arrive in [start_s, start_s + duration_s) of the slice, times from `start_s`.

    Raises:
        ConfigError: the window is empty or leaves the slice.
    """
    if not (duration_s > 0 and start_s >= 0 and start_s + duration_s <= SLICE_S):
        raise ConfigError(
            f"the shipped trace slice holds {SLICE_S:.0f} s; {start_s:g}..{start_s + duration_s:g} s lies outside"
        )
    text = (files("pals.experiments") / "data" / SLICE).read_text(encoding="utf-8")
    specs = [
        RequestSpec(
            at_s=float(row["arrival_s"]) - start_s,
            prompt_tokens=int(row["input_tokens"]),
            output_tokens=int(row["output_tokens"]),
        )
        for row in csv.DictReader(text.splitlines())
        if start_s <= float(row["arrival_s"]) < start_s + duration_s
    ]
    if not specs:
        raise ConfigError(f"no request arrives between {start_s:g} and {start_s + duration_s:g} s of the trace slice")
    return specs


def describe(specs: Sequence[RequestSpec]) -> str:
    """One line about a load."""
    prompt = sum(s.prompt_tokens for s in specs) / len(specs)
    output = sum(s.output_tokens for s in specs) / len(specs)
    span_s = max(s.at_s for s in specs)
    return (
        f"Azure 2023 conversation trace, {len(specs)} requests in {span_s:.0f} s ({len(specs) / max(span_s, 1e-9):.1f}/s), "
        f"mean prompt {prompt:.0f}, mean output {output:.0f} tokens"
    )
