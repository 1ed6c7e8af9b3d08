"""`pals emulate …`: parts of the emulated world, each for itself."""

from __future__ import annotations

import argparse
from typing import Any

from pals.cli.emulate_nvml import add_nvml


def add_emulate(commands: Any) -> None:
    """The `emulate` command; each kind names its function, and whether it takes what is not its own."""
    p = commands.add_parser("emulate", help="emulated boards for tools that know nothing of PALS")
    kinds = p.add_subparsers(dest="emulate", metavar="WHAT", required=True)
    add_nvml(kinds)


def emulate(args: argparse.Namespace, rest: list[str]) -> int:
    """Run one kind."""
    return int(args.function(args, rest))
