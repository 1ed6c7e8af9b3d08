"""The routing a profile was measured under, small enough to store: the shares of each expert in some layers, a byte each.

Layers route independently of one another, so a few tell of a drift what all would; what all of them say of popularity is in the facts.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

import numpy as np

from pals.core.experts import ExpertCounts

MOST_BYTES = 512  # of shares: 4 layers of 128 experts; a profile grows by less than 1 KB
LEVELS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingReference:
    """See the module."""

    layers: tuple[str, ...]  # those kept, spread evenly
    tokens: int  # through each layer
    top_k: int
    shares: str  # base64 of a byte an expert and layer: 255 times the root of its share over the layer's largest

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.top_k < 1 or not self.layers:
            raise ValueError("a routing needs layers, tokens and experts a token")
        if not self._bytes().any(axis=1).all():
            raise ValueError("a layer of a routing has no share above 0")

    @staticmethod
    def of(counts: ExpertCounts) -> RoutingReference | None:
        """From the counts of a whole sweep; None where no layer was counted."""
        known = np.flatnonzero(counts.known)
        if not len(known):
            return None
        keep = min(len(known), max(1, MOST_BYTES // counts.routed.shape[1]))
        rows = known[np.unique(np.linspace(0, len(known) - 1, keep).round().astype(int))]
        share = counts.routed[rows] / counts.routed[rows].max(axis=1, keepdims=True)
        coded = np.round(LEVELS * np.sqrt(share)).astype(np.uint8)
        return RoutingReference(
            layers=tuple(counts.layers[i] for i in rows), tokens=counts.tokens, top_k=counts.top_k,
            shares=base64.b64encode(coded.tobytes()).decode("ascii"),
        )  # fmt: skip

    def counts(self) -> ExpertCounts:
        """The same as counts, to measure drift from."""
        share = (self._bytes() / LEVELS) ** 2
        share /= share.sum(axis=1, keepdims=True)
        routed = np.floor(share * self.tokens * self.top_k).astype(np.int64)
        return ExpertCounts.alike(
            time_s=0.0, span_s=None, steps=0, tokens=self.tokens, layers=self.layers, top_k=self.top_k, routed=routed, distinct=None
        )  # fmt: skip

    def _bytes(self) -> np.ndarray:
        try:
            raw = np.frombuffer(base64.b64decode(self.shares, validate=True), np.uint8)
        except binascii.Error as e:
            raise ValueError(f"the shares of a routing are no base64: {e}") from e
        if not len(raw) or len(raw) % len(self.layers):
            raise ValueError(f"{len(raw)} shares do not fit {len(self.layers)} layers")
        return raw.reshape(len(self.layers), -1)
