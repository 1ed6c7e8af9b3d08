"""All findings of a node, in reading order."""

from __future__ import annotations

from collections.abc import Sequence

from pals.core.diagnosis import Finding, NodeFacts, Status
from pals.views.doctor import boards, engines, software, writers
from pals.views.doctor.capd import capd
from pals.views.doctor.trials import trial, verdict


def findings(node: NodeFacts) -> list[Finding]:
    """Everything worth saying about the node."""
    tried = {t.index for t in node.trials or () if t.clock is not None}
    infos = [b.info for b in node.nvml.boards if b.info is not None]
    found = [
        *boards.driver(node.nvml, node.software),
        *(
            f
            for b in node.nvml.boards
            for f in boards.board(b, steered=node.run_dir.writer.alive, tried=b.index in tried)
        ),
        *writers.permissions(node.nvml, node.privilege, node.chosen, node.capd),
        writers.other_writers(node.run_dir.writer),
        *writers.other_programs(node.programs, node.capd, emulated=bool(node.nvml.emulated)),
        *capd(node.capd, node.nvml),
        *(f for t in node.trials or () for f in trial(t)),
        *writers.agents(node.run_dir),
        *engines.engines(node.run_dir),
        *software.packages(node.software, real_boards=bool(infos) and not node.nvml.emulated),
        software.run_directory(node.run_dir),
        *software.variables(
            node.software.environment,
            emulated=bool(node.nvml.emulated),
            mixed_boards=len({i.name for i in infos}) > 1,
        ),
    ]
    return [*found, *verdict(node, found)]


def worst(found: Sequence[Finding]) -> Status:
    """The most worrying status; ok where nothing was found."""
    return max((f.status for f in found), key=list(Status).index, default=Status.OK)
