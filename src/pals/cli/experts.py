"""`pals experts`: which experts an engine's tokens choose, now and over time. It only reads; what is not known is told with its reason."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pals.cli.agent import engines_of
from pals.cli.extras import require
from pals.cli.main import say
from pals.core.errors import ConfigError, EngineGoneError
from pals.core.experts import ExpertCounts, ExpertSummary, summarise
from pals.runtime.channel import run_dir
from pals.runtime.expert_channel import read_engine
from pals.runtime.group import EngineGroup, unique_name
from pals.runtime.journal import encode, read_journal
from pals.views.expert_history import history
from pals.views.expert_picture import ExpertPicture, picture_of
from pals.views.expert_text import plain_experts, print_experts, print_history

FORMAT = "pals-experts/1"
FILE_WIDTH = 120  # columns, where nobody looks: in a pipe or a file
SHORTEST_S = 1.0  # workers publish at most twice a second
MOST_KEPT = 3600  # windows of a watch that are drawn over time
FIGURE_SUFFIXES = (".png", ".pdf", ".svg")


def experts(
    args: argparse.Namespace,
    environ: Mapping[str, str] = os.environ,
    wait: Callable[[float], object] = time.sleep,
) -> int:
    """Look, and print, draw or both; with `--watch` until interrupted.

    Raises:
        ConfigError: options that do not fit, no such engine, one without counts, or a journal without summaries.
        EngineGoneError: the engine ended between two looks.
    """
    window_s = args.window if args.watch is None else args.watch
    if not SHORTEST_S <= window_s < float("inf"):
        raise ConfigError(
            f"{window_s:g} s are no window: at least {SHORTEST_S:g} s, since workers publish twice a second"
        )
    figure = _figure_of(args.png)
    told = () if args.journal is None else _summaries(Path(args.journal))
    if args.journal is not None and args.model is None:
        if args.watch is not None:
            raise ConfigError("--watch looks at a running engine; name it beside --journal. Nothing was shown")
        _show(None, told, figure=figure, as_json=args.json)
        return 0
    folder = run_dir(dict(environ))
    look = Look(_engine(folder, args.model), folder)
    show = partial(_show, figure=figure, as_json=args.json)
    if args.watch is None:
        picture = look.again(partial(wait, window_s))
        show(picture, told, window=look.window)
        return 0
    with contextlib.suppress(KeyboardInterrupt):  # the way a watch ends
        while True:
            picture = look.again(partial(wait, window_s))
            if not args.json and sys.stdout.isatty():
                Console().clear()
            show(picture, told or look.over_time, window=look.window, one_line=True)
    return 0


@dataclass(slots=True)
class Look:
    """Looks at one engine's counts again and again; each window begins where the one before ended."""

    group: EngineGroup
    folder: Path
    window: ExpertCounts | None = None  # the newest
    seen: deque[ExpertSummary] = field(default_factory=lambda: deque(maxlen=MOST_KEPT))
    _last: ExpertCounts | None = None
    _reference: ExpertCounts | None = None
    _reference_told: str = ""

    def again(self, wait: Callable[[], object]) -> ExpertPicture:
        """Wait, and return the window since the look before.

        Drift is from what the engine had served before the first look, or, where that was too little, from the first window.

        Raises:
            ConfigError: the engine counts no experts.
            EngineGoneError: it ended or was started anew.
        """
        if self._last is None:
            self._last = self._reference = self._counts()
            self._reference_told = "all that was served before"
        wait()
        now = self._counts()
        try:
            self.window = window = now.since(self._last)
        except ValueError as e:
            raise EngineGoneError(f"{self.group.told()}: {e}. Look again") from e
        summary = summarise(window, reference=self._reference)
        picture = picture_of(
            window, summary, engine=self.group.info.name, emulated=self.group.info.bank is not None,
            reference=self._reference, reference_told=self._reference_told,
        )  # fmt: skip
        if summary.drift is None and summary.variation is not None:
            self._reference, self._reference_told = window, "the first window"
        self._last = now
        self.seen.append(summary)
        return picture

    @property
    def over_time(self) -> tuple[ExpertSummary, ...]:
        """The windows so far; nothing while there is but one."""
        return history(self.seen) if len(self.seen) > 1 else ()

    def _counts(self) -> ExpertCounts:
        if not self.group.alive():
            raise EngineGoneError(f"{self.group.told()} has ended")
        counts = read_engine(self.folder, self.group.pids)
        if counts is None:
            raise ConfigError(
                f"{self.group.told()} tells no expert counts. A worker begins to with its first step, where the engine was started "
                "with PALS_EXPERTS=1 (PALS_EXPERTS=1 vllm serve MODEL); its log says why a worker counts none. Nothing was shown"
            )
        return counts


