"""`pals replay`, `pals status`, `pals restore`, `pals models` and `pals dashboard`: look, compare, mend."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pals.cli.agent import emulated_bank, living, mend
from pals.cli.main import say
from pals.control.guard import Guard
from pals.control.policies import build_policy
from pals.core.errors import ConfigError, EngineGoneError, PalsError
from pals.hardware.nvml import open_boards
from pals.models.profile import Profile
from pals.runtime.agent import FOUND_RECORD, STATUS_FILES
from pals.runtime.channel import process_alive, run_dir
from pals.runtime.found import left_by_dead_agent
from pals.runtime.group import unique_name
from pals.runtime.journal import read_journal
from pals.runtime.replay import replay as replay_records
from pals.views.status import EngineNow, print_status


def replay(args: argparse.Namespace) -> int:
    """Recompute every decision; 0 when all agree, 1 when one differs."""
    header, records = read_journal(Path(args.journal))
    profile = Profile.from_json(header.profile_json, name=args.journal) if header.profile_json else None
    guard = Guard.of(header.boards, header.engine.launch_sequences)
    policy = build_policy(header.policy, header.policy_settings, profile, guard)
    result = replay_records(policy, guard, records)
    for difference in result.differences[:5]:
        print(difference)
    print(f"{args.journal}: {result.same} of {result.total} decisions identical ({header.policy})")
    if result.total == 0:
        raise ConfigError(f"{args.journal} holds no decision")
    return 0 if result.same == result.total else 1


def status(args: argparse.Namespace) -> int:
    """Print engines, boards and the agent's newest records."""
    folder = run_dir(os.environ)
    bank = emulated_bank(folder)
    boards = []
    try:
        with open_boards(emulated=bank) as nvml:
            for why in nvml.failed.values():
                say(why)
            for board in nvml.boards:
                try:
                    boards.append((board.info, board.read()))
                except (PalsError, ValueError) as e:  # the others are shown all the same
                    say(str(e))
    except ConfigError as e:
        say(str(e))
    print_status(
        folder, engines_now(folder), boards, steered_now(folder), emulated=bank is not None, limited=limited(folder)
    )
    return 0


def limited(folder: Path) -> int:
    """How many boards a killed agent left limited; none where the agent lives, or its record cannot be read."""
    with contextlib.suppress(ConfigError):
        return len(left_by_dead_agent(folder / FOUND_RECORD))
    return 0


def engines_now(folder: Path) -> list[EngineNow]:
    """The living engines with their counters, by their boards; one that ends meanwhile is left out."""
    groups = living(folder)
    found = []
    for group in groups:
        with contextlib.suppress(EngineGoneError):
            found.append(EngineNow(name=unique_name(group, groups), info=group.info, sample=group.read()))
    return sorted(found, key=lambda e: e.info.boards)


def steered_now(folder: Path) -> list[dict[str, Any]]:
    """What a living agent wrote of each engine last, by its boards; a file being replaced or removed is left out."""
    found = []
    for path in folder.glob(STATUS_FILES):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            told = json.loads(path.read_text())
            if process_alive(told["agent_pid"]):
                found.append(told)
    return sorted(found, key=lambda s: [b["index"] for b in s["header"]["boards"]])


def restore(args: argparse.Namespace) -> int:
    """Put boards back that a killed agent left limited."""
    folder = run_dir(os.environ)
    if mend(folder, emulated_bank(folder)) == 0:
        say(f"nothing was put back: no board stands where a dead agent of {folder} left it")
    return 0


def models(args: argparse.Namespace) -> int:
    """List the models whose shapes are shipped."""
    from pals.engines.model_zoo import model_names

    for name in model_names():
        print(name)
    return 0


def dashboard(args: argparse.Namespace) -> int:
    """Print the Grafana dashboard."""
    from pals.views.grafana import dashboard_json

    print(dashboard_json(), end="")
    return 0
