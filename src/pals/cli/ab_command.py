"""The `ab` command's options; what it does is imported when it is asked for."""

from __future__ import annotations

import argparse
from typing import Any

from pals.cli.extras import require
from pals.cli.main import add_agent_options


def add_ab(commands: Any) -> None:
    """The `ab` command."""
    p = commands.add_parser(
        "ab",
        help="what a policy saves on a running engine under its own load, with an interval",
        description="Let a policy and a baseline take turns in short windows on the engine that runs here, under the load it has, and "
        "tell what the policy saves. Stops when the saving is known well enough, or the time is over; Ctrl-C puts the boards "
        "back and prints what is known. With JOURNAL: the same of a journal that was written in mode canary. docs/ab.md",
    )
    p.add_argument("recorded", nargs="?", metavar="JOURNAL", help="analyse this journal; no engine is needed")
    p.add_argument("--engine", type=int, metavar="PID", help="which engine, where several run")
    p.add_argument("--against", metavar="POLICY", help="the baseline (default static: boards as found, launch batch)")
    p.add_argument("--hours", type=float, default=1.0, metavar="H", help="longest run (default 1)")
    p.add_argument("--certain", default="95%", metavar="PCT", help="level of the intervals (default 95%%)")
    p.add_argument(
        "--precision", default="2%", metavar="PCT",
        help="stop when half the saving's interval is this small (default 2%%)",
    )  # fmt: skip
    p.add_argument("--window-s", type=float, default=45.0, metavar="S", help="length of a window (default 45)")
    p.add_argument(
        "--settle-s",
        type=float,
        metavar="S",
        help="left out at a window's begin; longer than a request stays (default: a third of a window)",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of which windows are the policy's (default 0)")
    p.add_argument(
        "--open-load",
        action="store_true",
        help="requests come whether or not earlier ones were answered: stop by the saving with the load taken out",
    )
    p.add_argument("--json", action="store_true", help="for tools: one object on stdout, units in the names")
    add_agent_options(p)


def ab(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.recorded is None:
        require("pynvml")
    from pals.cli import ab as command

    return command.recorded(args) if args.recorded is not None else command.live(args)
