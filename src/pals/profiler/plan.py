"""What a sweep may choose from and what it may cost; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pals.core.errors import ConfigError
from pals.core.load import Mix
from pals.core.quantities import Checked

MOST_POINTS = 50
LIMIT_LEVELS, CLOCK_LEVELS = 8, 6
LOWEST_LOCK = 0.4  # of the top clock: far below every knee known, where nothing is saved any more
SHORTEST = 16  # tokens: the shorter part of a mix is not cut below, so that its requests still decode


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan(Checked):
    """Candidate levels, the load, and the budgets; the highest limit is the found one, under which locks are measured."""

    mixes: tuple[Mix, ...]
    limits_w: tuple[float, ...]  # per board
    sequences: tuple[int, ...]
    clocks_mhz: tuple[int, ...] = ()  # locks; empty: none is set
    points: int = 40  # rows, repeats included
    seconds: float = 1100.0  # of engine time; a point that would end later is not begun
    error: float = 0.01  # stop where the mean predicted relative standard deviation is below this
    settle_s: float = 2.0  # least wait before a window
    window_s: float = 8.0  # shortest window; at most `longest_window_s`
    read_s: float = 0.5  # between two readings of the boards in a window
    seed: int = 0  # breaks ties

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if not (self.mixes and self.limits_w and self.sequences):
            raise ConfigError("a sweep needs at least one mix, one power limit and one number of sequences")
        if not 1 <= self.points <= MOST_POINTS:
            raise ConfigError(f"a sweep measures 1 to {MOST_POINTS} points, not {self.points}; nothing was changed")
        if self.window_s < 4 * self.read_s or self.settle_s < 0 or self.seconds <= 0 or self.read_s <= 0:
            raise ConfigError(
                f"a window of {self.window_s:g} s must hold at least 4 readings ({self.read_s:g} s apart), times must be "
                "above 0; nothing was changed"
            )

    @property
    def longest_window_s(self) -> float:
        """A window is not made longer than this for the sake of more requests."""
        return 3.0 * self.window_s

    @property
    def longest_settle_s(self) -> float:
        """After so long a point is measured, even if requests that began before it still run; their latencies do not count."""
        return max(self.settle_s, 25.0)

    @property
    def longest_turnover_s(self) -> float:
        """So long is waited for requests of another mix, or above the new level, to end."""
        return max(self.settle_s, 60.0)


def default_limits_w(min_w: float, found_w: float) -> tuple[float, ...]:
    """Even steps from the boards' floor to the found limit, inner ones in multiples of 5 W."""
    step_w = (found_w - min_w) / (LIMIT_LEVELS - 1)
    inner = (5.0 * round((min_w + i * step_w) / 5.0) for i in range(1, LIMIT_LEVELS - 1))
    return tuple(sorted({min_w, found_w, *(w for w in inner if min_w < w < found_w)}))


def default_sequences(launch: int) -> tuple[int, ...]:
    """Powers of two below the launch limit, and the launch limit itself."""
    powers = (1 << i for i in range(launch.bit_length()))
    return tuple(sorted({*(n for n in powers if n < launch), launch}))


def default_clocks(lockable_mhz: Sequence[int]) -> tuple[int, ...]:
    """Even steps over the clocks worth locking, each one that the boards accept; empty where they accept none."""
    if not lockable_mhz:
        return ()
    top_mhz = max(lockable_mhz)
    low_mhz = max(min(lockable_mhz), LOWEST_LOCK * top_mhz)
    wanted = (low_mhz + i * (top_mhz - low_mhz) / CLOCK_LEVELS for i in range(CLOCK_LEVELS))
    return tuple(sorted({min(lockable_mhz, key=lambda mhz: abs(mhz - w)) for w in wanted}))


def default_mixes(
    context_tokens: int | None = None, *, prompt_tokens: float = 1200, output_tokens: float = 225
) -> tuple[Mix, ...]:
    """The user's mix first, then one that nearly only prefills and one that nearly only decodes, cut to the model's context."""
    mixes = (
        Mix(name="chat", prompt_tokens=prompt_tokens, output_tokens=output_tokens),
        Mix(name="prefill", prompt_tokens=2000, output_tokens=16),
        Mix(name="decode", prompt_tokens=64, output_tokens=256),
    )
    return tuple(fitting(mix, context_tokens) for mix in mixes)


def fitting(mix: Mix, context_tokens: int | None) -> Mix:
    """`mix`, its lengths reduced where its longest request exceeds the model's context: alike, but not to nothing.

    Raises:
        ConfigError: the context holds no request.
    """
    room = (context_tokens - 2) / (1.0 + mix.spread) if context_tokens is not None else float("inf")
    if mix.prompt_tokens + mix.output_tokens <= room:
        return mix
    if room < 16:
        raise ConfigError(f"mix {mix.name!r} does not fit a context of {context_tokens} tokens; nothing was changed")
    short = min(mix.prompt_tokens, mix.output_tokens)
    alike = short * room / (mix.prompt_tokens + mix.output_tokens)
    kept = min(short, float(max(int(alike), min(SHORTEST, int(room / 8)))))
    rest = float(int(room - kept))
    if mix.prompt_tokens < mix.output_tokens:
        return replace(mix, prompt_tokens=kept, output_tokens=rest)
    return replace(mix, prompt_tokens=rest, output_tokens=kept)
