"""Boards that a killed agent left limited or locked: put back where they stand as it left them, told where nothing may be written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pals.cli.main import say
from pals.core.errors import ConfigError, PalsError
from pals.core.quantities import SAME_LIMIT_W, BoardInfo, BoardWrite
from pals.hardware.nvml import Nvml, open_boards
from pals.hardware.nvml_board import Setters
from pals.runtime.agent import FOUND_RECORD
from pals.runtime.found import forget_found, left_by_dead_agent, read_found


def mend(
    folder: Path,
    bank: Path | None,
    *,
    setters: Setters | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Put boards back that a dead agent left limited or locked, through `setters` where they are given; return how many.

    A board that does not stand where that agent left it was set by somebody else since: its limit is left.

    Raises:
        ConfigError: a living agent owns the boards, or the record cannot be understood; nothing was written.
        PalsError: a board refused; the others are put back, and the record keeps it.
    """
    record = folder / FOUND_RECORD
    left = left_by_dead_agent(record)
    if not left:
        if (found := read_found(record)) is not None and not found.alive:
            record.unlink(missing_ok=True)  # that agent had written nothing yet
        return 0
    with open_boards(emulated=bank, clock=clock) as nvml:
        if setters is not None:
            setters.check([b.info for b in nvml.boards])
            for board in nvml.boards:
                board.write_through(setters)
        mended, refused = _put_back(nvml, left, record)
        unseen = set(left) - {b.info.uuid for b in nvml.boards}
        told_unseen = "; ".join(nvml.failed.values())
    if unseen:
        say(
            f"{len(unseen)} boards that a killed agent left limited cannot be reached, {record} keeps them: {told_unseen}"
        )
    if refused:
        raise PalsError(
            f"{'; '.join(refused)} {record} still says what was found: run `pals restore` with the rights to write"
        )
    return mended


def _put_back(nvml: Nvml, left: Mapping[str, BoardWrite], record: Path) -> tuple[int, list[str]]:
    """Mend the boards that are open, take them out of `record`; how many were written, and what those that refused say."""
    for board in nvml.boards:  # before anything is written
        if (write := left.get(board.info.uuid)) is not None:
            refuse_impossible(board.info, write, record)
    mended, refused, locked = 0, [], False
    done = set(left) - {b.info.uuid for b in nvml.boards} if not nvml.failed else set()  # no longer in this node
    for board in nvml.boards:
        write = left.get(board.info.uuid)
        if write is None:
            continue
        now_w = board.info.found_limit_w
        ours = write.left_at(now_w)
        if not ours and write.written_w and abs(now_w - write.found_limit_w) >= SAME_LIMIT_W:
            say(f"board {board.info.index}: somebody else set {now_w:.0f} W after the agent was killed; left so")
        if ours or write.clock_locked:
            try:
                board.put_back(write.found_limit_w if ours else None, unlock=write.clock_locked)
                mended, locked = mended + 1, locked or write.clock_locked
            except PalsError as e:  # one board's refusal must not keep the others limited
                refused.append(str(e))
                continue
        done.add(board.info.uuid)
    forget_found(record, done)
    if mended:
        say(
            f"an earlier agent ended without putting {mended} boards back; they are at the limits it had found again"
            + (", and its clock locks are released" if locked else "")
        )
    return mended, refused


def refuse_impossible(info: BoardInfo, write: BoardWrite, record: Path) -> None:
    """Raise `ConfigError` where the record names a limit that this board cannot have."""
    for limit_w in (write.found_limit_w, *write.written_w):
        if not info.min_limit_w - SAME_LIMIT_W <= limit_w <= info.max_limit_w + SAME_LIMIT_W:
            raise ConfigError(
                f"{record} is damaged: {limit_w:.0f} W lies outside board {info.index}'s {info.min_limit_w:.0f}.."
                f"{info.max_limit_w:.0f} W; nothing was written. Check the limits with `nvidia-smi -q -d POWER`, set them by "
                "hand where they are too low, then remove the file"
            )


def refuse_left_limits(folder: Path) -> None:
    """Raise `ConfigError` where an agent left limits that this process cannot put back, and would take for what was found."""
    if left := left_by_dead_agent(folder / FOUND_RECORD):
        raise ConfigError(
            f"{folder / FOUND_RECORD} says that an agent was killed and left {len(left)} boards limited, which this process cannot "
            "put back. Nothing was written: run `sudo pals restore` (with this PALS_RUN_DIR) first"
        )


def warn_of_left_limits(folder: Path) -> None:
    """Say, where nothing will be written, that an agent was killed and its limits may still be in force."""
    record = folder / FOUND_RECORD
    try:
        found = read_found(record)
    except ConfigError as e:
        say(str(e))
        return
    if found is None or found.alive:
        return
    if left := [b for b in found.boards.values() if b.written_w or b.clock_locked]:
        say(
            f"{record} says that an agent was killed and left {len(left)} boards limited; they stay so, since nothing is "
            "written in advise mode. Run `pals restore` to put them back"
        )
