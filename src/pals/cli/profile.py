"""`pals profile`: load a running engine, measure it at points chosen one after the other, write a profile."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Protocol

from pals.cli.agent import EXIT_INTERRUPTED, boards_of, pick_engine, refuse_unwritable, stopping
from pals.cli.main import say
from pals.cli.profile_plan import facts_of, plan_of, shape_of
from pals.cli.profile_progress import SweepNotes, quality_told, showing
from pals.cli.run_folder import bank_of
from pals.cli.writer import may_mend, writing
from pals.control.guard import Guard
from pals.control.static import StaticPolicy
from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError, EngineGoneError
from pals.core.experts import ExpertCounts, summarise
from pals.core.load import Mix
from pals.core.quantities import Fingerprint, OperatingPoint, fingerprint_of
from pals.core.routing_reference import RoutingReference
from pals.engines.closed_loop import ClosedLoop
from pals.models.engine_facts import EngineFacts
from pals.models.fitted import fit
from pals.models.profile import MIN_ROWS, Profile
from pals.models.row import ProfileRow
from pals.profiler.load import LoadDriver
from pals.profiler.partial import PartialRows
from pals.profiler.sweep import Interrupted, sweep
from pals.profiler.visit import LEASE_S
from pals.runtime.agent import FOUND_RECORD, Board, load_profile
from pals.runtime.channel import run_dir
from pals.runtime.config import ControlConfig
from pals.runtime.expert_channel import read_engine
from pals.runtime.files import check_folder
from pals.runtime.group import EngineGroup
from pals.runtime.loop import GridClock, boards_as_found, wall_clock
from pals.runtime.tick import Rig


class TellingLoad(LoadDriver, Protocol):
    """A load that also remembers what a request that failed was told."""

    @property
    def last_error(self) -> str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The engine to measure and its boards, whichever way they run."""

    boards: Sequence[Board]
    channel: EngineGroup
    load: TellingLoad
    clock: GridClock
    folder: Path  # the run directory: what was found is written down there
    emulated: bool
    context_tokens: int | None  # longest request; None: unknown
    shape: ModelShape | None = None  # where somebody told it; else the engine is asked


def measure(args: argparse.Namespace) -> int:
    """Measure the engine that runs here; 130 and a partial file on Ctrl-C.

    Raises:
        ConfigError: no engine, several, real boards without --mode auto, or options that do not fit; nothing was written.
        EngineGoneError: it ended; the boards are put back and the rows are kept.
    """
    folder = run_dir(os.environ)
    check_folder(folder)
    channel = pick_engine(folder, args.engine)
    emulated = channel.info.bank is not None
    if not emulated and args.mode != "auto":
        raise ConfigError(
            "the sweep writes power limits of real boards: say --mode auto to allow it. Nothing was changed"
        )
    if args.mode not in (None, "auto"):
        raise ConfigError(f"--mode {args.mode}: a sweep writes limits, or measures nothing. Nothing was changed")
    served, context_tokens = served_model(args.base_url)
    if served != channel.info.name:  # a proxy may have names of its own
        say(f"{args.base_url} serves {served}, and what is measured is {channel.told()}: are they the same engine?")
    shape, stop = shape_of(args.config), threading.Event()
    control = ControlConfig(mode="auto")
    with (
        stopping(stop),
        boards_of(folder, channel, write=may_mend(control, emulated=emulated)) as nvml,
        writing(control, nvml, nvml.boards, bank=bank_of([channel]), say=say, lease_s=LEASE_S) as writer,
    ):
        boards = [writer.board(b) for b in nvml.boards]
        refuse_unwritable(boards, writer)
        with ClosedLoop(base_url=args.base_url, model=served, seed=args.seed) as load:
            return measure_target(
                args,
                Target(
                    boards=boards, channel=channel, load=load, clock=wall_clock(stop), folder=folder,
                    emulated=emulated, context_tokens=context_tokens, shape=shape,
                ),
            )  # fmt: skip


def measure_target(args: argparse.Namespace, target: Target) -> int:
    """Sweep one engine and write its profile; 130 where the clock says stop."""
    infos = [b.info for b in target.boards]
    info = target.channel.info
    guard = Guard.of(infos, info.launch_sequences)
    facts = facts_of(info, infos, guard, target.shape)
    plan = plan_of(args, guard, target.context_tokens)
    out, fingerprint = out_of(args.out), fingerprint_of(info, infos)
    partial = PartialRows(partial_of(out), fingerprint, facts, plan.mixes)
    rig = Rig(
        meters=target.boards, actuators=target.boards, engine=target.channel, setter=target.channel,
        controller=StaticPolicy(OperatingPoint(power_limit_w=guard.max_limit_w)), guard=guard, period_s=0.5,
    )  # fmt: skip
    notes, began = SweepNotes(), read_engine(target.folder, target.channel.pids)
    try:
        with (
            boards_as_found(target.boards, target.boards, target.folder / FOUND_RECORD),
            showing(plan.mixes, notes) as tell,
        ):
            rows = sweep(
                rig, plan, load=target.load, facts=facts, partial=partial, clock=target.clock, fit=fit, progress=tell
            )
            counted = counted_since(began, read_engine(target.folder, target.channel.pids))
    except Interrupted:
        say(f"interrupted: {len(partial.rows)} rows are kept; run the same command to go on")
        return EXIT_INTERRUPTED
    except EngineGoneError:
        say(f"{len(partial.rows)} rows are kept; run the same command to go on when the same engine runs again")
        raise
    except ConfigError as e:
        if target.load.last_error is None:
            raise
        raise ConfigError(f"{e}. What the newest failed request was told: {target.load.last_error}") from e
    finally:
        target.channel.release()
        forget_if_empty(partial_of(out))
    source = "emulated" if target.emulated else "measured"
    made = profile_of(
        args, rows, plan.mixes, with_popularity(facts, counted), fingerprint=fingerprint, source=source, notes=notes.lines,
        routing=RoutingReference.of(counted) if counted is not None else None,
    )  # fmt: skip
    finish(out, made)
    partial.discard()
    return 0


