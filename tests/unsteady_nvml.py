"""nvidia-ml-py over a driver that a test unloads, loads anew with other indices, or breaks: a process finds it as `pynvml` on its path.

What is so now stands in the file that UNSTEADY_NVML names, as JSON (see `Unsteady`); handles of an earlier load are no handles any more.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


class Unsteady:
    """The test's side: the driver as it should be from now on."""

    def __init__(self, folder: Path) -> None:
        self._file, self._inits, self.path = folder / "driver.json", folder / "inits", folder / "fake"
        self.path.mkdir()
        shutil.copy(__file__, self.path / "pynvml.py")
        self.be()

    @property
    def environ(self) -> dict[str, str]:
        """Of a process that uses this driver."""
        return {"UNSTEADY_NVML": str(self._file)}

    def be(
        self,
        *,
        load: int = 1,
        order: tuple[int, ...] = (0, 1),
        there: bool = True,
        errors: dict[str, int] | None = None,
    ) -> None:
        """`load`: the how manieth since boot; `order`: the board behind each index; `errors`: of board i's reads, by str(i)."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps({"load": load, "order": order, "there": there, "errors": errors or {}}))
        fresh.replace(self._file)

    def inits(self) -> int:
        """How often NVML was opened, or tried to be."""
        return len(self._inits.read_bytes())


def now() -> dict[str, Any]:
    """How the driver is."""
    told: dict[str, Any] = json.loads(Path(os.environ["UNSTEADY_NVML"]).read_text())
    return told


def real_module() -> Any:
    """The library this one stands before."""
    elsewhere = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    found = PathFinder.find_spec("pynvml", elsewhere)
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location("pynvml_behind", found.origin)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["pynvml_behind"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Nvml:
    """The functions that are otherwise; all else is the library's."""

    def __init__(self) -> None:
        self.real, self.opened = real_module(), 0

    def init(self) -> None:
        """Note it, then open."""
        with Path(os.environ["UNSTEADY_NVML"]).with_name("inits").open("a") as f:
            f.write("i")
        if not now()["there"]:
            raise self.real.NVMLError(self.real.NVML_ERROR_DRIVER_NOT_LOADED)
        self.opened = now()["load"]
        self.real.nvmlInit()

    def shutdown(self) -> None:
        """The library behind stays open."""

    def count(self) -> int:
        """As many as there are."""
        self.check()
        return len(now()["order"])

    def handle(self, index: int) -> tuple[int, int, Any]:
        """A handle that knows its load."""
        self.check()
        board = now()["order"][index]
        return now()["load"], board, self.real.nvmlDeviceGetHandleByIndex(board)

    def check(self) -> None:
        """Refuse where the driver is not the one that was opened."""
        if not now()["there"] or self.opened != now()["load"]:
            raise self.real.NVMLError(self.real.NVML_ERROR_UNINITIALIZED)

    def called(self, name: str, handle: tuple[int, int, Any], *more: Any) -> Any:
        """One of the library's functions of a board."""
        self.check()
        load, board, behind = handle
        if load != now()["load"]:
            raise self.real.NVMLError(self.real.NVML_ERROR_INVALID_ARGUMENT)
        if name.startswith("nvmlDeviceGet") and (error := now()["errors"].get(str(board))):
            raise self.real.NVMLError(error)
        return getattr(self.real, name)(behind, *more)

    def attribute(self, name: str) -> Any:
        """What the module's users see."""
        otherwise = {
            "nvmlInit": self.init, "nvmlShutdown": self.shutdown, "nvmlDeviceGetCount": self.count,
            "nvmlDeviceGetHandleByIndex": self.handle,
        }  # fmt: skip
        if name in otherwise:
            return otherwise[name]
        if name.startswith("nvmlDevice"):
            return lambda *args: self.called(name, *args)
        return getattr(self.real, name)


if __name__ == "pynvml":
    _nvml = Nvml()

    def __getattr__(name: str) -> Any:
        return _nvml.attribute(name)
