"""`pals doctor`: what can be measured and set on this node, and why not; changes nothing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from pals import __version__
from pals.cli.run_folder import emulated_bank
from pals.cli.shared_bank import owner_of
from pals.core.diagnosis import NodeFacts, Status
from pals.core.errors import ConfigError
from pals.engines.installed import probe_software
from pals.hardware.probe import probe_nvml, probe_privilege
from pals.runtime.channel import run_dir
from pals.runtime.inventory import look_into
from pals.runtime.processes import process_alive
from pals.views.doctor import as_json, findings, print_findings, worst


def doctor(args: argparse.Namespace) -> int:
    """Print what was found; 1 where there is a problem, else 0."""
    if not 0 <= args.watch_s <= 60:
        raise ConfigError(f"--watch-s {args.watch_s:g} must lie in 0..60 (0: do not watch the meters)")
    folder = run_dir(os.environ)
    node = examine(folder, args.watch_s)
    found = findings(node)
    emulated = node.nvml.emulated is not None
    if args.json:
        print(as_json(found, pals=__version__, run_dir=str(folder), emulated=emulated))
    else:
        print_findings(found, Console(highlight=False), emulated=emulated)
    return 1 if worst(found) is Status.PROBLEM else 0


def examine(folder: Path, watch_s: float) -> NodeFacts:
    """All facts of this node."""
    owner = owner_of(folder)
    return NodeFacts(
        nvml=probe_nvml(
            emulated=emulated_bank(folder, left_too=True),
            emulator_pid=owner,
            emulator_alive=owner is not None and process_alive(owner),
            watch_s=watch_s,
        ),
        privilege=probe_privilege(),
        run_dir=look_into(folder),
        software=probe_software(os.environ),
    )
