"""What is known of an engine and its boards before anything is measured: the model needs it, and a profile keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from pals.core.architecture import ModelShape
from pals.core.quantities import Checked


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts(Checked):
    """Read from the driver, the engine and its config.json."""

    board: str  # as the driver names it: which family's priors apply
    boards: int  # move together
    min_limit_w: float
    max_limit_w: float  # the found limit: nothing is asked above it
    min_sm_clock_mhz: int
    max_sm_clock_mhz: int
    launch_sequences: int
    step_tokens: int = 8192  # most tokens of one step (max_num_batched_tokens)
    tensor_parallel: int = 1  # boards that divide each matrix
    shape: ModelShape | None = None  # None: the model's sizes are unknown, priors are wide
    popularity: tuple[float, ...] | None = (
        None  # of experts while it was measured, by parts; None: not counted, so fitted
    )

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        counts = (self.boards, self.launch_sequences, self.step_tokens, self.tensor_parallel)
        if min(counts) < 1 or not 0 < self.min_limit_w <= self.max_limit_w:
            raise ValueError("boards, sequences, step tokens, parallelism and limits must be above 0, limits in order")
        if self.popularity is not None and (min(self.popularity, default=-1.0) < 0 or sum(self.popularity) <= 0):
            raise ValueError("popularity needs parts of 0 or more, some above")
        if not 0 < self.min_sm_clock_mhz <= self.max_sm_clock_mhz:
            raise ValueError(f"no SM clocks are {self.min_sm_clock_mhz}..{self.max_sm_clock_mhz} MHz")
