"""What `pals ab` does: an agent in canary mode whose records are compared as they come, or a journal compared afterwards.

On real boards it needs `--mode auto`: it writes limits. However it ends, the boards are put back first, then it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pals.cli.agent import (
    EXIT_INTERRUPTED,
    boards_of,
    config_of,
    living,
    pick_engine,
    refuse_unwritable,
    steer,
    stopping,
)
from pals.cli.main import say
from pals.cli.run_folder import bank_of
from pals.cli.writer import writing
from pals.control.interleaved import Interleaving
from pals.core.errors import ConfigError
from pals.experiments.ab import Arm, Comparison, Ending, Trial, compare
from pals.experiments.ab_windows import windows_of
from pals.runtime.agent import policy_settings
from pals.runtime.channel import run_dir
from pals.runtime.config import Config, checked
from pals.runtime.files import check_folder
from pals.runtime.group import EngineGroup
from pals.runtime.journal import read_journal
from pals.runtime.modes import WRITING, parse_share
from pals.runtime.tick import TickRecord
from pals.views.ab_table import ab_notes, ab_table, ab_words, share_text
from pals.views.report import wide_console

LEVELS = (0.5, 0.999)
TOLD_EVERY_PAIRS = 5


def recorded(args: argparse.Namespace) -> int:
    """Compare the arms of a journal.

    Raises:
        ConfigError: no journal, or one that was not written in mode canary.
    """
    if args.policy is not None or args.profile is not None:
        raise ConfigError(
            "a journal is analysed as it is: --policy and --profile are for a running engine. Nothing was done"
        )
    header, records = read_journal(Path(args.recorded))
    if header.interleaving is None:
        raise ConfigError(
            f"{args.recorded} was not written in canary mode: it has no windows of two arms to compare. Make one with "
            "`pals ab`, `pals agent --mode canary:10%` or `pals simulate --mode canary:50% --journal`"
        )
    design = header.interleaving
    result = compare(windows_of(records, design, settle_of(args, design)), level_of(args))
    policy = named(header.policy, header.policy_settings)
    show(args, result, policy=policy, design=design, ended="journal", journal=args.recorded)
    return 0


def live(args: argparse.Namespace) -> int:
    """Compare on the engine that runs here; 130 and what is known on Ctrl-C, 3 and the same where the engine ended.

    Raises:
        ConfigError: no engine, several, real boards without --mode auto, or options that do not fit; nothing was written.
    """
    folder = run_dir(os.environ)
    check_folder(folder)
    channel = pick_engine(folder, args.engine)
    config = trial_config(args, channel)
    design = config.control.interleaving
    ending = Ending(
        level=level_of(args), precision=precision_of(args), longest_s=hours_of(args) * 3600.0, open_load=args.open_load
    )
    trial, stop, pids = Trial(design, settle_of(args, design), ending), threading.Event(), channel.pids
    refuse_unwritten(args, config, folder, channel)
    try:
        with stopping(stop):
            find = lambda: [g for g in living(folder) if g.pids & pids]  # noqa: E731
            code = steer(config, folder, find, stop, also=Stopper(trial, stop))
    finally:  # the boards are put back, or said not to be
        if trial.began:
            ended = trial.over or "interrupted"
            policy = named(config.control.policy, policy_settings(config.control))
            show(args, trial.result, policy=policy, design=design, ended=ended, journal=None)
    return code or (0 if trial.over else EXIT_INTERRUPTED)


def trial_config(args: argparse.Namespace, channel: EngineGroup) -> Config:
    """The configuration for this engine, in canary mode with equal shares.

    Raises:
        ConfigError: options that do not fit.
    """
    asked = config_of(argparse.Namespace(**{**vars(args), "mode": None})).of(channel.info)
    control = replace(
        asked.control, mode="canary", canary_share=0.5, canary_window_s=args.window_s, canary_seed=args.seed,
        canary_baseline=args.against or "static",
    )  # fmt: skip
    return checked(replace(asked, control=control))


def refuse_unwritten(args: argparse.Namespace, config: Config, folder: Path, channel: EngineGroup) -> None:
    """Raise `ConfigError` where the arms could not be told apart, because nothing would be written."""
    if args.mode not in (None, *WRITING):
        raise ConfigError(
            f"--mode {args.mode}: a comparison writes limits, in advise mode both arms would be the same. Nothing was changed"
        )
    if channel.info.bank is None and args.mode is None:
        raise ConfigError(
            "the comparison writes power limits of real boards: say --mode auto to allow it. Nothing was changed"
        )
    with (
        boards_of(folder, channel, write=False) as nvml,
        writing(config.control, nvml, nvml.boards, bank=bank_of([channel]), say=lambda text: None) as writer,
    ):
        refuse_unwritable([writer.board(b) for b in nvml.boards], writer)


class Stopper:
    """Watches one engine's records; sets `stop` when the trial is over."""

    def __init__(self, trial: Trial, stop: threading.Event) -> None:
        self._trial, self._stop = trial, stop

    def observe(self, record: TickRecord) -> None:
        """Take one record; say what is known now and then."""
        trial = self._trial
        if trial.over is None and trial.observe(record) and trial.result.pairs % TOLD_EVERY_PAIRS == 0:
            level = f"{100 * trial.ending.level:g} %"
            say(f"{trial.result.pairs} pairs: saving {share_text(trial.judged, level)}")
        if trial.over is not None and not self._stop.is_set():
            say(f"{trial.over}: stopping in order")
            self._stop.set()

    def close(self) -> None:
        """Nothing is held."""


