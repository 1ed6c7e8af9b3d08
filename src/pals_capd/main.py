"""`pals-capd`: serve, show the audit log, print an example policy. Exit codes: 0, 1 a check failed, 2 refused to start, 70 own watchdog."""

from __future__ import annotations

import argparse
import grp
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pals_capd import __version__
from pals_capd.audit import check_order, read_audit
from pals_capd.keeper import Keeper
from pals_capd.life import ServiceManager, Watchdog, take_lock
from pals_capd.options import AUDIT_FILE, SOCKET, add_options, keeper_of
from pals_capd.policy import EXAMPLE, load_policy
from pals_capd.refused import ConfigError
from pals_capd.server import Server, listen

WATCHDOG_S = 2.0
NOTIFY_EVERY_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    p = argparse.ArgumentParser(
        prog="pals-capd", description="Holds GPU power limits and SM clocks at leased values, and puts them back."
    )
    p.add_argument("--version", action="version", version=f"pals-capd {__version__}")
    p.add_argument("command", nargs="?", choices=["serve", "audit", "policy"], default="serve", help="default: serve")
    add_options(p)
    p.add_argument("--socket", default=SOCKET, metavar="PATH", help=f"default {SOCKET}")
    p.add_argument(
        "--group",
        default="pals",
        help="name or number; who may open the socket, while the policy file says what they may do (default pals)",
    )
    p.add_argument(
        "--check",
        action="store_true",
        help="audit: check that no line is missing and no budget was exceeded by a raise",
    )
    p.add_argument("--since", type=int, default=0, metavar="SEQ", help="audit: only later lines")
    args = p.parse_args(argv)
    try:
        if args.command == "policy":
            print(EXAMPLE, end="")
            return 0
        return audit(args) if args.command == "audit" else serve(args)
    except ConfigError as e:
        print(f"pals-capd: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def audit(args: argparse.Namespace) -> int:
    """Print the log, or check it."""
    entries = [e for e in read_audit(Path(args.state) / AUDIT_FILE) if e["seq"] > args.since]
    if not args.check:
        for e in entries:
            print(json.dumps(e))
        return 0
    wrong = check_order(entries)
    for told in wrong:
        print(told)
    print(f"{len(entries)} lines, {len(wrong)} wrong")
    return 1 if wrong else 0


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; then bring all boards to their exit policy.

    Raises:
        ConfigError: another capd runs, no driver, or a bad policy file; nothing was written.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda n, _: asked.append(n))
    take_lock(Path(args.state), wait_s=1.0)
    keeper = keeper_of(args, load_policy(Path(args.policy)))
    keeper.start(time.monotonic())
    server = Server(keeper, listen(Path(args.socket), _group(args.group)))
    manager = ServiceManager(os.environ)
    watchdog = Watchdog(WATCHDOG_S, lambda: start_release(args))
    manager.tell(f"READY=1\nSTATUS={len(keeper.ledger.boards)} boards")
    for name, why in keeper.alarms.items():
        print(f"pals-capd: alarm ({name}): {why}", file=sys.stderr, flush=True)
    told_s = 0.0
    while not {signal.SIGTERM, signal.SIGINT} & set(asked):
        server.round()
        watchdog.turned()
        if (now_s := time.monotonic()) - told_s >= NOTIFY_EVERY_S:
            told_s = now_s
            manager.tell("WATCHDOG=1")
        if signal.SIGHUP in asked:
            asked.remove(signal.SIGHUP)
            reload_policy(args, keeper)
    manager.tell("STOPPING=1")
    server.close()
    Path(args.socket).unlink(missing_ok=True)
    failed = keeper.stop("stopped", time.monotonic())
    for told in failed:
        print(f"pals-capd: {told}", file=sys.stderr)
    return 1 if failed else 0


def reload_policy(args: argparse.Namespace, keeper: Keeper) -> None:
    """SIGHUP: take the policy file as it is now; where it is wrong, the one before holds on."""
    try:
        keeper.set_policy(load_policy(Path(args.policy)), time.monotonic())
    except ConfigError as e:
        print(f"pals-capd: {e}; the policy before is still in force", file=sys.stderr, flush=True)


def start_release(args: argparse.Namespace) -> None:
    """Let another process put the boards back: this one hangs, and holds the lock until it is gone."""
    python = [sys.executable, "-P"]  # not what lies in the working directory: this is root
    command = [*python, "-m", "pals_capd.release", "--policy", args.policy, "--state", args.state, "--wait", "5"]
    subprocess.Popen([*command, *(["--dry-run"] if args.dry_run else [])], start_new_session=True)


def _group(name: str) -> int | None:
    if name.isascii() and name.isdigit():  # a container does not know the node's names
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        print(
            f"pals-capd: there is no group {name!r}: only this user may open the socket (groupadd {name})",
            file=sys.stderr,
        )
        return None


if __name__ == "__main__":
    sys.exit(main())
