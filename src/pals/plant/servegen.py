"""Workloads from ServeGen's client models: each client has its own rate, burstiness and lengths, by the hour of the day.

Per client and window of ten minutes the number of requests follows the rate; their gaps follow the window's law (Gamma or
Weibull) and are scaled to fill the window, so that a scaled rate keeps every client's burstiness. Source: arXiv:2505.09999.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pals.core.errors import ConfigError
from pals.plant.columnar import Columns, read_columns
from pals.plant.workload import FloatArray, IndependentLengths, LengthHistogram, TokenArray, Workload

WINDOW_S = 600
LAWS = ("Gamma", "Weibull")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientModels:
    """Tables as published: `clients` by client and ten minutes, `lengths` by client and six hours."""

    name: str
    clients: Columns
    lengths: Columns

    @property
    def end_s(self) -> float:
        """How long the models reach."""
        return float(self.clients["t_s"].max()) + WINDOW_S

    def rate_per_s(self, start_s: float, duration_s: float) -> float:
        """Mean requests per second of all clients in a stretch of time."""
        t_s = self.clients["t_s"]
        overlap_s = np.clip(np.minimum(t_s + WINDOW_S, start_s + duration_s) - np.maximum(t_s, start_s), 0.0, None)
        return float((self.clients["rate"] * overlap_s).sum() / duration_s)

    def workload(
        self, *, start_s: float, duration_s: float, rate_per_s: float | None, rng: np.random.Generator
    ) -> Workload:
        """Requests of [start_s, start_s + duration_s), times from `start_s`; `rate_per_s` None: as published.

        Raises:
            ConfigError: the stretch leaves the models, nobody sends then, or the rate is not above 0.
        """
        if not (start_s >= 0 and duration_s > 0 and start_s + duration_s <= self.end_s):
            raise ConfigError(
                f"{self.name} reaches from 0 to {self.end_s / 3600:.0f} h; {start_s / 3600:g}..{(start_s + duration_s) / 3600:g} h "
                "lies outside. Nothing was started"
            )
        published = self.rate_per_s(start_s, duration_s)
        if published <= 0 or (rate_per_s is not None and not rate_per_s > 0):
            raise ConfigError(
                f"{self.name}: there is no request to scale, or the rate is not above 0. Nothing was started"
            )
        factor = 1.0 if rate_per_s is None else rate_per_s / published
        c, pieces = self.clients, list[tuple[FloatArray, TokenArray, TokenArray]]()
        donors = self._donors()
        for i in np.flatnonzero((c["t_s"] + WINDOW_S > start_s) & (c["t_s"] < start_s + duration_s)):
            count = int(c["rate"][i] * WINDOW_S * factor + rng.random())
            times_s = c["t_s"][i] - start_s + _spread(count, str(c["pat"][i]), float(c["shape"][i]), rng)
            prompt, output = self._lengths_of(donors[c["client"][i]], int(c["t_s"][i])).draw(count, rng)
            pieces.append((times_s, prompt, output))
        times_s, prompt, output = (np.concatenate([p[k] for p in pieces]) for k in range(3))
        order = np.argsort(times_s, kind="stable")
        order = order[(times_s[order] >= 0) & (times_s[order] < duration_s)]
        return Workload(
            name=self.name, arrival_s=times_s[order], prompt_tokens=prompt[order], output_tokens=output[order],
            prefix_tokens=np.zeros(len(order), np.int32),
        )  # fmt: skip

    def _donors(self) -> dict[int, int]:
        """By client, whose lengths it has: its own, else those of the client with the most similar mean rate."""
        told = np.unique(self.lengths["client"])
        means = {
            k: float(self.clients["rate"][self.clients["client"] == k].sum()) for k in np.unique(self.clients["client"])
        }
        known = [k for k in told if means.get(k, 0.0) > 0]
        if not known:
            raise ConfigError(f"{self.name}: no client has lengths. Nothing was started")
        return {
            k: k if k in known else min(known, key=lambda other: (abs(np.log(means[other] / mean)), other))
            for k, mean in means.items()
            if mean > 0
        }

    def _lengths_of(self, client: int, at_s: int) -> IndependentLengths:
        """The client's histograms of the newest six hours that have any; of its first ones before those."""
        t = self.lengths
        mine = t["client"] == client
        windows = np.unique(t["window_s"][mine])
        window = windows[max(0, int(np.searchsorted(windows, at_s, side="right")) - 1)]
        chosen = mine & (t["window_s"] == window)

        def histogram(field: str) -> LengthHistogram:
            bins = chosen & (t["field"] == field)
            mean = t["mean_in_bin"][bins].astype(np.float64)
            return LengthHistogram(low=mean, high=mean, weight=t["prob"][bins].astype(np.float64))

        return IndependentLengths(name=self.name, prompt=histogram("input_tokens"), output=histogram("output_tokens"))


def _spread(count: int, law: str, shape: float, rng: np.random.Generator) -> FloatArray:
    """Arrivals within one window, seconds from its start: `count` + 1 gaps of the law, scaled to fill it."""
    if law not in LAWS:
        raise ConfigError(f"unknown law {law!r} of gaps; known: {', '.join(LAWS)}. Nothing was started")
    gaps = rng.gamma(shape, 1.0, count + 1) if law == "Gamma" else rng.weibull(shape, count + 1)
    ends = np.cumsum(gaps)
    times_s: FloatArray = ends[:-1] * (WINDOW_S / ends[-1])
    return times_s


def read_client_models(folder: Path, model: str) -> ClientModels:
    """The models named `servegen_<model>_*.parquet` in `folder`.

    Raises:
        ConfigError: a file is missing or broken, or pyarrow is not installed.
    """
    what = "ServeGen's client models"
    clients = read_columns(
        folder / f"servegen_{model}_clients.parquet", ("client", "t_s", "rate", "pat", "shape"), what=what
    )
    lengths = read_columns(
        folder / f"servegen_{model}_lengths.parquet", ("client", "window_s", "field", "prob", "mean_in_bin"), what=what
    )
    return ClientModels(name=f"ServeGen {model}", clients=clients, lengths=lengths)
