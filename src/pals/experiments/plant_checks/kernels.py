"""Check of the kernel formulas on shapes the fit never saw: NVIDIA's kernel tables and vLLM's layer profiles.

Which shapes are held out: kernel_cases.py and kernel_profiles.py. A row pools boards; its note gives each board's error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pals.experiments.plant_checks.kernel_cases import Cases
from pals.experiments.plant_checks.kernel_fit import fit
from pals.experiments.plant_checks.kernel_models import FAMILY, MODELS, entry
from pals.experiments.plant_checks.kernel_profiles import BOARDS as WORKSTATIONS
from pals.experiments.plant_checks.kernel_profiles import read_everything
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.plant import kernels

__all__ = ["check", "fit", "predicted_seconds"]

FloatArray = NDArray[np.float64]
CHECK_CHUNK = 8000
DECODE_TOKENS = 256
TABLES, PROFILES = "aiconfigurator-silicon", "llmservingsim-vllm-ground-truth"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The cases of one row."""

    name: str
    ops: tuple[str, ...]
    at_most: float  # %, the target
    narrow: bool = False  # 8- and 4-bit data types instead of bfloat16
    workstations: bool = False
    board: str = ""  # one board alone
    decode: bool = False  # at most DECODE_TOKENS tokens
    note: str = ""

    def takes(self, cases: Cases) -> bool:
        """Whether these cases belong to the row."""
        here = (cases.board in WORKSTATIONS.values()) == self.workstations
        return (
            cases.op in self.ops and here and cases.board.startswith(self.board)
            and (cases.dtype not in ("bfloat16", *COLLECTIVES)) == self.narrow
        )  # fmt: skip


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "alltoall", "vllm_graph")
DECODE, PREFILL, MIXED = "generation_attention", "context_attention", "mixed_attention"
UNTUNED = (
    "vLLM 0.14 without CUDA graphs: launches are part of the small cases; its shipped tile configurations are known by "
    "name only, and those of expert-parallel Mixtral (1 expert a board) behave unlike the others"
)
MANY_SHARDS = (
    "missed most by narrow expert shards and by ranks of few experts; what was found by hand: docs/models/kernels.md"
)
GROUPS = (
    Group(name="Matrix products, bf16", ops=("gemm",), at_most=12),
    Group(name="Matrix products, fp8 and fp4", ops=("gemm",), at_most=20, narrow=True),
    Group(name="Matrix products, bf16, workstation boards", ops=("gemm",), at_most=12, workstations=True),
    Group(name="Decode attention, bf16 KV", ops=(DECODE,), at_most=12),
    Group(name="Prefill attention, bf16 KV", ops=(PREFILL,), at_most=12),
    Group(name="Attention, fp8 KV", ops=(DECODE, PREFILL), at_most=20, narrow=True),
    Group(name="Decode and prefill attention, workstation boards", ops=(DECODE, PREFILL), at_most=12, workstations=True),
    Group(name="Chunks beside decodes, workstation boards", ops=(MIXED,), at_most=12, workstations=True),
    Group(name="Decode MoE layers, bf16, A100", ops=("moe",), at_most=8, decode=True, board="a100", note=UNTUNED),
    Group(name="Decode MoE layers, bf16, H100", ops=("moe",), at_most=8, decode=True, board="h100", note=MANY_SHARDS),
    Group(name="Decode MoE layers, bf16, H200", ops=("moe",), at_most=8, decode=True, board="h200", note=MANY_SHARDS),
    Group(name="Decode MoE layers, bf16, B200", ops=("moe",), at_most=8, decode=True, board="b200", note=MANY_SHARDS),
    Group(name="Decode MoE layers against experts touched", ops=("moe_layer",), at_most=8, decode=True, workstations=True),
    Group(name="MoE layers, bf16, all batches", ops=("moe",), at_most=12),
    Group(name="Decode MoE layers, fp8 and 4-bit", ops=("moe",), at_most=20, decode=True, narrow=True),
    Group(name="MoE layers, fp8 and 4-bit, all batches", ops=("moe",), at_most=20, narrow=True),
    Group(
        name="Norms, activation, rotary, embedding", ops=("elementwise",), at_most=12, workstations=True,
        note="2 to 30 µs each: which kernels vLLM fuses, and what the profile left in L2, is not in the data",
    ),
    Group(name="NCCL collectives", ops=("nccl",), at_most=12),
    Group(name="All-reduce of the serving engine", ops=("custom_allreduce",), at_most=12),
)  # fmt: skip


def check(folder: Path) -> list[CheckRow]:
    """Errors on held-out shapes, a row for each group that the data hold a case of.

    Raises:
        ConfigError: the data are missing or broken.
    """
    everything = [c.of(c.held_out) for c in read_everything(folder) if _known(c)]
    rows = [_row(g, [c for c in everything if g.takes(c)]) for g in GROUPS]
    return [row for row in rows if row is not None]


def _known(cases: Cases) -> bool:
    if cases.op == "custom_allreduce" and cases.dtype != "vllm_graph":
        return False  # without CUDA graphs the host's launches are all one sees
    return entry(cases) in getattr(kernels.board_kernels(cases.board), FAMILY[cases.op])


def predicted_seconds(cases: Cases) -> FloatArray:
    """What the plant's constants in force say of each case."""
    board = kernels.board_kernels(cases.board)
    if cases.op == "custom_allreduce":  # the engine's choice: large messages go to NCCL
        n = cases.number("message_size") * 2.0
        return kernels.collective(board, "all_reduce", ranks=cases.number("num_gpus"), message_bytes=n).total_s
    c = getattr(board, FAMILY[cases.op])[entry(cases)]
    starts = range(0, len(cases.seconds), CHECK_CHUNK)
    chunks = [cases.of(np.arange(i, min(i + CHECK_CHUNK, len(cases.seconds)))) for i in starts]
    return np.concatenate([MODELS[cases.op](c, part) for part in chunks]) if chunks else np.zeros(0)


def _row(group: Group, parts: list[Cases]) -> CheckRow | None:
    if group.decode:
        parts = [p.of(p.number("num_tokens") <= DECODE_TOKENS) for p in parts]
    residuals = [r for p in parts for r in _residuals(p)]
    if not residuals:
        return None
    kinds = ", ".join(sorted({p.dtype for p in parts}))
    where = PROFILES if group.workstations else TABLES
    return error_row(
        f"{group.name}, held-out shapes",
        f"{where} ({kinds}); constants fitted on its other shapes",
        residuals,
        at_most=group.at_most,
        x_axis="measured, s",
        note="; ".join(text for text in (_by_board(residuals), group.note) if text),
    )


def _by_board(residuals: list[Residual]) -> str:
    boards = sorted({r.group.split(" ")[0] for r in residuals})
    means = [np.mean([abs(r.error_pct) for r in residuals if r.group.startswith(b)]) for b in boards]
    return ", ".join(f"{b} {mean:.1f} %" for b, mean in zip(boards, means, strict=True)) if len(boards) > 1 else ""


def _residuals(cases: Cases) -> list[Residual]:
    predicted = predicted_seconds(cases)
    return [
        Residual(group=f"{cases.board} {cases.dtype}", x=float(t), measured=float(t), predicted=float(p))
        for t, p in zip(cases.seconds, predicted, strict=True)
    ]
