"""A thread that keeps a bank's readings fresh for readers who do not compute physics, and can keep its boards loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pals.plant.boards import BoardBank
from pals.plant.silicon import Load

REFRESH_S = 0.02
AHEAD_S = 0.5  # a synthetic load is booked so far ahead, and again when half of it is over


@contextmanager
def kept_fresh(path: Path, *, load: Load | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Refresh the bank at `path` every 20 ms while the context lasts; `load` keeps all its boards steadily busy."""
    bank = BoardBank.open(path)
    ended = threading.Event()
    booked_s = clock()
    bank.refresh(booked_s)  # whoever comes after us finds readings

    def keep() -> None:
        nonlocal booked_s
        while not ended.wait(REFRESH_S):
            now_s = clock()
            if load is not None and booked_s < now_s + AHEAD_S / 2:
                start_s, booked_s = max(now_s, booked_s), now_s + AHEAD_S
                bank.book(range(bank.count), start_s, booked_s, load, now_s)
            else:
                bank.refresh(now_s)

    thread = threading.Thread(target=keep, name="pals-boards", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        bank.close()
