"""`pals profile`: load a running engine, sweep limit and clock × active sequences, write a profile."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pals.cli.agent import boards_of, pick_engine, stopping
from pals.cli.extras import require
from pals.cli.main import say
from pals.control.guard import Guard
from pals.control.static import StaticPolicy
from pals.core.errors import ConfigError
from pals.core.quantities import Fingerprint, OperatingPoint, fingerprint_of
from pals.engines.openai_client import ClosedLoop, RequestSpec
from pals.models.profile import Profile, ProfileRow, Residuals
from pals.profiler.sweep import (
    Interrupted,
    LoadDriver,
    PartialRows,
    SweepPlan,
    default_limits_w,
    default_sequences,
    sweep,
)
from pals.runtime.agent import FOUND_RECORD, Board
from pals.runtime.channel import run_dir
from pals.runtime.files import check_folder
from pals.runtime.group import EngineGroup
from pals.runtime.loop import GridClock, boards_as_found, wall_clock
from pals.runtime.tick import Rig


def profile(args: argparse.Namespace) -> int:
    """Sweep and write; 130 and a partial file on Ctrl-C."""
    require("pynvml", "aiohttp")
    folder = run_dir(os.environ)
    check_folder(folder)
    channel = pick_engine(folder, args.engine)
    emulated = channel.info.bank is not None
    if not emulated and args.mode != "auto":
        raise ConfigError(
            "the sweep writes power limits of real boards: say --mode auto to allow it. Nothing was changed"
        )
    served = served_model(args.base_url)
    stop = threading.Event()
    with stopping(stop), boards_of(folder, channel, write=True) as nvml:
        if refused := [b.refusal for b in nvml.boards if b.refusal is not None]:
            raise ConfigError(f"{'; '.join(refused)}. Nothing was changed")
        if not all(b.can_write() for b in nvml.boards):
            raise ConfigError("this process may not write power limits (needs root); nothing was changed")
        specs, load = load_of(args.prompt_tokens, args.output_tokens)
        driver = ClosedLoop(specs, base_url=args.base_url, model=served, seed=1)
        driver.start_in_thread()
        try:
            return sweep_engine(
                args, nvml.boards, channel, driver=driver, load=load, clock=wall_clock(stop), folder=folder,
                emulated=emulated,
            )  # fmt: skip
        finally:
            driver.stop()


def sweep_engine(
    args: argparse.Namespace,
    boards: Sequence[Board],
    channel: EngineGroup,
    *,
    driver: LoadDriver,
    load: str,
    clock: GridClock,
    folder: Path,
    emulated: bool,
) -> int:
    """Sweep one engine under `driver`'s load and write the profile; 130 where the clock says stop."""
    infos = [b.info for b in boards]
    guard = Guard.of(infos, channel.info.launch_sequences)
    plan = plan_of(args, guard)
    out, fingerprint = Path(args.out), fingerprint_of(channel.info, infos)
    partial = PartialRows(out.with_suffix(".partial.jsonl"), fingerprint, load)
    rig = Rig(
        meters=boards, actuators=boards, engine=channel, setter=channel,
        controller=StaticPolicy(OperatingPoint(power_limit_w=guard.max_limit_w)), guard=guard, period_s=0.5,
    )  # fmt: skip
    try:
        with boards_as_found(boards, boards, folder / FOUND_RECORD):
            rows = run_sweep(rig, plan, driver, partial, clock)
    except Interrupted:
        say(f"interrupted: {len(partial.rows)} of {len(plan.points)} points are kept; run the same command to go on")
        return 130
    finally:
        channel.release()
    write_profile(out, rows, fingerprint, load, emulated=emulated)
    partial.discard()
    return 0


def load_of(prompt_tokens: int, output_tokens: int) -> tuple[list[RequestSpec], str]:
    """A closed-loop load: lengths spread evenly over 0.5..1.5 of their means, in an order that mixes short and long.

    Raises:
        ConfigError: a mean below 2 tokens.
    """
    if min(prompt_tokens, output_tokens) < 2:
        raise ConfigError("--prompt-tokens and --output-tokens must be at least 2; nothing was changed")
    shares = [0.5 + (i + 0.5) / 64 for i in range(64)]
    specs = [
        RequestSpec(
            at_s=0.0,
            prompt_tokens=round(prompt_tokens * shares[37 * i % 64]),
            output_tokens=max(2, round(output_tokens * shares[29 * i % 64])),
        )
        for i in range(64)
    ]
    told = f"closed loop, prompts {prompt_tokens} ± 50 %, outputs {output_tokens} ± 50 % tokens, evenly spread"
    return specs, told


