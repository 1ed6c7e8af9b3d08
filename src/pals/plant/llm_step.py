"""How long one engine step takes and what it asks of its boards: its kernels by class, links, gaps and host time.

t = Σ (t_mem^p + (t_core·f_max/f)^p)^(1/p) over dense products, experts and decode attention, + prefill attention·f_max/f + latencies +
links + host. Memory, links, latencies and host do not follow the SM clock. Derivation and errors: docs/models/step.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.architecture import ModelShape
from pals.core.errors import ConfigError
from pals.plant import step_kernels
from pals.plant.kernels import KernelTime
from pals.plant.silicon import Load
from pals.plant.specs import BoardSpec
from pals.plant.step_constants import StepConstants, step_constants
from pals.plant.step_kernels import ParallelGroup

FloatArray = NDArray[np.float64]

NO_TIME_S = 1e-15  # keeps ratios finite where there is no work
GIB = 2**30  # boards are named in GB and hold about so many of these
RESERVED_BYTES = 2e9  # activations, CUDA graphs, context: what vLLM keeps of a board besides weights and KV cache


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What one step computes."""

    prefill_tokens: int = 0
    prefill_sequences: int = 0
    decode_sequences: int = 0
    context_tokens: int = 0  # KV tokens read by the decoding sequences, and by prefill of what is cached
    attention_pairs: float = 0.0  # query × key pairs of the prefill

    @property
    def tokens(self) -> int:
        """Tokens through the layers."""
        return self.prefill_tokens + self.decode_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Duration of a step, and what it asks of each board on average."""

    seconds: float
    load: Load


class StepTables(NamedTuple):
    """All that `step_cost` needs of one model on one group of boards; arrays by number of tokens, shape (tokens + 1,).

    Core times are at the top clock and follow it; all other times do not.
    """

    memory_s: FloatArray  # dense weights and activations through HBM
    core_s: FloatArray  # their products
    tensor_s: FloatArray  # the part of that in which tensor cores do useful work at their achievable rate
    overlap_p: FloatArray
    logits_core_s: FloatArray  # output matrix, by sequences that sample
    expert_memory_s: FloatArray  # routed experts of the hottest rank
    expert_core_s: FloatArray
    expert_p: FloatArray
    expert_even: FloatArray  # work of the mean rank relative to the hottest, which the others wait for
    fixed_s: FloatArray  # latencies of kernels and gaps between them
    comm_s: FloatArray  # between the boards
    launch_s: FloatArray  # host time to launch what no CUDA graph holds; hidden behind the device while shorter
    context_s: float  # reading one KV token
    context_core_s: float  # working on it
    window: float  # KV tokens of a sequence that sliding-window layers read
    windowed: float  # share of the layers that do
    sequence_core_s: float  # attention of one decoding sequence
    attention_p: float
    pair_s: float  # one query × key pair of prefill, core
    prefill_token_s: float  # one token of prefill, core
    host_s: float  # scheduler, input and output
    host_per_sequence_s: float
    expert_activity: float  # core power of experts' products, relative to saturated tensor cores
    expert_slack: (
        float  # how much longer the engine takes over experts than their kernels: time in which nothing is issued
    )
    top_clock_mhz: float
    stages: float  # of the pipeline: while one works the others idle


def step_cost(
    t: StepTables, prefill_tokens: Any, prefill_sequences: Any, decode_sequences: Any, context_tokens: Any,
    attention_pairs: Any, clock_mhz: Any,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Seconds of a step, and its compute, memory and busy shares per board; see `StepBatch` for the arguments.

    Busy is the time in which kernels fill the SMs; waiting for links and for a hotter rank is not part of it. Plain
    arithmetic on numbers or arrays alike: the emulated engine calls it as it is, the simulator compiled.
    """

    def overlapped(memory_s: Any, core_s: Any, p: Any) -> Any:  # inside: compiled with it
        most = np.maximum(memory_s, core_s) + NO_TIME_S
        return most * (1.0 + (np.minimum(memory_s, core_s) / most) ** p) ** (1.0 / p)

    tokens = prefill_tokens + decode_sequences
    sequences = prefill_sequences + decode_sequences
    slower = t.top_clock_mhz / clock_mhz
    core_s = (t.core_s[tokens] + t.logits_core_s[sequences]) * slower
    dense_s = overlapped(t.memory_s[tokens], core_s, t.overlap_p[tokens])
    expert_core_s = t.expert_core_s[tokens] * slower
    expert_s = overlapped(t.expert_memory_s[tokens], expert_core_s, t.expert_p[tokens])
    read = context_tokens - t.windowed * np.maximum(0.0, context_tokens - t.window * sequences)
    kv_s = t.context_s * read
    kv_core_s = (t.context_core_s * read + t.sequence_core_s * decode_sequences) * slower
    attention_s = overlapped(kv_s, kv_core_s, t.attention_p)
    prefill_s = (t.pair_s * attention_pairs + t.prefill_token_s * prefill_tokens) * slower
    active_s = dense_s + expert_s + attention_s + prefill_s + t.fixed_s[tokens]
    device_s = active_s + t.comm_s[tokens]
    seconds = np.maximum(device_s, t.launch_s[tokens]) + t.host_s + t.host_per_sequence_s * sequences
    working = t.expert_even[tokens] / t.expert_slack
    compute = t.tensor_s[tokens] * slower + t.expert_activity * working * expert_core_s + prefill_s
    memory = t.memory_s[tokens] + working * t.expert_memory_s[tokens] + kv_s
    share = 1.0 / (seconds * t.stages)
    busy = active_s - (1.0 - working) * expert_s
    return seconds, np.minimum(1.0, compute * share), np.minimum(1.0, memory * share), np.minimum(1.0, busy * share)


