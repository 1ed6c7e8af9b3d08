"""Counting in tensors: the custom op that a router's choices go to, a preallocated row a layer, sums a step; waits for nothing.

A step begins by clearing the rows and marking the real tokens, and ends by adding to the sums; so warm-up, profiling and dummy batches,
which pass outside a step, and the padding of CUDA graphs count nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, register_fake

Capture = Callable[[torch.Tensor], None]  # what a router calls with the experts that each token chose
Rows = Callable[[torch.Tensor], torch.Tensor | None]  # of those choices the rows that are this worker's; None: not told


def count_experts(row: torch.Tensor, real: torch.Tensor, chosen: torch.Tensor) -> None:
    """Add `chosen`, shape (tokens, top_k), to `row`; `real` is 1 for each choice of a real token and 0 for padding.

    `row` is a power of two long and longer than there are experts, so that an id that names none (-1, or one of the shared experts that
    are numbered on) falls behind them instead of out of bounds, which on a GPU would end the process.
    """
    index = chosen.reshape(-1).to(torch.int64) & (row.numel() - 1)
    if index.numel() <= real.numel():
        row.scatter_add_(0, index, real[: index.numel()])


def _traced(row: torch.Tensor, real: torch.Tensor, chosen: torch.Tensor) -> None:
    """What a compiler sees of it."""


# Not by `custom_op`, which adds 10 µs of Python to each call, as much as the rest of it.
_ops = Library("pals", "FRAGMENT")
_ops.define("count_experts(Tensor(a!) row, Tensor real, Tensor chosen) -> ()")
_ops.impl("count_experts", count_experts, "CompositeExplicitAutograd")
register_fake("pals::count_experts", _traced, lib=_ops)


class ExpertCounter:
    """The tensors of one worker; all memory is taken here."""

    def __init__(self, *, layers: int, experts: int, top_k: int, most_tokens: int, device: torch.device | str) -> None:
        self.experts, self.top_k, self.steps, self.tokens = experts, top_k, 0, 0
        self.now = torch.zeros((layers, 1 << experts.bit_length()), dtype=torch.int32, device=device)
        self.real = torch.zeros(most_tokens * top_k, dtype=torch.int32, device=device)
        #: A row a layer: tokens that chose each expert, and last the experts touched, summed over steps.
        self.sums = torch.zeros((layers, experts + 1), dtype=torch.int64, device=device)
        self._marked = 0

    @torch.inference_mode()
    def begin(self, tokens: int) -> None:
        """A step with `tokens` real tokens begins."""
        self.now.zero_()
        choices = min(tokens * self.top_k, self.real.numel())
        if choices > self._marked:
            self.real[self._marked : choices].fill_(1)
        elif choices < self._marked:
            self.real[choices : self._marked].zero_()
        self._marked = choices

    @torch.inference_mode()
    def end(self, tokens: int) -> None:
        """The step's forward pass is under way or done: whatever the device does next comes after it."""
        seen = self.now[:, : self.experts]
        self.sums[:, : self.experts] += seen
        self.sums[:, self.experts] += (seen > 0).sum(1)
        self.steps += 1
        self.tokens += tokens

    def capture(self, layer: int, local_rows: Rows) -> Capture:
        """What layer `layer`'s router is to call with its choices."""
        row, real, top_k = self.now[layer], self.real, self.top_k

        def count(chosen: torch.Tensor) -> None:
            mine = local_rows(chosen)
            if mine is not None:  # some kernels append a column for each shared expert
                torch.ops.pals.count_experts(row, real, mine[:, :top_k])

        return count


def listen(router: Any, count: Capture) -> None:
    """Have `router` call `count` with each choice, beside whatever else captures now or later."""
    set_capture_fn = router.set_capture_fn

    def set_both(other: Capture | None) -> None:
        set_capture_fn(count if other is None else both(count, other))

    set_both(getattr(router, "capture_fn", None))
    router.set_capture_fn = set_both


def both(count: Capture, other: Capture) -> Capture:
    """One capture function that calls the two."""

    def capture(chosen: torch.Tensor) -> None:
        count(chosen)
        other(chosen)

    return capture


def whole(chosen: torch.Tensor) -> torch.Tensor:
    """Every row is this worker's."""
    return chosen


def rows_of_rank(chosen: torch.Tensor, tokens_of_ranks: list[int], rank: int) -> torch.Tensor | None:
    """This data-parallel rank's rows: all, or its part where all ranks' tokens were gathered before routing; None: neither."""
    if len(chosen) == sum(tokens_of_ranks):
        start = sum(tokens_of_ranks[:rank])
        return chosen[start : start + tokens_of_ranks[rank]]
    return chosen if len(chosen) == tokens_of_ranks[rank] else None


def rows_under_data_parallelism(rank: int) -> Rows:
    """`rows_of_rank` with what vLLM's forward context says; asked on the host, so a captured graph keeps the answer of its size."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    def mine(chosen: torch.Tensor) -> torch.Tensor | None:
        facts = get_forward_context().dp_metadata if is_forward_context_available() else None
        return chosen if facts is None else rows_of_rank(chosen, facts.num_tokens_across_dp_cpu.tolist(), rank)

    return mine
