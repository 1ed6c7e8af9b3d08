"""Options that the daemon and `capd-release` share, and the keeper made of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from pals_capd.audit import FileAudit
from pals_capd.driver import DryDriver, NvmlDriver, import_nvml
from pals_capd.keeper import Keeper
from pals_capd.others import other_writers
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
        audit=FileAudit(state / AUDIT_FILE.replace(".jsonl", f"{dry}.jsonl")),
        policy=policy,
        dry_run=args.dry_run,
        off=(state / OFF_FILE).exists,
        look_for_others=other_writers,
    )