def run_sweep(
    rig: Rig, plan: SweepPlan, driver: LoadDriver, partial: PartialRows, clock: GridClock
) -> list[ProfileRow]:
    """The sweep with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("profiling", total=len(plan.points))

        def progress(point: OperatingPoint, row: ProfileRow | None) -> None:
            bar.advance(task)
            if row is not None:
                lock = f"≤ {row.requested_clock_mhz} MHz, " if row.requested_clock_mhz is not None else ""
                bar.console.print(
                    f"{lock}{row.power_limit_w:5.0f} W × {row.active_sequences:3d} sequences: {row.tokens_per_s:7.0f} tokens/s, "
                    f"{row.power_w:6.0f} W, {row.tokens_per_s / row.power_w:.3f} tokens/J, {row.sm_clock_mhz} MHz"
                )

        return sweep(rig, plan, load=driver, partial=partial, clock=clock, progress=progress)


def write_profile(out: Path, rows: list[ProfileRow], fingerprint: Fingerprint, load: str, *, emulated: bool) -> None:
    """Write the profile and say what the fit makes of it."""
    made = Profile(
        fingerprint=fingerprint,
        rows=tuple(rows),
        source="emulated" if emulated else "measured",
        load=load,
        made_at=date.today().isoformat(),
        command=shlex.join(["pals", *sys.argv[1:]]),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(made.to_json(), encoding="utf-8")
    fit = made.model().residuals
    say(
        f"{out}: {len(rows)} rows, {out.stat().st_size / 1024:.1f} KiB; the fit is within {fit.power_mape:.1%} of the measured "
        f"power and {fit.throughput_mape:.1%} of the throughput (mean, in sample)" + _clock_fit(fit)
    )


def _clock_fit(fit: Residuals) -> str:
    if fit.clock_power_mape is None or fit.clock_throughput_mape is None:
        return ""
    return f"; under clock locks within {fit.clock_power_mape:.1%} and {fit.clock_throughput_mape:.1%}"


def plan_of(args: argparse.Namespace, guard: Guard) -> SweepPlan:
    """The points asked for, or the default grid.

    Raises:
        ConfigError: outside what boards and engine accept; nothing was written.
    """
    try:
        limits_w = tuple(float(w) for w in args.limits_w.split(",")) if args.limits_w else None
        sequences = tuple(int(n) for n in args.sequences.split(",")) if args.sequences else None
        clocks = tuple(int(mhz) for mhz in args.clocks.split(",")) if args.clocks else ()
    except ValueError as e:
        raise ConfigError(
            f"--limits-w, --clocks and --sequences take numbers separated by commas ({e}); nothing was changed"
        ) from e
    plan = SweepPlan(
        limits_w=limits_w or default_limits_w(guard.min_limit_w, guard.max_limit_w),
        sequences=sequences or default_sequences(guard.launch_sequences),
        clocks_mhz=tuple(sorted({guard.supported_clock_mhz(mhz) or mhz for mhz in clocks})),
        found_limit_w=guard.max_limit_w,
        settle_s=args.settle_s,
        window_s=args.window_s,
    )
    bad_w = [w for w in plan.limits_w if not guard.min_limit_w <= w <= guard.max_limit_w]
    bad_n = [n for n in plan.sequences if not 1 <= n <= guard.launch_sequences]
    known = guard.sm_clocks_mhz or (0,)
    bad_mhz = [mhz for mhz in clocks if not known[0] <= mhz <= known[-1]]
    if bad_w or bad_n or bad_mhz or plan.window_s < 0.5 or plan.settle_s < 0:
        raise ConfigError(
            f"the plan leaves what is possible: limits {guard.min_limit_w:.0f}..{guard.max_limit_w:.0f} W (given {bad_w}), "
            f"clocks {known[0]}..{known[-1]} MHz (given {bad_mhz}), sequences 1..{guard.launch_sequences} (given {bad_n}), window >= 0.5 s. Nothing was written"
        )
    return plan


def served_model(base_url: str) -> str:
    """The name the engine serves its model under.

    Raises:
        ConfigError: no answer there.
    """
    url = f"{base_url.rstrip('/')}/v1/models"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, urllib.error.URLError) as e:
        raise ConfigError(f"no OpenAI API answers at {url} ({e}); give --base-url. Nothing was changed") from e
