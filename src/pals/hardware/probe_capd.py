"""Looks at capd as this user finds it, step by step, so that what stands in the way has a name; asks for no lease."""

from __future__ import annotations

import grp
import os
import pwd
import time
from collections.abc import Callable
from pathlib import Path

from pals.core.diagnosis_writing import CapdBoardFacts, CapdFacts, Reach
from pals.core.errors import PalsError, PermissionDeniedError
from pals.hardware.capd_client import CapdClient, Reply


def probe_capd(path: Path, *, clock: Callable[[], float] = time.perf_counter) -> CapdFacts:
    """Facts of the capd that listens, or should, at `path`."""
    if not os.path.lexists(path):
        return CapdFacts(path=str(path))
    client = CapdClient(path)
    began_s = clock()
    try:
        hello = client.request("hello")
        took_s = clock() - began_s
        told = client.read()
        return _told(str(path), hello, told, took_s=took_s)
    except (PalsError, ValueError) as e:
        group, in_group = _group(path)
        return CapdFacts(
            path=str(path), reach=_reach(e, silent=client.silent), error=str(e), group=group, in_group=in_group
        )
    except (KeyError, TypeError, AttributeError) as e:
        return CapdFacts(
            path=str(path), reach=Reach.STRANGE, error=f"its answer was not understood ({type(e).__name__}: {e})"
        )
    finally:
        client.close()


def _reach(error: Exception, *, silent: bool) -> Reach:
    if isinstance(error, PermissionDeniedError):
        return Reach.CLOSED if isinstance(error.__cause__, PermissionError) else Reach.TURNED_AWAY
    if silent:
        return Reach.SILENT
    return Reach.STALE if isinstance(error.__cause__, OSError) else Reach.STRANGE


def _group(path: Path) -> tuple[str | None, bool]:
    """The group that owns the socket, and whether this user is in it, in this login or the next."""
    try:
        group = grp.getgrgid(os.stat(path).st_gid)
    except (OSError, KeyError):
        return None, False
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return group.gr_name, False
    return group.gr_name, user in group.gr_mem


def _told(path: str, hello: Reply, read: Reply, *, took_s: float) -> CapdFacts:
    counters = read["counters"]
    return CapdFacts(
        path=path, reach=Reach.ANSWERS, took_s=took_s, version=str(hello["version"]), rights=str(hello["rights"]),
        ttl_s=float(hello["ttl_s"]), max_ttl_s=float(hello["max_ttl_s"]), dry_run=bool(hello["dry_run"]),
        off=bool(read["off"]), alarm=read["alarm"], boards=tuple(_board(b) for b in read["boards"]),
        budget_w=read["budget"]["watts"], others=tuple(str(o) for o in read["others"]),
        writes=int(counters.get("writes", 0)), write_p50_s=counters.get("write_s_p50"),
        write_p99_s=counters.get("write_s_p99"),
    )  # fmt: skip


def _board(told: Reply) -> CapdBoardFacts:
    lease = told["lease"]
    return CapdBoardFacts(
        uuid=str(told["uuid"]), exit_policy=told.get("exit"), refusal=told["refusal"],
        leased_by=f"user {lease['uid']} ({lease['reason']})" if lease else None,
        leased_w=lease["watts"] if lease else None, lease_ends_s=lease["expires_s"] if lease else None,
        other_hand_w=told["other_hand_w"], suspected_lock=told["suspected_lock"],
    )  # fmt: skip
