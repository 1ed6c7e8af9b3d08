"""The emulated engine's routing: real vLLM in virtual time, its channel of expert counts, drift that readers and steps see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pals.core.experts import ExpertCounts, summarise
from pals.engines.emulated_world import emulating
from pals.engines.openai_client import RequestSpec
from pals.plant.specs import parse_boards
from pals.runtime.expert_channel import SUFFIX, read_engine

pytest.importorskip("vllm")
from pals.engines.virtual_engine import VirtualTrace
from pals.experiments.virtual_run import BANK_FILE, LiveNode, VirtualNode, running

LOAD = [RequestSpec(at_s=0.0, prompt_tokens=32, output_tokens=900) for _ in range(16)]


def serve(node: VirtualNode, *looks_s: float, experts: bool, routing: str = "") -> list[ExpertCounts | None]:
    """What the channel says at these times, while a full batch decodes."""
    told: list[ExpertCounts | None] = []
    with emulating("moe", node.folder, node.folder / BANK_FILE, routing, experts=experts), running(node) as live:
        VirtualTrace(live.engine, LOAD, seed=1, start_s=live.clock.now_s())
        for at_s in looks_s:
            serve_until(live, at_s)
            told.append(read_engine(node.folder, [os.getpid()]))
    return told


def serve_until(live: LiveNode, until_s: float) -> None:
    live.engine.serve(until_s=until_s, done=lambda: False)


@pytest.fixture
def node(olmoe: Path) -> VirtualNode:
    spec, count = parse_boards("a100-sxm4-80gb")
    return VirtualNode(
        model=olmoe, options=["--max-num-seqs", "16"], spec=spec, count=count, board_seed=0,
        folder=Path(os.environ["PALS_RUN_DIR"]),
    )  # fmt: skip


def test_an_emulated_moe_tells_its_experts_where_real_workers_would_and_drifts(node: VirtualNode) -> None:
    a, b, c, d = serve(node, 0.6, 1.6, 2.2, 3.2, experts=True, routing="1.6:swap=1,cv=0")

    assert a is not None
    assert b is not None
    assert c is not None
    assert d is not None
    assert list(node.folder.glob(f"*{SUFFIX}")) == []  # gone with the engine
    before, after = b.since(a), d.since(c)
    for w in (before, after):
        assert w.routed.shape == (16, 64)
        assert w.routed.sum(axis=1).tolist() == [w.tokens * 8] * 16
        assert w.tokens == 16 * w.steps  # everybody decodes
        assert w.span_s == pytest.approx(1.0, abs=0.15)  # published twice a second
    then, now = (summarise(w, reference=before) for w in (before, after))
    assert (now.drift or 0.0) > 0.2
    assert (now.distinct_per_step or 0.0) > 1.1 * (then.distinct_per_step or 0.0)
    assert (now.variation or 0.0) < 0.1 < (then.variation or 0.0)
    pace = [(w.span_s or 0.0) / w.steps for w in (before, after)]
    assert pace[1] > 1.06 * pace[0]  # the context that grows makes up 3 %


def test_nobody_counts_who_is_not_asked_to(node: VirtualNode) -> None:
    assert serve(node, 0.6, experts=False) == [None]