class StepModel:
    """Step times of one model on one group of boards; see `ParallelGroup`."""

    def __init__(
        self,
        shape: ModelShape,
        spec: BoardSpec,
        *,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        data_parallel: int = 1,
        expert_parallel: bool = False,
        cuda_graphs: bool = True,
        constants: StepConstants | None = None,
        max_tokens: int = 16384,
    ) -> None:
        """A step is one data-parallel rank's; its tokens are that rank's, and the other ranks are taken to have as many.

        Args:
            shape: the model.
            spec: the type of every board of the group.
            tensor_parallel: boards that divide each matrix.
            pipeline_parallel: stages, one after the other.
            data_parallel: ranks in lock-step.
            expert_parallel: as vLLM's option: whole experts lie on tensor × data ranks.
            cuda_graphs: False is vLLM's `--enforce-eager`: the host launches every kernel.
            constants: None takes the board's own; see `StepConstants`.
            max_tokens: of a step; more makes larger tables on the way.

        Raises:
            ConfigError: the attention heads cannot be divided among the boards.
        """
        self.shape, self.spec, self.cuda_graphs = shape, spec, cuda_graphs
        if shape.heads % tensor_parallel:
            raise ConfigError(
                f"{shape.heads} attention heads cannot be divided among {tensor_parallel} tensor-parallel boards; take a number "
                "that divides them. Nothing was simulated"
            )
        shared = expert_parallel and shape.experts > 0
        self.group = ParallelGroup(tensor_parallel, pipeline_parallel, data_parallel, shared)
        self.constants = constants or step_constants(spec)
        self.tables = self._tables(max_tokens)

    def changed(self, constants: StepConstants) -> StepModel:
        """The same model on the same boards with other constants: another build of the engine, routing that drifted."""
        return StepModel(
            self.shape,
            self.spec,
            tensor_parallel=self.group.tensor,
            pipeline_parallel=self.group.pipeline,
            data_parallel=self.group.data,
            expert_parallel=self.group.expert,
            cuda_graphs=self.cuda_graphs,
            constants=constants,
            max_tokens=len(self.tables.memory_s) - 1,
        )

    def step(self, batch: StepBatch, sm_clock_mhz: float) -> StepCost:
        """Duration and load of a step at this clock; an empty batch costs the host's time alone."""
        if max(batch.tokens, batch.prefill_sequences + batch.decode_sequences) >= len(self.tables.memory_s):
            self.tables = self._tables(2 * batch.tokens)
        seconds, compute, memory, busy = step_cost(
            self.tables, batch.prefill_tokens, batch.prefill_sequences, batch.decode_sequences,
            float(batch.context_tokens), batch.attention_pairs, sm_clock_mhz,
        )  # fmt: skip
        return StepCost(
            seconds=float(seconds), load=Load(compute=float(compute), memory=float(memory), busy=float(busy))
        )

    def _tables(self, max_tokens: int) -> StepTables:
        return step_tables(self.shape, self.spec, self.group, self.constants, max_tokens, self.cuda_graphs)

    def kv_capacity_bytes(self, utilization: float) -> float:
        """KV-cache bytes of one board.

        Raises:
            ConfigError: the weights do not fit.
        """
        expert_bytes = self.shape.moe_layers * self.shape.experts * self.shape.expert_bytes
        other_bytes = self.shape.weight_bytes - expert_bytes
        ranks = self.group.expert_ranks if self.group.expert else self.group.tensor
        weights = (other_bytes / self.group.tensor + expert_bytes / ranks) / self.group.pipeline
        usable = self.spec.memory_gb * GIB * utilization - RESERVED_BYTES
        if weights >= usable:
            raise ConfigError(
                f"weights need {weights / 1e9:.1f} GB per board, {self.spec.nvml_name} leaves {usable / 1e9:.1f} GB of "
                f"{self.spec.memory_gb:.0f} GB; take more boards (Nx{self.spec.name})"
            )
        return usable - weights


