"""Arguments and dispatch; errors become one message on stderr and an exit code, never a traceback.

Exit codes: 0 done, 1 a check found a difference, or a server cut requests or lost its agent, 2 bad input or no
permission, 3 the engine ended by itself, 4 boards could not be put back as found (`pals restore` does, once it may
write), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from pals import __version__
from pals.core.errors import EngineGoneError, NotPutBackError, PalsError
from pals.core.quantities import LOWERINGS
from pals.runtime.agent import EXIT_ENGINE_GONE, EXIT_NOT_PUT_BACK
from pals.runtime.config import EXPERTS, OBJECTIVES, POLICIES


class Parser(argparse.ArgumentParser):
    """Names the nearest command on a typing error."""

    def error(self, message: str) -> NoReturn:
        """Print the error, with the nearest command where one was mistyped, and exit with 2."""
        if "invalid choice" in message:
            given = message.split("invalid choice: ")[1].split("'")[1]
            known = message.replace("'", "").split("choose from ")[-1].rstrip(")").split(", ")
            near = difflib.get_close_matches(given, known, n=1)
            message += f"; did you mean {near[0]!r}?" if near else ""
        super().error(message)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from pals.cli.ab_command import add_ab  # they use this module's parts
    from pals.cli.emulate import add_emulate
    from pals.cli.experiment import add_experiment
    from pals.cli.plant import add_plant
    from pals.cli.profile_commands import add_profile
    from pals.cli.simulate import add_simulate

    p = Parser(prog="pals", description="Power-aware runtime for LLM serving.")
    p.add_argument("--version", action="version", version=f"pals {__version__}")
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_serve(commands)
    agent = commands.add_parser("agent", help="steer every engine that runs here with PALS installed")
    agent.add_argument(
        "--engine", type=int, metavar="PID", help="steer only this one (default: all, also those to come)"
    )
    add_agent_options(agent)
    add_profile(commands)
    add_ab(commands)
    replay = commands.add_parser("replay", help="recompute every decision of a journal and compare")
    replay.add_argument("journal", metavar="JOURNAL")
    commands.add_parser("status", help="what runs here, and what is in force")
    doctor = commands.add_parser("doctor", help="what can be measured and set on this node, and why not")
    doctor.add_argument("--json", action="store_true", help="for tools; the schema is in docs/doctor.md")
    doctor.add_argument(
        "--watch-s", type=float, default=2.0, metavar="S", help="how long to watch the meters (default 2; 0: not)"
    )
    doctor.add_argument(
        "--try-writes",
        nargs="?",
        const="idle",
        choices=("idle", "busy"),
        help="write to idle boards for a moment, to see what they obey (=busy: also to boards at work); docs/doctor.md",
    )
    doctor.add_argument(
        "--writer",
        choices=("auto", "capd", "direct", "zeusd"),
        default="auto",
        help="who would write boards (default auto)",
    )
    restore = commands.add_parser("restore", help="put boards back that a killed agent left limited")
    restore.add_argument("--writer", choices=("direct", "zeusd"), default="direct", help="who writes (default direct)")
    add_caps(commands)
    add_experts(commands)
    commands.add_parser("models", help="models that can be served emulated")
    add_emulate(commands)
    add_plant(commands)
    add_simulate(commands)
    add_experiment(commands)
    commands.add_parser(
        "dashboard",
        help="print the Grafana dashboard for the agent's metrics",
        description="Print the Grafana dashboard (import it under Dashboards > New > Import), generated from the table of metrics.",
    )
    add_demo(commands)
    return p


def add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    """The `serve` command."""
    serve = commands.add_parser(
        "serve",
        help="start vLLM's OpenAI server with PALS beside it",
        description="Start the real, unmodified vLLM OpenAI server with PALS beside it. Options not listed here go to `vllm serve`.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", help="model name or folder, as for `vllm serve`")
    serve.add_argument("--emulate", metavar="BOARDS", help="emulated boards, e.g. 4xa100-sxm4-80gb or h100-sxm5-80gb")
    serve.add_argument(
        "--boards", metavar="N,N,…", help="boards to use, as CUDA_VISIBLE_DEVICES (default: that, or all)"
    )
    serve.add_argument("--no-agent", action="store_true", help="serve only; start `pals agent` apart")
    serve.add_argument("--seed-boards", type=int, default=0, help="seed of the emulated boards' variation (default 0)")
    serve.add_argument(
        "--routing-drift", metavar="DRIFT|FILE",
        help="emulated MoE model: '60:swap=0.5;120+30:cv=0.3', or a .json or .toml file (docs/models/routing.md)",
    )  # fmt: skip
    serve.add_argument(
        "--unprivileged", action="store_true", help="emulated boards refuse writes, as real ones without root"
    )
    serve.add_argument(
        "--log", metavar="FILE", help="vLLM's log, kept below 2 x 64 MiB (default: in the state directory)"
    )
    serve.add_argument(
        "--drain-s", type=int, metavar="S", help="how long accepted requests are answered when stopping (default 60)"
    )
    add_agent_options(serve)


def add_caps(commands: argparse._SubParsersAction[Parser]) -> None:
    """The `caps` command."""
    caps = commands.add_parser(
        "caps",
        help="what capd holds every board at, for whom and for how long",
        description="What capd, the root process that alone writes boards, holds them at. Its socket: $PALS_CAPD_SOCKET, else "
        "/run/pals/capd.sock.",
    )
    caps.add_argument("--json", action="store_true", help="capd's own answer, for tools")
    caps.set_defaults(action=None, all=False)
    release = caps.add_subparsers(dest="action", metavar="ACTION").add_parser(
        "release", help="end leases and the budget a client set; boards go to their exit policy (capd's admin right)"
    )
    release.add_argument("--all", action="store_true", required=True, help="of every board and every user")
    release.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="capd's own answer, for tools")


def add_experts(commands: argparse._SubParsersAction[Parser]) -> None:
    """The `experts` command."""
    experts = commands.add_parser(
        "experts",
        help="which experts a mixture model's tokens choose, now and over time",
        description="Which experts an engine's tokens choose. The engine must have been started with PALS_EXPERTS=1.",
    )
    experts.add_argument(
        "model", metavar="MODEL", nargs="?", help="the engine's name, model or process (default: the one)"
    )
    experts.add_argument("--window", type=float, default=5.0, metavar="S", help="how long to look (default 5)")
    experts.add_argument("--watch", type=float, metavar="S", help="look again every so many seconds, until interrupted")
    experts.add_argument("--json", action="store_true", help="for tools; with --watch a line a window")
    experts.add_argument("--png", metavar="FILE", help="draw it too: layers by experts, and over time below")
    experts.add_argument(
        "--journal", metavar="FILE", help="how it went over time, from an agent's journal; without MODEL only that"
    )


def add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    """The `demo` command."""
    demo = commands.add_parser(
        "demo", help="one trace slice on emulated boards under three policies, in about five minutes"
    )
    demo.add_argument("--model", metavar="MODEL", help="which model (default Mixtral-8x7B, on 4 A100s)")
    demo.add_argument("--seconds", type=float, default=60.0, help="length of the trace slice (default 60)")
    demo.add_argument(
        "--out", default="out/demo", metavar="FOLDER", help="journals, table and figure (default out/demo)"
    )


def add_agent_options(p: argparse.ArgumentParser) -> None:
    """Options of whatever runs an agent."""
    add_control_options(p)
    p.add_argument("--writer", help="who writes boards: auto (default), capd, direct or zeusd (docs/operation.md)")
    p.add_argument("--journal", metavar="FILE", help="journal file (default: in the state directory, one per engine)")
    p.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="Prometheus port on 127.0.0.1 (default 9477; 0: off)"
    )
    p.add_argument(
        "--dcgm-port",
        type=int,
        metavar="PORT",
        help="also show the boards as dcgm-exporter does, on 127.0.0.1 (its own port is 9400; default 0: off)",
    )
    add_budget_endpoint_options(p)


def add_control_options(p: argparse.ArgumentParser, *, several_policies: bool = False) -> None:
    """What is steered, by which policy, to which targets."""
    p.add_argument("--config", metavar="FILE", help="TOML configuration; the options below override it")
    p.add_argument(
        "--policy",
        action="append" if several_policies else "store",
        help=f"one of {', '.join(POLICIES)} (default static)" + ("; may be given several times" * several_policies),
    )
    p.add_argument(
        "--mode",
        help="auto, advise, or canary:10%% to act in that share of time only (default: auto on emulated boards, advise on real)",
    )
    p.add_argument(
        "--profile",
        metavar="FILE",
        help="profile for the policies that need one (docs/policies.md), from `pals profile`",
    )
    p.add_argument(
        "--accept-mismatch",
        action="store_true",
        default=None,
        help="use a profile of another build, driver or flag with wider intervals (docs/correction.md)",
    )
    p.add_argument(
        "--power-limit-w",
        "--limit-w",
        type=float,
        metavar="W",
        help="static: power limit per board (default: as found)",
    )
    p.add_argument(
        "--sm-clock-mhz", "--clock-mhz", type=int, metavar="MHZ", help="static: SM clock ceiling (default: no lock)"
    )
    p.add_argument("--active-sequences", type=int, metavar="N", help="static: active-sequence limit (default: launch)")
    p.add_argument("--lowering", help=f"how to get under a lowered batch: {', '.join(LOWERINGS)} (default drain)")
    p.add_argument("--objective", help=f"pals: whose joules count, one of {', '.join(OBJECTIVES)} (default node)")
    p.add_argument(
        "--experts",
        help=f"use the routing of experts that the engine counts: {' or '.join(EXPERTS)} (default auto: where it does)",
    )
    add_target_options(p)
    p.add_argument(
        "--budget",
        "--budget-w",
        metavar="W|STEPS|FILE.csv",
        help="budget of all engines together: 1200 or 2.4kW, steps 0:none,30:1kW,60:1600, or a file with the columns "
        "time_s,power_w and perhaps expires_s (docs/budgets.md)",
    )
    p.add_argument(
        "--budget-default", metavar="W|none", help="what holds before any budget and after one expired (default none)"
    )
    p.add_argument("--period-s", type=float, metavar="S", help="control period (default 0.5)")


def add_target_options(p: argparse.ArgumentParser) -> None:
    """Latency and throughput that are to be kept; p95 and p99 of one latency may both be given."""
    for name, what in (("ttft", "time to first token"), ("tpot", "time per output token")):
        older = (f"--slo-{name}-p95-s", f"--{name}-p95-s")
        p.add_argument(f"--slo-{name}-p95", *older, metavar="TIME", help=f"p95 of the {what}, e.g. 1s or 50ms")
        p.add_argument(f"--slo-{name}-p99", metavar="TIME", help="the same for p99")
    p.add_argument(
        "--throughput-target",
        "--target-tokens-s",
        "--slo-tokens-s",
        metavar="X%|X",
        help="output tokens per second, or a share of what the engine answers at most where the boards were found, e.g. 90%%",
    )


def add_budget_endpoint_options(p: argparse.ArgumentParser) -> None:
    """Where a budget may be put while the agent runs."""
    p.add_argument(
        "--budget-port",
        type=int,
        metavar="PORT",
        help="let budgets be put over HTTP while the agent runs (docs/budgets.md; default 0: off)",
    )
    p.add_argument("--budget-host", metavar="ADDRESS", help="its address (default 127.0.0.1)")
    p.add_argument("--budget-token", metavar="FILE", help="its bearer token, in a file that only you may read")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="pals: %(message)s", stream=sys.stderr)
    logging.getLogger("pals").setLevel(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGHUP):  # every way of stopping runs the same orderly end
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    args, rest = parser().parse_known_args(argv)
    args.given = sys.argv[1:] if argv is None else list(argv)
    if rest and args.command != "serve" and not getattr(args, "takes_engine_options", False):
        parser().error(f"unknown arguments for `pals {args.command}`: {' '.join(rest)}")
    try:
        return dispatch(args, rest)
    except EngineGoneError as e:
        say(str(e))
        return EXIT_ENGINE_GONE
    except NotPutBackError as e:
        say(str(e))
        return EXIT_NOT_PUT_BACK
    except PalsError as e:
        say(str(e))
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        say(f"{e.filename or args.command}: {e.strerror or e}")
        return 2


#: Where each command lives; the function of its name there.
MODULES = {
    "serve": "serve", "agent": "agent", "profile": "profile_commands", "ab": "ab_command", "emulate": "emulate", "plant": "plant",
    "simulate": "simulate", "experiment": "experiment", "doctor": "doctor",
    "caps": "caps", "experts": "experts",
    **dict.fromkeys(("replay", "status", "restore", "models", "dashboard"), "inspect"),
}  # fmt: skip
WITH_REST = frozenset({"serve", "emulate"})  # whose further options are vLLM's


def dispatch(args: argparse.Namespace, rest: list[str]) -> int:
    """Call the command; each is imported only when asked for, so that `pals --help` needs nothing."""
    if args.command == "demo":
        return _demo(args)
    command = getattr(import_module(f"pals.cli.{MODULES[args.command]}"), args.command)
    code: int = command(args, rest) if args.command in WITH_REST else command(args)
    return code


def _demo(args: argparse.Namespace) -> int:
    from pals.cli.extras import require

    require("vllm", "pynvml", "aiohttp", "matplotlib")
    from pals.experiments.demo import demo

    return demo(model=args.model, seconds=args.seconds, out=args.out)


def say(text: str) -> None:
    """One line for people, on stderr; where that is gone (a closed terminal, a full disk), work goes on."""
    with contextlib.suppress(OSError):
        print(f"pals: {text}", file=sys.stderr, flush=True)
