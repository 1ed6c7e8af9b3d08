"""`pals caps`: look at what capd holds, and let it go."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from pals.cli.main import say
from pals.core.errors import ConfigError
from pals.hardware.capd_client import CapdClient, refused, socket_path
from pals.views.caps import print_caps, watts

EXIT_NOT_RELEASED = 1


def caps(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Print the table, or release everything; 1 where a board could not be released.

    Raises:
        ConfigError: no capd.
        PalsError: it does not answer, or refuses.
    """
    path = socket_path(environ)
    if not os.path.exists(path):
        raise ConfigError(
            f"there is no capd at {path}, so nothing is held. Start it as root (systemctl start pals-capd, or `pals-capd`), or name "
            "its socket in PALS_CAPD_SOCKET"
        )
    with closing(CapdClient(path)) as client:
        if args.action == "release":
            return _release(client, as_json=args.json)
        told = client.read()
    if args.json:
        print(json.dumps(told, indent=2))
    else:
        print_caps(told)
    return 0


def _release(client: CapdClient, *, as_json: bool) -> int:
    """End every lease and the budget a client set; print where each board stands then."""
    told = client.ask("release_all")
    if told is None or "failed" not in told:
        raise refused(
            told or {"error": "broken", "message": "the connection broke; look with `pals caps` what is held"}
        )
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        for board in told["boards"]:
            print(_stands(board))
    for why in told["failed"]:
        say(f"not released: {why}")
    return EXIT_NOT_RELEASED if told["failed"] else 0


def _stands(board: Mapping[str, Any]) -> str:
    """ "GPU-…: 400 W in force, as found"."""
    at_w, found_w = board["enforced_w"], board["found_w"]
    told = "as found" if abs(at_w - found_w) < 1.0 else f"found at {watts(found_w)}"
    return f"{board['uuid']}: {watts(at_w)} in force, {told}"