def step_tables(
    shape: ModelShape,
    spec: BoardSpec,
    group: ParallelGroup,
    k: StepConstants,
    max_tokens: int,
    cuda_graphs: bool = True,
) -> StepTables:
    """Tables of `step_cost`, computed on a grid of token counts and interpolated between; no tokens, no time."""
    tokens, grid = np.arange(max_tokens + 1), _grid(max_tokens)
    parts = _kernels(shape, spec, group, k.popularity_cv, tuple(grid))
    factor = k.expert_factor if shape.expert_format == "bf16" else k.narrow_expert_factor
    narrow = shape.moe_layers * (shape.expert_format != "bf16")
    gaps = shape.layers * k.layer_gap_s + shape.moe_layers * k.moe_gap_s + narrow * k.narrow_moe_gap_s
    launch = (shape.layers - shape.moe_layers) * k.launch_layer_s + shape.moe_layers * k.launch_moe_layer_s
    a, chunked = parts.attention, bool(shape.chunked_layers)

    def table(values: FloatArray | float) -> FloatArray:
        return np.where(tokens > 0, np.interp(tokens, grid, np.broadcast_to(values, grid.shape)), 0.0)

    return StepTables(
        memory_s=table(parts.dense.memory_s + parts.logits.memory_s[0]),
        core_s=table(parts.dense.core_s),
        tensor_s=table(parts.dense.tensor_s),
        overlap_p=np.interp(tokens, grid, parts.dense.overlap_p),
        logits_core_s=table(parts.logits.core_s),
        expert_memory_s=table(factor * parts.experts.memory_s),
        expert_core_s=table(factor * parts.experts.core_s),
        expert_p=np.interp(tokens, grid, parts.experts.overlap_p),
        expert_even=np.interp(tokens, grid, parts.even),
        fixed_s=table(parts.dense.fixed_s + parts.experts.fixed_s + parts.logits.fixed_s[0] + a.fixed_s + gaps),
        comm_s=table(k.link_factor * parts.links_s),
        launch_s=np.where((tokens > k.capture_tokens) | (tokens > 0) & (not cuda_graphs), launch, 0.0),
        context_s=k.attention_factor * a.context_s,
        context_core_s=k.attention_factor * a.context_core_s,
        window=float(shape.window),
        windowed=shape.window_layers / shape.layers,
        sequence_core_s=k.attention_factor * a.sequence_core_s,
        attention_p=a.overlap_p,
        pair_s=a.pair_s,
        prefill_token_s=a.token_s,
        host_s=k.host_s + chunked * k.chunked_host_s,
        host_per_sequence_s=k.host_per_sequence_s + chunked * k.chunked_host_per_sequence_s,
        expert_activity=k.expert_activity if shape.expert_format == "bf16" else k.narrow_expert_activity,
        expert_slack=factor,
        top_clock_mhz=float(spec.max_sm_clock_mhz),
        stages=float(group.pipeline),
    )


class _Kernels(NamedTuple):
    """What does not depend on the engine; arrays by the grid."""

    dense: KernelTime
    logits: KernelTime
    experts: KernelTime
    even: FloatArray
    links_s: FloatArray
    attention: step_kernels.AttentionTime


@lru_cache(maxsize=64)
def _kernels(
    shape: ModelShape, spec: BoardSpec, group: ParallelGroup, popularity_cv: float, grid: tuple[int, ...]
) -> _Kernels:
    board, rows = step_kernels.kernels_of(spec), np.array(grid, dtype=np.float64)
    none = np.zeros(len(rows))
    routed, even = KernelTime(none, none, none, none, none, none + 1.0), none + 1.0
    if shape.experts:
        routed, even = step_kernels.experts(board, shape, group, popularity_cv, rows)
    return _Kernels(
        step_kernels.dense(board, shape, group.tensor, rows),
        step_kernels.output_matrix(board, shape, group.tensor, rows),
        routed,
        even,
        step_kernels.links(board, shape, group, rows),
        step_kernels.attention(board, shape, group.tensor),
    )


def _grid(max_tokens: int) -> NDArray[np.int64]:
    """Token counts from one: all up to 32, then about 4 % apart."""
    wide = np.geomspace(32, max(33, max_tokens), 150).round()
    return np.unique(np.concatenate([np.arange(1, 33), wide])).astype(np.int64)
