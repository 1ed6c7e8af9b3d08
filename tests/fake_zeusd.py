"""A fake of zeusd 0.5: its routes and its answers over a Unix socket, on emulated boards. It is not zeusd."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.capd_loopback import Boards

DISCOVER = {
    "gpus": [{"id": i, "name": "NVIDIA H100 80GB HBM3"} for i in range(2)],
    "enabled_api_groups": ["gpu-control", "gpu-read"],
    "auth_required": False,
}


@contextmanager
def zeusd_over(boards: Boards, **discover: Any) -> Iterator[Path]:
    """The fake's socket."""
    path = Path(tempfile.mkdtemp(prefix="zeusd-")) / "sock"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {**DISCOVER, **discover}) if self.path == "/discover" else self._answer(404, {})

        def do_POST(self) -> None:
            url = urlsplit(self.path)
            values = {k: v[0] for k, v in parse_qs(url.query).items()}
            self._answer(*write(boards, url.path, values))

        def _answer(self, status: int, told: dict[str, Any]) -> None:
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def address_string(self) -> str:
            return "unix"

    with UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield path
        finally:
            server.shutdown()
            thread.join()
            shutil.rmtree(path.parent)


def write(boards: Boards, path: str, values: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """What zeusd does with one write, and what it answers."""
    n = boards.nvml
    index = int(values["gpu_ids"])
    handle = n.nvmlDeviceGetHandleByIndex(index)
    try:
        if path == "/gpu/set_power_limit":
            n.nvmlDeviceSetPowerManagementLimit(handle, int(values["power_limit_mw"]))
        elif path == "/gpu/set_gpu_locked_clocks":
            n.nvmlDeviceSetGpuLockedClocks(handle, int(values["min_clock_mhz"]), int(values["max_clock_mhz"]))
        elif path == "/gpu/reset_gpu_locked_clocks":
            n.nvmlDeviceResetGpuLockedClocks(handle)
        else:
            return 404, {}
    except n.NVMLError as e:
        status = {n.NVML_ERROR_NO_PERMISSION: 403, n.NVML_ERROR_INVALID_ARGUMENT: 400, n.NVML_ERROR_NOT_SUPPORTED: 400}
        return status.get(e.value, 500), {"errors": {str(index): f"NVML error: {e}"}}
    return 200, {}