def _engine(folder: Path, wanted: str | None) -> EngineGroup:
    """The engine asked for, by its name, model or process; without, the only one.

    Raises:
        ConfigError: none, another name, several and no choice, or a model without experts.
    """
    groups = engines_of(folder, None)
    names = {unique_name(g, groups): g for g in groups}
    if wanted is None:
        found = groups
    else:
        found = [g for n, g in names.items() if wanted in (n, g.info.name, g.info.model, *map(str, g.pids))]
    if not found:
        near = difflib.get_close_matches(str(wanted), names, n=1)
        raise ConfigError(
            f"no engine {wanted} runs in {folder}{f'; did you mean {near[0]!r}?' if near else ''} There {_are(list(names))}. "
            "Nothing was shown"
        )
    if len(found) > 1:
        raise ConfigError(
            f"several engines: name one of {', '.join(n for n, g in names.items() if g in found)}. Nothing was shown"
        )
    shape = found[0].info.shape
    if shape is not None and shape.experts == 0:
        raise ConfigError(f"{found[0].told()} is a dense model: it has no experts to count. Nothing was shown")
    return found[0]


def _are(names: list[str]) -> str:
    return f"{'are' if len(names) > 1 else 'is'} {', '.join(names)}"


def _summaries(path: Path) -> tuple[ExpertSummary, ...]:
    """The windows that a journal tells of.

    Raises:
        ConfigError: no journal, or none of its records says anything of experts.
    """
    _, records = read_journal(path)
    windows = history(record.sample.experts for record in records)
    if not windows:
        raise ConfigError(
            f"{path} says nothing of experts: its engine did not count them (start it with PALS_EXPERTS=1), or the agent that "
            "wrote it was older. Nothing was shown"
        )
    return windows


def _figure_of(given: str | None) -> Path | None:
    """Where the figure goes; asked before anybody waits.

    Raises:
        ConfigError: a kind of file that is not drawn, no folder, or no matplotlib.
    """
    if given is None:
        return None
    path = Path(given)
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        raise ConfigError(f"--png {given}: the name must end in {', '.join(FIGURE_SUFFIXES)}. Nothing was drawn")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--png {given}: {path.parent} is no folder, or the name is one. Nothing was drawn")
    require("matplotlib")
    return path


def _show(
    picture: ExpertPicture | None,
    over_time: tuple[ExpertSummary, ...],
    *,
    figure: Path | None,
    as_json: bool,
    window: ExpertCounts | None = None,
    one_line: bool = False,
) -> None:
    """Print, and draw where a figure is wanted."""
    if as_json:
        told = as_plain(picture, over_time, window)
        print(json.dumps(told, indent=None if one_line else 1, allow_nan=False), flush=True)
    elif sys.stdout.isatty():
        print_looked(picture, over_time, Console(highlight=False, markup=False, emoji=False))
    else:
        given = environ_width(os.environ)
        print(plain_experts(partial(print_looked, picture, over_time), width=given), flush=True)
    if figure is not None:
        from pals.views.expert_figure import draw_experts

        draw_experts(picture, over_time, figure)
        if not one_line:
            say(f"{figure}: drawn")


def environ_width(environ: Mapping[str, str]) -> int:
    """Columns of a pipe or a file: $COLUMNS, or a fixed number."""
    given = environ.get("COLUMNS", "")
    return int(given) if given.isdigit() and int(given) > 0 else FILE_WIDTH


def print_looked(picture: ExpertPicture | None, over_time: tuple[ExpertSummary, ...], console: Console) -> None:
    """A window, how it went over time, or both."""
    if picture is not None:
        print_experts(picture, console)
    if picture is not None and over_time:
        console.print()
    if over_time:
        print_history(over_time, console)


def as_plain(
    picture: ExpertPicture | None, over_time: tuple[ExpertSummary, ...], window: ExpertCounts | None
) -> dict[str, Any]:
    """The JSON of `docs/experts-view.md`: what is not known is null, and `unknown` says why."""
    told: dict[str, Any] = {"format": FORMAT}
    if picture is not None and window is not None:
        told |= {
            "engine": picture.engine,
            "emulated": picture.emulated,
            "summary": _plain(picture.summary),
            "drift_from": picture.reference if picture.summary.drift is not None else None,
            "drift_by_chance": picture.drift_by_chance,
            "layers": [
                {
                    "name": name,
                    "routed": None if layer.load is None else counts.tolist(),
                    "distinct_per_step": layer.distinct_per_step,
                    "why": layer.why or None,
                }
                for name, layer, counts in zip(window.layers, picture.layers, window.routed, strict=True)
            ],
        }
    return told | ({"over_time": [_plain(w) for w in over_time]} if over_time else {})


def _plain(summary: ExpertSummary) -> dict[str, Any]:
    return {**encode(summary), "unknown": dict(summary.unknown)}
