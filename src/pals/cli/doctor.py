"""`pals doctor`: what can be measured and set on this node, and why not; writes nothing unless `--try-writes` is said."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pals import __version__
from pals.cli.doctor_trial import trials
from pals.cli.run_folder import BANK_FILE, emulated_bank
from pals.cli.shared_bank import owner_of
from pals.cli.writer import writing
from pals.core.diagnosis import NodeFacts, Status
from pals.core.diagnosis_writing import WriterChoice
from pals.core.errors import ConfigError, PalsError
from pals.engines.installed import probe_software
from pals.hardware.capd_client import socket_path
from pals.hardware.nvml import open_boards
from pals.hardware.probe import probe_nvml, probe_privilege
from pals.hardware.probe_capd import probe_capd
from pals.hardware.programs import programs
from pals.plant.bank_layout import STALE_S
from pals.plant.boards import BoardBank
from pals.runtime.channel import run_dir
from pals.runtime.config import ControlConfig
from pals.runtime.inventory import look_into
from pals.runtime.processes import process_alive
from pals.views.doctor import as_json, findings, print_findings, worst


def doctor(args: argparse.Namespace) -> int:
    """Print what was found; 1 where there is a problem, else 0."""
    if not 0 <= args.watch_s <= 60:
        raise ConfigError(f"--watch-s {args.watch_s:g} must lie in 0..60 (0: do not watch the meters)")
    folder, environ = run_dir(os.environ), os.environ
    bank = emulated_bank(folder, left_too=True)
    node = examine(folder, bank, args.watch_s, writer=args.writer, environ=environ)
    if args.try_writes and node.nvml.boards and node.nvml.error is None:
        tried = trials(node, folder, bank, writer=args.writer, busy_too=args.try_writes == "busy", environ=environ)
        node = replace(node, trials=tried, capd=probe_capd(socket_path(environ)))  # which counted the writes
    found = findings(node)
    emulated = node.nvml.emulated is not None
    if args.json:
        print(as_json(found, pals=__version__, run_dir=str(folder), emulated=emulated))
    else:
        print_findings(found, Console(highlight=False), emulated=emulated)
    return 1 if worst(found) is Status.PROBLEM else 0


def examine(folder: Path, bank: Path | None, watch_s: float, *, writer: str, environ: Mapping[str, str]) -> NodeFacts:
    """All facts of this node."""
    owner = owner_of(folder)
    return NodeFacts(
        nvml=probe_nvml(
            emulated=bank,
            emulator_pid=owner,
            emulator_alive=kept_fresh(bank) if owner is None else process_alive(owner),
            watch_s=watch_s,
        ),
        privilege=probe_privilege(),
        run_dir=look_into(folder),
        software=probe_software(environ),
        capd=probe_capd(socket_path(environ)),
        chosen=chosen_writer(bank, writer, environ),
        programs=programs(),
    )


def kept_fresh(bank: Path | None) -> bool:
    """Whether somebody keeps these emulated boards who is no server of the run directory, as `pals emulate nvml` does."""
    if bank is None or bank.name == BANK_FILE:
        return False
    try:
        with closing(BoardBank.open(bank)) as there:
            return there.age_s(time.monotonic()) < STALE_S
    except (OSError, ValueError):  # the finding about the driver says why
        return False


def chosen_writer(bank: Path | None, writer: str, environ: Mapping[str, str]) -> WriterChoice:
    """Who an agent started here with `--writer` would have write, by the code that the agent asks."""
    said: list[str] = []
    try:
        with (
            open_boards(emulated=bank) as nvml,
            writing(
                ControlConfig(writer=writer), nvml, nvml.boards, bank=bank, say=said.append, environ=environ
            ) as chosen,
        ):
            why = "; ".join(said) if chosen.may_write else chosen.why_not
            return WriterChoice(kind=chosen.kind, told=chosen.told, why=why or None)
    except PalsError as e:
        return WriterChoice(kind="none", told="nobody", why=str(e))
