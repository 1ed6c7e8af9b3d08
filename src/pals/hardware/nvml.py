"""NVML opened, real or emulated: the one file that imports nvidia-ml-py and hands out boards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from pals.core.errors import INSTALL, ConfigError, PalsError
from pals.hardware.emulated_nvml import EmulatedNvml
from pals.hardware.nvml_board import NvmlBoard
from pals.plant.boards import BoardBank


def _pynvml() -> ModuleType:
    try:
        import pynvml
    except ImportError as e:
        raise ConfigError(f"nvidia-ml-py is not installed; {INSTALL}") from e
    return pynvml


class Nvml:
    """An open NVML, the boards asked for, and the way to open others; a context manager."""

    def __init__(
        self, open_one: Callable[[int], NvmlBoard], count: int, *, may_write: bool, close: Callable[[], None]
    ) -> None:
        self.boards: tuple[NvmlBoard, ...] = ()
        self.failed: dict[int, str] = {}  # boards that could not be opened when all were asked for, and why
        self.may_write = may_write
        self._open_one, self._count, self._close = open_one, count, close

    def open(self, indices: Sequence[int] | None) -> tuple[NvmlBoard, ...]:
        """Open boards as they are now: a board's found limit is the one at this moment.

        Of all boards (None), one that cannot be opened is left out and kept in `failed`: what runs on the others goes on.

        Raises:
            ConfigError: an index that does not exist, or no board at all.
            PalsError, ValueError: a board asked for by its index cannot be opened.
        """
        wanted = range(self._count) if indices is None else indices
        missing = [i for i in wanted if not 0 <= i < self._count]
        if missing or not self._count:
            raise ConfigError(
                f"boards {missing or 'none'} not found: NVML lists {self._count} boards; nothing was changed"
            )
        if indices is not None:
            return tuple(self._open_one(i) for i in wanted)
        opened = []
        for i in wanted:
            try:
                opened.append(self._open_one(i))
            except (PalsError, ValueError) as e:
                self.failed[i] = str(e)
        if not opened:
            raise ConfigError(f"no board can be opened; nothing was changed. {'; '.join(self.failed.values())}")
        return tuple(opened)

    def close(self) -> None:
        """Shut NVML down; limits stay as they are (see `NvmlBoard.restore`)."""
        self._close()

    def __enter__(self) -> Nvml:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_boards(
    *,
    emulated: Path | None = None,
    indices: Sequence[int] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Nvml:
    """Open NVML and its boards (`indices`, or all; more with `Nvml.open`); `emulated` names a bank file to put beneath NVML.

    Raises:
        ConfigError: no driver, no board, or an index that does not exist.
    """
    nvml = _pynvml()
    close, may_write = _begin(nvml, emulated, clock, sleep)
    try:
        opened = Nvml(
            lambda i: NvmlBoard(nvml, i, clock=clock, may_write=may_write),
            nvml.nvmlDeviceGetCount(),
            may_write=may_write,
            close=close,
        )
        opened.boards = opened.open(indices)
        return opened
    except BaseException:
        close()
        raise


@contextmanager
def open_each(
    *,
    emulated: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[list[NvmlBoard | Exception], bool]]:
    """All boards that NVML lists, each opened or why it cannot be, and whether this process may write; for looking only.

    Raises:
        ConfigError: no driver.
    """
    nvml = _pynvml()
    close, may_write = _begin(nvml, emulated, clock, sleep)
    try:
        opened: list[NvmlBoard | Exception] = []
        for i in range(nvml.nvmlDeviceGetCount()):
            try:
                opened.append(NvmlBoard(nvml, i, clock=clock, may_write=may_write))
            except (PalsError, ValueError) as e:
                opened.append(e)
        yield opened, may_write
    finally:
        close()


def _begin(
    nvml: Any, emulated: Path | None, clock: Callable[[], float], sleep: Callable[[float], None]
) -> tuple[Callable[[], None], bool]:
    """Initialise; return how to end, and whether this process may write."""
    if emulated is None:
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as e:
            raise ConfigError(
                f"no NVIDIA driver found ({e}); to run without a GPU use --emulate, e.g. --emulate 4xa100-sxm4-80gb"
            ) from e
        return nvml.nvmlShutdown, os.geteuid() == 0
    try:
        bank = BoardBank.open(emulated)
    except FileNotFoundError as e:
        raise ConfigError(f"the emulated boards {emulated} are gone: has the server that emulated them ended?") from e
    except PermissionError as e:
        raise ConfigError(
            f"the emulated boards {emulated} belong to another user; run as that user, or set PALS_RUN_DIR to a folder of your own"
        ) from e
    except (OSError, ValueError) as e:
        raise ConfigError(f"the emulated boards cannot be read: {e}; remove the file") from e
    before = nvml.nvmlLib
    nvml._nvmlGetFunctionPointer_cache.clear()
    nvml.nvmlLib = EmulatedNvml(bank, clock, sleep)
    nvml.nvmlInit()

    def end() -> None:
        nvml.nvmlShutdown()
        nvml._nvmlGetFunctionPointer_cache.clear()
        nvml.nvmlLib = before
        bank.close()

    return end, bank.writable
