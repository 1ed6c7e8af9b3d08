"""`pals doctor --try-writes`: through the writer that an agent would have, on boards that nobody else steers, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pals.cli.main import say
from pals.cli.writer import Writer, writing
from pals.core.diagnosis import NodeFacts
from pals.core.diagnosis_writing import BoardTrial, CapdBoardFacts, Reach
from pals.core.errors import PalsError
from pals.hardware.nvml import open_boards
from pals.hardware.nvml_board import NvmlBoard
from pals.hardware.programs import PALS_AGENT
from pals.hardware.trial import try_board, work_of
from pals.runtime.agent import FOUND_RECORD
from pals.runtime.config import ControlConfig
from pals.runtime.loop import boards_as_found

PLAN = (
    "--try-writes, on one board after another: lock the SM clock for less than 2 s, lower the power limit by 5 W and put it back, "
    "ask for the same limit 20 times. A clock lock that somebody else set is lost: the driver does not tell of one"
)
HELD = {
    "capd": "everything is a lease: whatever happens to this process, capd puts the boards back within a few seconds",
    "direct": "boards are put back however this process ends; after a kill -9, by `pals restore`",
    "zeusd": "boards are put back however this process ends; after a kill -9, by `pals restore --writer zeusd`",
}


def trials(
    node: NodeFacts, folder: Path, bank: Path | None, *, writer: str, busy_too: bool, environ: Mapping[str, str]
) -> tuple[BoardTrial, ...]:
    """Try every board; `busy_too`: also those at work.

    Raises:
        NotPutBackError: a board could not be put back.
        ConfigError: no driver.
    """
    with (
        open_boards(emulated=bank) as nvml,
        writing(
            ControlConfig(writer=writer), nvml, nvml.boards, bank=bank, say=lambda told: None, environ=environ
        ) as chosen,
    ):
        say(PLAN)
        if chosen.kind in HELD:
            say(f"through {chosen.told}: {HELD[chosen.kind]}")
        return tuple(_try(node, board, chosen, folder, busy_too=busy_too) for board in nvml.boards)


def _try(node: NodeFacts, board: NvmlBoard, chosen: Writer, folder: Path, *, busy_too: bool) -> BoardTrial:
    refused, remedy = next(_against(node, board, chosen, busy_too=busy_too), (None, None))
    if refused is not None:
        return BoardTrial(index=board.info.index, writer=chosen.kind, refused=refused, remedy=remedy)
    limit_w = board.info.found_limit_w
    try:
        written = chosen.board(board)
        with boards_as_found([written], [written], folder / FOUND_RECORD):
            tried = try_board(written, limit_w=limit_w, writer=chosen.kind)
        return replace(tried, left_w=board.read().enforced_limit_w)
    except (PalsError, ValueError) as e:
        return BoardTrial(index=board.info.index, writer=chosen.kind, refused=str(e), remedy="see the other findings")


def _against(node: NodeFacts, board: NvmlBoard, chosen: Writer, *, busy_too: bool) -> Iterator[tuple[str, str]]:
    """Why this board must not be written now, and what to do."""
    yield from _no_writer(node, chosen)
    if board.refusal is not None:
        yield board.refusal, "choose other boards"
    yield from _other_agents(node, chosen)
    if told := _as_capd_tells(node, board):
        yield from _against_capd(told, chosen)
    sample, settings = board.read(), board.settings()
    work = work_of(sample, settings.clock_reasons or ())
    if work is not None and not busy_too:
        yield (
            f"not idle ({work}, {sample.power_w:.0f} W): its work would run slower for a second or two",
            "wait until it is idle, or say --try-writes=busy",
        )


def _no_writer(node: NodeFacts, chosen: Writer) -> Iterator[tuple[str, str]]:
    if not chosen.may_write:
        yield f"nobody here may write it: {chosen.why_not}", "see the findings about permissions and capd"
    if chosen.kind == "capd" and node.capd.off:
        yield "capd's kill switch is on", "remove the file `off` from capd's state folder"
    if chosen.kind == "capd" and node.capd.dry_run:
        yield "capd runs dry, so nothing would be written", "start capd without --dry-run"


def _other_agents(node: NodeFacts, chosen: Writer) -> Iterator[tuple[str, str]]:
    agent = node.run_dir.writer
    if agent.alive:
        yield (
            f"a PALS agent (process {agent.pid}) steers boards here and would take this for another hand",
            "stop it first",
        )
    if agent.error is not None or (agent.pid is not None and not agent.alive):
        yield "a killed agent left boards limited; what is found now is not what should be put back", "pals restore"
    seen = [
        p.pid for p in node.programs or () if p.name == PALS_AGENT and chosen.kind != "capd" and not node.nvml.emulated
    ]
    if seen:
        yield f"{PALS_AGENT} (process {seen[0]}) runs here and would take this for another hand", "stop it first"


def _as_capd_tells(node: NodeFacts, board: NvmlBoard) -> CapdBoardFacts | None:
    if node.capd.reach is not Reach.ANSWERS:
        return None
    return next((b for b in node.capd.boards if b.uuid == board.info.uuid), None)


def _against_capd(told: CapdBoardFacts, chosen: Writer) -> Iterator[tuple[str, str]]:
    if chosen.kind != "capd":
        yield "capd holds this board and would take this for another hand", "try through capd (--writer auto)"
    if told.refusal is not None:
        yield told.refusal, "see capd's policy file"
    if told.leased_by is not None:
        yield f"{told.leased_by} leases it from capd, and would lose it", "stop that agent first"
