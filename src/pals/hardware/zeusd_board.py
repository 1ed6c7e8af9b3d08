"""Boards written through zeusd, where a site already runs it; it has no dead-man, so writes are written down ahead as always.

zeusd is the privileged daemon of Zeus (github.com/ml-energy/zeus, folder zeusd). Spoken here is the HTTP API of version 0.5.0
(https://ml.energy/zeus/zeusd/api/): `GET /discover`, and `POST /gpu/set_power_limit`, `/gpu/set_gpu_locked_clocks` and
`/gpu/reset_gpu_locked_clocks` with query parameters. Earlier versions took JSON under `/gpu/{id}/...`; they are refused.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pals.core.errors import ConfigError, NotSupportedError, PalsError, PermissionDeniedError
from pals.core.quantities import BoardInfo
from pals.hardware.nvml_board import NvmlBoard

SOCKET = "/var/run/zeusd.sock"
TIMEOUT_S = 2.0  # it answers when the driver has, which may take tens of ms a board
NO_DEAD_MAN = (
    "zeusd has no dead-man: if this agent is killed, boards stay as it set them until the next agent, or `pals restore "
    "--writer zeusd`, puts them back"
)


def zeusd_path(environ: Mapping[str, str]) -> Path:
    """Where zeusd listens: $ZEUSD_SOCK_PATH, as for Zeus itself, else its default."""
    return Path(environ.get("ZEUSD_SOCK_PATH") or SOCKET)


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket in place of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


class Zeusd:
    """The daemon at one socket; writes boards by NVML's index (`Setters` of `NvmlBoard`)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, boards: Sequence[BoardInfo]) -> None:
        """See that it speaks the API known here, may write without a token, and counts boards as NVML does here.

        Raises:
            ConfigError: it does not; nothing was changed.
        """
        status, told = self._ask("GET", "/discover")
        if status != 200 or not isinstance(told, dict):
            raise ConfigError(
                f"zeusd at {self.path} does not answer /discover ({status}): PALS speaks the API of zeusd 0.5. Nothing was changed"
            )
        if told.get("auth_required"):
            raise ConfigError(
                f"zeusd at {self.path} wants a token, and PALS has none. Nothing was changed: serve the Unix socket without "
                "authentication, or use capd"
            )
        if "gpu-control" not in told.get("enabled_api_groups", ()):
            raise ConfigError(
                f"zeusd at {self.path} does not offer gpu-control. Nothing was changed: enable that group, or use capd"
            )
        names = {g["id"]: g["name"] for g in told.get("gpus", ())} or dict.fromkeys(told.get("gpu_ids", ()))
        for info in boards:
            if info.index not in names or names[info.index] not in (None, info.name):
                raise ConfigError(
                    f"zeusd at {self.path} has {names.get(info.index) or 'nothing'} as board {info.index}, NVML here has {info.name}: "
                    "they count differently, and PALS will not guess. Nothing was changed"
                )

    def set_limit(self, index: int, limit_w: float) -> None:
        """Set the power limit.

        Raises:
            PermissionDeniedError, ValueError, PalsError: as zeusd says.
        """
        self._write(index, f"set {limit_w:.0f} W", "set_power_limit", power_limit_mw=round(limit_w * 1000))

    def lock_clock(self, index: int, low_mhz: int, high_mhz: int) -> None:
        """Lock the SM clock into a range.

        Raises:
            PermissionDeniedError, NotSupportedError, ValueError, PalsError: as zeusd says.
        """
        doing = f"lock the SM clock at {high_mhz} MHz"
        self._write(index, doing, "set_gpu_locked_clocks", min_clock_mhz=low_mhz, max_clock_mhz=high_mhz)

    def reset_clock(self, index: int) -> None:
        """Release the clock lock.

        Raises:
            As `lock_clock`.
        """
        self._write(index, "release the clock lock", "reset_gpu_locked_clocks")

    def _write(self, index: int, doing: str, route: str, **values: int) -> None:
        query = urlencode({"gpu_ids": index, **values, "block": "true"})
        status, told = self._ask("POST", f"/gpu/{route}?{query}")
        if status == 200:
            return
        text = _error(told, index)
        message = f"board {index}: zeusd would not {doing} ({status}: {text}); what was in force still is"
        if status in (401, 403):
            raise PermissionDeniedError(f"{message}. Give zeusd the right to write, or use capd")
        if any(word in text.lower() for word in ("not supported", "notsupported", "not available")):
            raise NotSupportedError(message)
        raise ValueError(message) if status == 400 else PalsError(f"{message}. Look at zeusd's log")

    def _ask(self, method: str, path: str) -> tuple[int, Any]:
        connection = _UnixConnection(self.path)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            status, body = answer.status, answer.read(1 << 20)
        except (OSError, HTTPException) as e:
            raise PalsError(
                f"zeusd does not answer at {self.path} ({e}); boards stay as they are, since it has no dead-man. Start it again, "
                "or use capd"
            ) from e
        finally:
            connection.close()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode(errors="replace")


def _error(told: Any, index: int) -> str:
    """What went wrong with one board, of a body that may list it by board."""
    if isinstance(told, dict) and isinstance(told.get("errors"), dict):
        return str(told["errors"].get(str(index), told["errors"]))
    return str(told)[:200] or "no reason given"


def zeusd_board(board: NvmlBoard, zeusd: Zeusd) -> NvmlBoard:
    """The same board, read here and written through zeusd: never above what another hand sets, put back as found."""
    board.write_through(zeusd)
    return board
