"""What a sweep is told before anything is measured: facts of engine and boards, candidates, budgets; all checked here."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pals.cli.main import say
from pals.cli.profile_commands import LONGEST_MINUTES
from pals.control.guard import Guard
from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.core.load import Mix
from pals.core.quantities import BoardInfo, EngineInfo
from pals.models.engine_facts import EngineFacts
from pals.models.profile import MIN_ROWS
from pals.profiler.plan import SweepPlan, default_clocks, default_limits_w, default_mixes, default_sequences

N = TypeVar("N", int, float)
DEFAULT_STEP_TOKENS = 8192  # of an engine that does not tell: vLLM's server on a large board


def facts_of(info: EngineInfo, boards: Sequence[BoardInfo], guard: Guard, shape: ModelShape | None) -> EngineFacts:
    """What driver and engine say; `shape` is the user's and goes before the engine's."""
    top_mhz = min(b.max_sm_clock_mhz for b in boards)
    tensor_parallel = re.search(r"\btp(\d+)", info.parallelism)
    known = shape or info.shape
    if known is None:
        say("the engine does not tell its model's sizes: the sweep starts from wide priors; --config FILE gives them")
    return EngineFacts(
        board=boards[0].name,
        boards=len(boards),
        min_limit_w=guard.min_limit_w,
        max_limit_w=guard.max_limit_w,
        min_sm_clock_mhz=guard.sm_clocks_mhz[0] if guard.sm_clocks_mhz else top_mhz,
        max_sm_clock_mhz=top_mhz,
        launch_sequences=guard.launch_sequences,
        step_tokens=info.step_tokens or DEFAULT_STEP_TOKENS,
        tensor_parallel=int(tensor_parallel[1]) if tensor_parallel else 1,
        shape=known,
    )


def shape_of(path: str | None) -> ModelShape | None:
    """The model's sizes from a config.json; None where no file is given.

    Raises:
        ConfigError: it cannot be read, or lacks a size.
    """
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("no JSON object")
        return ModelShape.from_config(config.get("text_config") or config)
    except (OSError, ValueError, TypeError, ZeroDivisionError, AttributeError) as e:
        raise ConfigError(f"--config {path} is no model's config.json ({e}). Nothing was changed") from e
    except ConfigError as e:
        raise ConfigError(f"--config {path}: {e}. Nothing was changed") from e


def plan_of(args: argparse.Namespace, guard: Guard, context_tokens: int | None) -> SweepPlan:
    """The candidates asked for, or the default ones, within the budgets given.

    Raises:
        ConfigError: outside what boards and engine accept, or no number; nothing was written.
    """
    budgets_of(args)
    limits_w = numbers(args.limits_w, float, "--limits-w") or default_limits_w(guard.min_limit_w, guard.max_limit_w)
    sequences = numbers(args.sequences, int, "--sequences") or default_sequences(guard.launch_sequences)
    clocks = () if args.clocks == "none" else numbers(args.clocks, int, "--clocks")
    known = guard.sm_clocks_mhz
    refuse_outside("--limits-w", limits_w, (guard.min_limit_w, guard.max_limit_w), "W per board")
    refuse_outside("--sequences", sequences, (1, guard.launch_sequences), "active sequences")
    if clocks and not known:
        raise ConfigError("--clocks: these boards accept no clock lock; leave it out. Nothing was changed")
    if clocks:
        refuse_outside("--clocks", clocks, (known[0], known[-1]), "MHz")
        clocks = tuple(sorted({guard.supported_clock_mhz(mhz) or mhz for mhz in clocks}))
    elif args.clocks is None:
        clocks = default_clocks(known)
    mixes = mixes_of(args, context_tokens)
    if (count := (len(limits_w) + len(clocks)) * len(sequences) * len(mixes)) < MIN_ROWS:
        raise ConfigError(
            f"limits, clocks and sequences given make {count} points, and a profile needs {MIN_ROWS}: name more of them. "
            "Nothing was changed"
        )
    return SweepPlan(
        mixes=mixes,
        limits_w=limits_w,
        sequences=sequences,
        clocks_mhz=clocks,
        points=args.points,
        seconds=60.0 * args.minutes,
        error=args.error / 100.0,
        settle_s=args.settle_s,
        window_s=args.window_s,
        seed=args.seed,
    )


def budgets_of(args: argparse.Namespace) -> None:
    """Raise `ConfigError` where a budget makes no sense; the plan itself refuses points and windows."""
    if args.points < MIN_ROWS:
        raise ConfigError(f"--points {args.points}: a profile needs {MIN_ROWS} at least. Nothing was changed")
    if not 0 < args.minutes < LONGEST_MINUTES:
        raise ConfigError(
            f"--minutes {args.minutes:g} must lie between 0 and {LONGEST_MINUTES:.0f}. Nothing was changed"
        )
    if not 0 < args.error <= 50:
        raise ConfigError(f"--error {args.error:g} is a percentage, above 0 and at most 50. Nothing was changed")
    if not all(math.isfinite(seconds) for seconds in (args.settle_s, args.window_s)):
        raise ConfigError("--settle-s and --window-s must be finite. Nothing was changed")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed} must be 0 or more. Nothing was changed")


def mixes_of(args: argparse.Namespace, context_tokens: int | None) -> tuple[Mix, ...]:
    """The user's mix, one that mostly prefills, one that mostly decodes; cut to the engine's context, which is said.

    Raises:
        ConfigError: a mean below 2 tokens, or nothing fits.
    """
    if min(args.prompt_tokens, args.output_tokens) < 2:
        raise ConfigError("--prompt-tokens and --output-tokens must be at least 2. Nothing was changed")
    asked = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
    mixes = default_mixes(context_tokens, **asked)
    for mix, whole in zip(mixes, default_mixes(**asked), strict=True):
        if mix != whole:
            say(
                f"mix {mix.name}: prompts of {mix.prompt_tokens:.0f} and outputs of {mix.output_tokens:.0f} tokens instead of "
                f"{whole.prompt_tokens:.0f} and {whole.output_tokens:.0f}: this engine takes {context_tokens} tokens a request"
            )
    return mixes


def numbers(text: str | None, kind: Callable[[str], N], option: str) -> tuple[N, ...]:
    """The numbers of a comma-separated list, rising, each once; empty where it is not given.

    Raises:
        ConfigError: something else stands there.
    """
    if text is None:
        return ()
    try:
        return tuple(sorted({kind(part) for part in text.split(",")}))
    except ValueError as e:
        raise ConfigError(f"{option} {text}: numbers separated by commas are needed ({e}). Nothing was changed") from e


def refuse_outside(option: str, values: Sequence[float], allowed: tuple[float, float], unit: str) -> None:
    """Raise `ConfigError` for values that boards or engine do not accept, NaN among them."""
    low, high = allowed
    if bad := [v for v in values if not low <= v <= high]:
        raise ConfigError(
            f"{option} {', '.join(f'{v:g}' for v in bad)}: possible here are {low:g}..{high:g} {unit}. Nothing was changed"
        )
