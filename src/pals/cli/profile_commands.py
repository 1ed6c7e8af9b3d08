"""The `profile` command's options: alone it measures a running engine; its other kinds stand in one table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pals.cli.extras import require
from pals.cli.profile_evaluate import add_evaluate
from pals.core.errors import ConfigError
from pals.runtime.modes import MODES

LONGEST_MINUTES = 20.0  # a profile costs less of an engine's time than this


def add_profile(commands: Any) -> None:
    """The `profile` command; without a kind it measures a running engine."""
    p = commands.add_parser(
        "profile",
        help="measure a running engine at well-chosen limits, clocks and batches, write a profile",
        description="Load a running engine, measure it at operating points chosen one after the other, and write a profile. "
        "Without a kind: the engine that runs here. Ctrl-C keeps what was measured; the same command goes on.",
        usage="pals profile [options]\n       pals profile KIND …",
    )
    p.add_argument(
        "--base-url", default="http://127.0.0.1:8000", help="the engine's API (default http://127.0.0.1:8000)"
    )
    p.add_argument("--engine", type=int, metavar="PID", help="which engine, where several run")
    p.add_argument("--mode", choices=MODES, help="auto is needed on real boards: the sweep writes power limits")
    p.add_argument("--config", metavar="FILE", help="the model's config.json, where the engine does not tell its shape")
    add_sweep_options(p)
    p.set_defaults(function=_measure)
    kinds = p.add_subparsers(dest="profile_kind", metavar="KIND", title="kinds", prog="pals profile")
    for add in KINDS:
        add(kinds)


def profile(args: argparse.Namespace) -> int:
    """Run the kind asked for.

    Raises:
        ConfigError: options stand before its name, where they would mean the measuring of a running engine.
    """
    kind = args.profile_kind
    if kind is not None and args.given[1:2] != [kind]:
        raise ConfigError(
            f"options of `pals profile {kind}` go behind its name: pals profile {kind} …. Nothing was started"
        )
    return int(args.function(args))


def add_sweep_options(p: argparse.ArgumentParser) -> None:
    """Options of whatever runs a sweep."""
    p.add_argument("--out", default="profile.json", metavar="FILE", help="the profile (default profile.json)")
    p.add_argument("--points", type=int, default=40, metavar="N", help="most points measured (default 40, at most 50)")
    p.add_argument(
        "--minutes", type=float, default=18.0, metavar="M",
        help=f"most engine time (default 18; below {LONGEST_MINUTES:.0f})",
    )  # fmt: skip
    p.add_argument(
        "--error", type=float, default=0.5, metavar="PCT",
        help="stop where the predictions' mean standard deviation is below this (default 0.5 %%)",
    )  # fmt: skip
    p.add_argument(
        "--limits-w",
        metavar="W,W,…",
        help="power limits per board to choose from (default: even steps up to the one found)",
    )
    p.add_argument(
        "--clocks", metavar="MHZ,…|none", help="SM clocks to lock, to choose from (default: steps below the top clock)"
    )
    p.add_argument(
        "--sequences",
        metavar="N,N,…",
        help="active sequences to choose from (default: powers of two to the launch limit)",
    )
    p.add_argument(
        "--prompt-tokens", type=int, default=1200, metavar="N", help="mean prompt of the first mix (default 1200)"
    )
    p.add_argument(
        "--output-tokens", type=int, default=225, metavar="N", help="mean output of the first mix (default 225)"
    )
    p.add_argument("--settle-s", type=float, default=2.0, metavar="S", help="least wait before a window (default 2)")
    p.add_argument("--window-s", type=float, default=8.0, metavar="S", help="shortest measuring window (default 8)")
    p.add_argument("--seed", type=int, default=0, help="of the requests' lengths (default 0)")


def add_simulate(kinds: Any) -> None:
    """`pals profile simulate`."""
    from pals.cli.emulate import add_node_options
    from pals.cli.simulate import add_plant_options

    p = kinds.add_parser(
        "simulate",
        help="the same sweep on the simulated replica: no engine, seconds",
        description="Sweep a simulated engine on simulated boards, in event time. Every watt and second is simulated.",
        allow_abbrev=False,
    )
    add_node_options(p)
    add_sweep_options(p)
    add_plant_options(p)
    p.add_argument(
        "--count-experts", action="store_true",
        help="store the routing of a mixture model's experts, as of an engine started with PALS_EXPERTS=1",
    )  # fmt: skip
    p.set_defaults(function=_simulate)


def add_show(kinds: Any) -> None:
    """`pals profile show`."""
    p = kinds.add_parser(
        "show",
        help="print a profile for people, or draw it",
        description="Print what a profile was measured on, how good it is, and what it advises. Needs no engine and no board.",
        allow_abbrev=False,
    )
    p.add_argument("file", metavar="FILE", help="the profile")
    p.add_argument("--json", action="store_true", help="the same facts for tools; units are in the names")
    p.add_argument(
        "--mix", metavar="NAME", help="one of the profile's mixes only (default: all; the figure: the first)"
    )
    p.add_argument("--prompt-tokens", type=float, metavar="N", help="predict for another load: mean prompt ...")
    p.add_argument("--output-tokens", type=float, metavar="N", help="... and mean output")
    p.add_argument(
        "--point", metavar="W,MHZ,N", help="predict one point in full, as 400W,1200MHz,32; parts may be left out"
    )
    p.add_argument("--node", action="store_true", help="best points by the node's energy instead of the boards'")
    p.add_argument("--figure", metavar="FILE", help="draw it, as .png, .pdf or .svg")
    p.set_defaults(function=_show)


def add_refit(kinds: Any) -> None:
    """`pals profile refit`."""
    p = kinds.add_parser(
        "refit",
        help="fit a profile's rows anew, as after an update of PALS",
        description="Fit the rows of a profile with this version's model. Needs no engine and no board; the rows stay as measured.",
        allow_abbrev=False,
    )
    p.add_argument("file", metavar="FILE", help="the profile")
    p.add_argument("--out", metavar="FILE", help="where to (default: in place)")
    p.set_defaults(function=_refit)


#: What `pals profile` does besides measuring a running engine; each adds its parser and names its function.
KINDS: tuple[Callable[[Any], None], ...] = (add_simulate, add_show, add_refit, add_evaluate)


def _measure(args: argparse.Namespace) -> int:
    require("pynvml", "aiohttp", "scipy")
    from pals.cli.profile import measure

    return measure(args)


def _simulate(args: argparse.Namespace) -> int:
    require("numba", "scipy")
    from pals.cli.profile_simulate import simulate

    return simulate(args)


def _refit(args: argparse.Namespace) -> int:
    require("scipy")
    from pals.cli.profile import refit

    return refit(args)


def _show(args: argparse.Namespace) -> int:
    if args.figure is not None:
        require("matplotlib")
    from pals.cli.profile_show import show

    return show(args)