def named(policy: str, settings: Mapping[str, Any]) -> str:
    """The policy; a static one with its point, as "static 250 W, 32 sequences"."""
    units = {"power_limit_w": "W", "sm_clock_mhz": "MHz", "active_sequences": "sequences"}
    point = [f"{settings[k]:g} {unit}" for k, unit in units.items() if settings.get(k) is not None]
    return f"{policy} {', '.join(point)}" if policy == "static" and point else policy


def settle_of(args: argparse.Namespace, design: Interleaving) -> float:
    """--settle-s, or a third of a window."""
    return design.window_s / 3 if args.settle_s is None else float(args.settle_s)


def level_of(args: argparse.Namespace) -> float:
    """--certain as a share."""
    level = parse_share(args.certain, "--certain")
    if not LEVELS[0] <= level <= LEVELS[1]:
        raise ConfigError(f"--certain {args.certain} must lie in 50%..99.9%. Nothing was started")
    return level


def precision_of(args: argparse.Namespace) -> float:
    """--precision as a share."""
    precision = parse_share(args.precision, "--precision")
    if precision <= 0:
        raise ConfigError(f"--precision {args.precision} must be above 0. Nothing was started")
    return precision


def hours_of(args: argparse.Namespace) -> float:
    """--hours."""
    hours = float(args.hours)
    if not 0 < hours < float("inf"):
        raise ConfigError(f"--hours {args.hours:g} must be above 0. Nothing was started")
    return hours


def show(
    args: argparse.Namespace,
    result: Comparison,
    *,
    policy: str,
    design: Interleaving,
    ended: str,
    journal: str | None,
) -> None:
    """Print for tools or for people."""
    settle_s = settle_of(args, design)
    if args.json:
        told = {
            "policy": policy, "design": asdict(design), "settle_s": settle_s, "ended": ended, "journal": journal,
            "notes": ab_notes(result, settle_s=settle_s), **asdict(result), "on": arm_plain(result.on), "off": arm_plain(result.off),
        }  # fmt: skip
        print(json.dumps(told, indent=2, allow_nan=False))
        return
    console = wide_console()
    console.print(ab_table(result, policy=policy, design=design, settle_s=settle_s))
    for line in ab_words(result, settle_s=settle_s):
        console.print(line, markup=False, soft_wrap=True)


def arm_plain(arm: Arm) -> dict[str, Any]:
    """An arm with what follows from its sums."""
    return {
        **asdict(arm), "j_per_token": arm.j_per_token, "tokens_per_s": arm.tokens_per_s, "power_w": arm.power_w,
    }  # fmt: skip