def profile_of(
    args: argparse.Namespace,
    rows: Sequence[ProfileRow],
    mixes: Sequence[Mix],
    facts: EngineFacts,
    *,
    fingerprint: Fingerprint,
    source: str,
    notes: Sequence[str],
    routing: RoutingReference | None = None,
) -> Profile:
    """Fit the rows of a sweep that has ended.

    Raises:
        ConfigError: too few; they are kept.
    """
    if len(rows) < MIN_ROWS:
        raise ConfigError(
            f"the sweep ended with {len(rows)} rows, and a profile needs {MIN_ROWS}. They are kept: run the same command with "
            "more --minutes, or a smaller --error, to go on"
        )
    return Profile.of(
        rows, mixes, facts, fingerprint, source=source, made_at=date.today().isoformat(),
        command=shlex.join(["pals", *args.given]), notes=notes, routing=routing,
    )  # fmt: skip


def counted_since(began: ExpertCounts | None, ended: ExpertCounts | None) -> ExpertCounts | None:
    """The routing of the sweep; None where it was not counted throughout, or too little to say anything of popularity."""
    if ended is None:
        return None
    try:
        counted = ended if began is None else ended.since(began)  # counts begin with the engine's first step
    except ValueError:  # the engine was started anew
        return None
    return counted if summarise(counted).popularity is not None else None


def with_popularity(facts: EngineFacts, counted: ExpertCounts | None) -> EngineFacts:
    """The facts, with the popularity of the experts where it was counted: the fit need not guess it then."""
    popularity = summarise(counted).popularity if counted is not None else None
    return facts if popularity is None else replace(facts, popularity=popularity)


def finish(out: Path, made: Profile) -> None:
    """Write the profile, whole or not at all, and say what it is worth."""
    keep_file(out, made.to_json())
    print(quality_told(made.model().quality))
    for note in made.notes:
        print(note)
    say(f"{out}: {len(made.rows)} rows, {out.stat().st_size / 1024:.1f} KiB. Look at it: pals profile show {out}")


def refit(args: argparse.Namespace) -> int:
    """Fit a file's rows anew and write them there or elsewhere.

    Raises:
        ConfigError: no readable profile; nothing was written.
    """
    made = load_profile(Path(args.file), refit=True)
    finish(out_of(args.out or args.file), made)
    return 0


def out_of(path: str) -> Path:
    """Where the profile goes.

    Raises:
        ConfigError: it cannot be written there, which is better known before a quarter of an hour is spent.
    """
    out = Path(path)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out {out}: {e.filename}: {e.strerror}. Nothing was changed") from e
    # a device or pipe would be replaced by a file, and who writes limits is root
    if (out.exists() and not out.is_file()) or not os.access(out.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} cannot be written, or is a folder or device; name a file. Nothing was changed")
    return out


def partial_of(out: Path) -> Path:
    """Where the rows are kept until the profile is written."""
    return out.with_suffix(".partial.jsonl")


def forget_if_empty(kept: Path) -> None:
    """Remove a file of rows that holds none: it would only refuse the next sweep, were that another one. Not a foreign file."""
    if not kept.is_file():
        return
    lines = kept.read_bytes().splitlines()
    if not lines or (len(lines) == 1 and lines[0].startswith(b'{"format": "pals-sweep/')):
        kept.unlink()


def keep_file(out: Path, text: str) -> None:
    """Write `out` anew; whoever reads it meanwhile, or after a crash, sees the old text or the new one whole."""
    fresh = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)


def served_model(base_url: str) -> tuple[str, int | None]:
    """The name the engine serves its model under, and the longest request it takes, where it says that.

    Raises:
        ConfigError: no answer there.
    """
    url = f"{base_url.rstrip('/')}/v1/models"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            model = json.load(answer)["data"][0]
            length = model.get("max_model_len")
            return str(model["id"]), int(length) if length else None
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, urllib.error.URLError) as e:
        raise ConfigError(f"no OpenAI API answers at {url} ({e}); give --base-url. Nothing was changed") from e
