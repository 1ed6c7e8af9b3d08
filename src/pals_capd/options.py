"""Options that the daemon and `capd-release` share, and the keeper made of them."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from pals_capd.audit import FileAudit
from pals_capd.driver import DryDriver, NvmlDriver, import_nvml
from pals_capd.keeper import Keeper
from pals_capd.others import Watch
from pals_capd.policy import Policy
from pals_capd.record import FileRecord, boot_id

POLICY_FILE, STATE_FOLDER, SOCKET = "/etc/pals/capd.toml", "/var/lib/pals-capd", "/run/pals/capd.sock"
AUDIT_FILE, OFF_FILE = "audit.jsonl", "off"


def add_options(p: argparse.ArgumentParser) -> None:
    """Where policy and state lie, and whether anything is written to boards."""
    p.add_argument(
        "--policy", default=POLICY_FILE, metavar="FILE", help=f"rights, exit policies, budget (default {POLICY_FILE})"
    )
    p.add_argument(
        "--state", default=STATE_FOLDER, metavar="FOLDER", help=f"record and audit log (default {STATE_FOLDER})"
    )
    p.add_argument("--dry-run", action="store_true", help="do everything but write to boards")


def accepted_policy(args: argparse.Namespace) -> Path:
    """Where capd keeps a copy of the policy file that it accepted last."""
    return Path(args.state) / "policy.toml"


def was_accepted(args: argparse.Namespace) -> bool:
    """Whether there was a policy file: one that is missing now is a mistake then, and not the default."""
    try:
        return bool(accepted_policy(args).read_bytes().strip())
    except OSError:
        return False


def accept_policy(args: argparse.Namespace) -> None:
    """Keep a copy of the policy file that is in force from now on; a copy that cannot be made is an old one."""
    accepted = accepted_policy(args)
    fresh = accepted.with_suffix(".new")
    with contextlib.suppress(OSError):
        try:
            text = Path(args.policy).read_bytes()
        except FileNotFoundError:
            text = b""
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as f:
            f.write(text)
        fresh.replace(accepted)


def audit_path(args: argparse.Namespace) -> Path:
    """The audit log; a dry run has one of its own."""
    return Path(args.state) / (AUDIT_FILE.replace(".jsonl", ".dry-run.jsonl") if args.dry_run else AUDIT_FILE)


def keeper_of(args: argparse.Namespace, policy: Policy) -> Keeper:
    """The keeper of this node's boards.

    Raises:
        ConfigError: nvidia-ml-py is missing.
    """
    state, dry = Path(args.state), ".dry-run" if args.dry_run else ""
    driver = NvmlDriver(import_nvml())
    return Keeper(
        driver=DryDriver(driver) if args.dry_run else driver,
        record=FileRecord(state / f"state{dry}.json", boot_id()),
        audit=FileAudit(audit_path(args)),
        policy=policy,
        dry_run=args.dry_run,
        off=(state / OFF_FILE).exists,
        look_for_others=Watch().seen,
    )
