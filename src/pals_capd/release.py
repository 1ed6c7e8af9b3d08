"""`capd-release`: brings every board that a capd left to its exit policy, whether that capd stopped, crashed or was killed.

It is capd without the socket: it takes the lock, recovers what the record says, writes what must be written, and ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pals_capd.life import take_lock
from pals_capd.options import add_options, keeper_of
from pals_capd.policy import Policy, load_policy
from pals_capd.refused import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """0: all boards stand where they should; 1: some do not; 2: nothing could be done."""
    p = argparse.ArgumentParser(prog="capd-release", description=__doc__.split("\n\n")[0])
    add_options(p)
    p.add_argument("--wait", type=float, default=2.0, metavar="S", help="for a capd that is ending (default 2)")
    args = p.parse_args(argv)
    state = Path(args.state)
    if not state.exists():
        print(f"capd-release: no capd ever ran with {state}; nothing to do", file=sys.stderr)
        return 0
    try:
        lock = take_lock(state, args.wait)
        keeper = keeper_of(args, _policy(Path(args.policy)))
        keeper.start(time.monotonic())
        failed = keeper.stop("capd-release", time.monotonic())
    except ConfigError as e:
        print(f"capd-release: {e}", file=sys.stderr)
        return 2
    for told in failed or ["boards stand at their exit policy"]:
        print(f"capd-release: {told}", file=sys.stderr)
    if "state" in keeper.alarms:
        print(f"capd-release: {keeper.alarms['state']}", file=sys.stderr)
    os.close(lock)
    return 1 if failed or "state" in keeper.alarms else 0


def _policy(path: Path) -> Policy:
    """A policy file that is wrong must not keep boards from being put back: the default does it."""
    try:
        return load_policy(path)
    except ConfigError as e:
        print(f"capd-release: {e}; boards go to the default exit policy", file=sys.stderr)
        return Policy()


if __name__ == "__main__":
    sys.exit(main())
