"""`pals profile show FILE`: prints a profile for people or as JSON, predicts a point asked for, and draws it."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pals.cli.main import say
from pals.core.errors import ConfigError
from pals.core.load import Mix
from pals.core.quantities import OperatingPoint
from pals.models.engine_facts import EngineFacts
from pals.models.profile import Profile
from pals.runtime.agent import load_profile
from pals.views.profile_facts import ProfileFacts, facts_of
from pals.views.profile_text import plain_text, print_profile

FORMAT = "pals-profile-show/1"
FILE_WIDTH = 120  # columns, where nobody looks: in a pipe or a file
DIGITS = 6  # significant, in JSON
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
MOST_BYTES = 1 << 20  # a profile has 8 KiB; what is larger by far is none
ASKED = "asked"
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", re.IGNORECASE)
#: Factor to the SI unit of each unit, by its lower-case name.
_WATTS, _MEGAHERTZ = {"w": 1.0, "kw": 1000.0}, {"mhz": 1.0, "ghz": 1000.0}


def show(args: argparse.Namespace) -> int:
    """Print, predict, draw.

    Raises:
        ConfigError: no profile, options that do not fit, or a load or point too far from what was measured.
    """
    path = Path(args.file)
    profile = read_profile(path)
    mixes = mixes_of(args, profile)
    figure = figure_of(args.figure)
    point = None if args.point is None else point_of(args.point, profile.facts)
    facts = facts_of(profile, file=str(path), size=path.stat().st_size, mixes=mixes, node=args.node, point=point)
    if args.json:
        print(as_json(facts))
    else:
        print_text(facts)
    if figure is not None:
        from pals.views.profile_figure import draw_profile

        named = {b.mix for b in facts.best_points}
        drawn = next(m for m in mixes if m.name in named)
        draw_profile(profile, drawn, figure, node=args.node)
        say(f"{figure}: drawn for the mix {drawn.name}" + (" (another: --mix)" if len(mixes) > 1 else ""))
    return 0


def print_text(facts: ProfileFacts) -> None:
    """As wide as the terminal; without one, plain text of a fixed width, unless COLUMNS says another."""
    if sys.stdout.isatty():
        print_profile(facts, Console(highlight=False, markup=False, emoji=False))
        return
    given = os.environ.get("COLUMNS", "")
    print(plain_text(facts, width=int(given) if given.isdigit() and int(given) > 0 else FILE_WIDTH))


def read_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        ConfigError: missing, unreadable, or no profile of this format; says which.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a profile's file. Nothing was shown")
    if not path.exists():
        raise ConfigError(
            f"there is no file {path}; make a profile with `pals profile --out {path}`. Nothing was shown"
        )
    if not path.is_file():
        raise ConfigError(f"{path} is no regular file; name a profile's file. Nothing was shown")
    if path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size >> 20} MiB, a profile 8 KiB: it is none. Nothing was shown")
    return load_profile(path)


def mixes_of(args: argparse.Namespace, profile: Profile) -> tuple[Mix, ...]:
    """The loads to predict for: the profile's mixes, one of them, or another that was asked for.

    Raises:
        ConfigError: an unknown name, lengths below 1, or both asked for.
    """
    lengths = args.prompt_tokens, args.output_tokens
    if lengths == (None, None):
        if args.mix is None:
            return profile.mixes
        if chosen := tuple(m for m in profile.mixes if m.name == args.mix):
            return chosen
        raise ConfigError(
            f"--mix {args.mix}: this profile has {', '.join(m.name for m in profile.mixes)}. Nothing was shown"
        )
    if args.mix is not None or None in lengths:
        raise ConfigError("another load needs --prompt-tokens and --output-tokens, and no --mix. Nothing was shown")
    if not all(1 <= n < math.inf for n in lengths):
        raise ConfigError("--prompt-tokens and --output-tokens must be at least 1. Nothing was shown")
    return (Mix(name=ASKED, prompt_tokens=lengths[0], output_tokens=lengths[1]),)


def figure_of(given: str | None) -> Path | None:
    """Where the figure goes.

    Raises:
        ConfigError: a kind of file that is not drawn, or a folder that does not exist.
    """
    if given is None:
        return None
    path = Path(given)
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        raise ConfigError(f"--figure {given}: the name must end in {', '.join(FIGURE_SUFFIXES)}. Nothing was drawn")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--figure {given}: {path.parent} is no folder, or the name is one. Nothing was drawn")
    return path


def point_of(text: str, facts: EngineFacts) -> OperatingPoint:
    """ "400W,1200MHz,32" in any order: a limit (W, kW), a clock lock (MHz, GHz), active sequences (a plain number).

    What is left out is as the engine is launched: the found limit, no lock, the launch batch.

    Raises:
        ConfigError: a part without a meaning, one twice, or outside what boards and engine accept.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        kind, value = _part(part.strip(), text)
        if kind in found:
            raise ConfigError(f"--point {text}: two {kind}s. {_POINT_HELP}")
        found[kind] = value
    limit_w, clock_mhz = found.get("power limit", facts.max_limit_w), found.get("clock")
    sequences = found.get("number of sequences", float(facts.launch_sequences))
    _inside(text, limit_w, (facts.min_limit_w, facts.max_limit_w), "W per board")
    if clock_mhz is not None:
        _inside(text, clock_mhz, (facts.min_sm_clock_mhz, facts.max_sm_clock_mhz), "MHz")
    _inside(text, sequences, (1, facts.launch_sequences), "active sequences")
    return OperatingPoint(
        power_limit_w=limit_w,
        sm_clock_mhz=None if clock_mhz is None else round(clock_mhz),
        active_sequences=int(sequences),
    )


_POINT_HELP = "A point is a limit, a clock and a number of sequences, as 400W,1200MHz,32. Nothing was predicted"


def _part(part: str, text: str) -> tuple[str, float]:
    """What a part means, and its value in W, MHz or sequences."""
    if (match := _PART.fullmatch(part)) is None:
        raise ConfigError(f"--point {text}: {part!r} is no number with a unit. {_POINT_HELP}")
    value, unit = float(match[1]), match[2].lower()
    if unit in _WATTS:
        return "power limit", value * _WATTS[unit]
    if unit in _MEGAHERTZ:
        return "clock", value * _MEGAHERTZ[unit]
    if unit == "" and value.is_integer():
        return "number of sequences", value
    raise ConfigError(
        f"--point {text}: {part!r} has no unit of W, kW, MHz or GHz, nor is it a whole number. {_POINT_HELP}"
    )


def _inside(text: str, value: float, allowed: tuple[float, float], unit: str) -> None:
    if not allowed[0] <= value <= allowed[1]:
        raise ConfigError(
            f"--point {text}: {value:g} is outside {allowed[0]:g}..{allowed[1]:g} {unit}, which boards and engine accept. "
            "Nothing was predicted"
        )


def as_json(facts: ProfileFacts) -> str:
    """The facts, keys by their names; units are in the names, what is unknown is null."""
    return json.dumps({"format": FORMAT, **_plain(asdict(facts))}, indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """Floats of a few digits; none that JSON has no word for."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
