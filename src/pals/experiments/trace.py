"""The shipped trace slice: ten minutes of the Azure 2023 conversation trace, as it arrived; nothing is synthesised."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files

from pals.core.errors import ConfigError
from pals.engines.openai_client import RequestSpec
from pals.plant.traces import read_trace

SLICE = "azure-2023-conversation-slice.csv"
SLICE_S = 600.0


def load_slice(duration_s: float, *, start_s: float = 0.0, time_scale: float = 1.0) -> list[RequestSpec]:
    """Requests that arrive in [start_s, start_s + duration_s) of the slice, times from `start_s`, stretched by `time_scale`.

    Raises:
        ConfigError: the window is empty or leaves the slice.
    """
    if not (duration_s > 0 and start_s >= 0 and start_s + duration_s <= SLICE_S):
        raise ConfigError(
            f"the shipped trace slice holds {SLICE_S:.0f} s; {start_s:g}..{start_s + duration_s:g} s lies outside"
        )
    with as_file(files("pals.experiments") / "data" / SLICE) as path:
        part = read_trace(path).between(start_s, start_s + duration_s)
    if not len(part):
        raise ConfigError(f"no request arrives between {start_s:g} and {start_s + duration_s:g} s of the trace slice")
    columns = (part.arrival_s.tolist(), part.prompt_tokens.tolist(), part.output_tokens.tolist())
    return [
        RequestSpec(at_s=t * time_scale, prompt_tokens=p, output_tokens=o) for t, p, o in zip(*columns, strict=True)
    ]


def describe(specs: Sequence[RequestSpec]) -> str:
    """One line about a load."""
    prompt = sum(s.prompt_tokens for s in specs) / len(specs)
    output = sum(s.output_tokens for s in specs) / len(specs)
    span_s = max(s.at_s for s in specs)
    return (
        f"Azure 2023 conversation trace, {len(specs)} requests in {span_s:.0f} s ({len(specs) / max(span_s, 1e-9):.1f}/s), "
        f"mean prompt {prompt:.0f}, mean output {output:.0f} tokens"
    )
