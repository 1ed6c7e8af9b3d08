"""How long one engine step takes and what it asks of its boards: op classes in a row, each a p-norm of memory and core time.

t = Σ ‖t_mem, t_core·f_max/f‖ₚ + core-bound rest·f_max/f + t_comm + t_host, where host launches can outlast the device. Memory, links and
host do not follow the SM clock. Derivation, constants and errors: docs/models.md, "Step time".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import ConfigError
from pals.plant.architecture import FORMAT_BYTES, ModelShape
from pals.plant.expert_ranks import BLOCKS, rank_load
from pals.plant.silicon import Load
from pals.plant.specs import BoardSpec
from pals.plant.step_constants import StepConstants, step_constants

FloatArray = NDArray[np.float64]

ACTIVATION_BYTES = 2.0
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


class ParallelGroup(NamedTuple):
    """How a model lies on its boards; vLLM's own parameters."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1  # ranks of one MoE model in lock-step; independent replicas where experts are not shared
    expert: bool = False  # whole experts are divided among tensor × data ranks, instead of each expert's matrices

    @property
    def expert_ranks(self) -> int:
        """Ranks the experts are divided among."""
        return self.tensor * self.data if self.expert else 1


class StepTables(NamedTuple):
    """All that `step_cost` needs of one model on one group of boards; arrays by number of tokens, shape (tokens + 1,)."""

    memory_s: FloatArray  # dense weights and activations through HBM
    tensor_s: FloatArray  # their matrix products, at the top clock
    expert_memory_s: FloatArray  # routed experts of the hottest rank
    expert_tensor_s: FloatArray
    expert_even: FloatArray  # work of the mean rank relative to the hottest, which the others wait for
    rest_s: FloatArray  # kernels that follow the clock alone
    comm_s: FloatArray  # between the boards, clock-free
    launch_s: FloatArray  # host time to launch what no CUDA graph holds; hidden behind the device while shorter
    context_s: float  # reading one KV token
    context_tensor_s: float  # working on it, at the top clock
    window_s: float  # reading one KV token in the sliding-window layers
    window: float  # tokens those look back
    pair_s: float  # one query × key pair of prefill, at the top clock
    logits_s: float  # output matrix for one sampled token, at the top clock
    host_s: float  # scheduler, input and output, clock-free
    host_per_sequence_s: float
    issue_share: float  # at the top clock, issuing a memory-bound kernel takes this share of its memory time
    overlap_p: float
    top_clock_mhz: float
    stages: float  # of the pipeline: while one works the others idle
    expert_activity: float  # power of the cores while `expert_tensor_s` passes, relative to saturated dense products
    pair_activity: float  # the same of attention


def step_cost(
    t: StepTables, prefill_tokens: int, prefill_sequences: int, decode_sequences: int, context_tokens: float,
    attention_pairs: float, clock_mhz: float,
) -> tuple[float, float, float, float]:  # fmt: skip
    """Seconds of a step, and its compute, memory and busy shares per board; see `StepBatch` for the arguments.

    Plain scalar arithmetic: the emulated engine calls it as it is, the simulator compiled.
    """
    tokens = prefill_tokens + decode_sequences
    sequences = prefill_sequences + decode_sequences
    slower = t.top_clock_mhz / clock_mhz
    p, issue = t.overlap_p, t.issue_share
    dense_s, expert_s = t.memory_s[tokens], t.expert_memory_s[tokens]
    kv_s = t.context_s * context_tokens + t.window_s * np.minimum(context_tokens, t.window * sequences)
    tensor_s = t.tensor_s[tokens] + t.logits_s * sequences
    expert_tensor_s, pair_s = t.expert_tensor_s[tokens], t.pair_s * attention_pairs
    kv_tensor_s = t.context_tensor_s * context_tokens
    experts_s = (expert_s**p + ((expert_tensor_s + issue * expert_s) * slower) ** p) ** (1.0 / p)
    device_s = (
        (dense_s**p + ((tensor_s + issue * dense_s) * slower) ** p) ** (1.0 / p)
        + experts_s
        + (kv_s**p + ((kv_tensor_s + issue * kv_s) * slower) ** p) ** (1.0 / p)
        + (t.rest_s[tokens] + pair_s) * slower
        + t.comm_s[tokens]
    )
    launch_s = t.launch_s[tokens]
    seconds = np.maximum(device_s, launch_s) + t.host_s + t.host_per_sequence_s * sequences
    even = t.expert_even[tokens]
    share = 1.0 / (seconds * t.stages)
    compute = tensor_s + t.expert_activity * even * expert_tensor_s + t.pair_activity * (pair_s + kv_tensor_s)
    memory = dense_s + even * expert_s + kv_s
    return (
        seconds,
        np.minimum(1.0, compute * slower * share),
        np.minimum(1.0, memory * share),
        np.minimum(1.0, (device_s - (1.0 - even) * experts_s - t.comm_s[tokens]) * share),
    )


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
        """A step is one data-parallel rank's; its `tokens` are that rank's, and the other ranks are taken to have as many.

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
        """
        self.shape, self.spec, self.cuda_graphs = shape, spec, cuda_graphs
        self.group = ParallelGroup(
            tensor_parallel, pipeline_parallel, data_parallel, expert_parallel and shape.experts > 0
        )
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
        if batch.tokens >= len(self.tables.memory_s):
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
        usable = self.spec.memory_gb * 1e9 * utilization - RESERVED_BYTES
        if weights >= usable:
            raise ConfigError(
                f"weights need {weights / 1e9:.1f} GB per board, {self.spec.nvml_name} leaves {usable / 1e9:.1f} GB of "
                f"{self.spec.memory_gb:.0f} GB; emulate more boards (--emulate Nx{self.spec.name})"
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
    """Tables of `step_cost`, computed on a grid of token counts and interpolated between."""
    tokens = np.arange(max_tokens + 1)
    grid = _grid(max_tokens)

    def table(values: FloatArray) -> FloatArray:
        return np.interp(tokens, grid, values)

    tp, hbm, peak = group.tensor, spec.hbm_bytes_s, spec.peak_flops_bf16
    some = grid > 0
    activations = grid * shape.layers * shape.hidden * k.token_layer_s / 4096.0 / tp
    memory_s = some * _dense_bytes(shape, k) / tp / (hbm * k.dense_bandwidth) + activations
    dense_flops = _dense_flops(shape, spec, k) / tp
    expert_memory_s, expert_tensor_s, even = _experts(shape, spec, group, k, grid)
    moe, plain = shape.moe_layers, shape.layers - shape.moe_layers
    launch = plain * k.launch_layer_s + moe * k.launch_moe_layer_s
    attention_flops_s = peak * k.attention_tensor * tp
    kv_s = shape.kv_bytes_per_token / min(tp, shape.kv_heads) / (hbm * k.kv_bandwidth)
    windowed = shape.window_layers / shape.layers
    eager = 0.0 if cuda_graphs else 1.0
    return StepTables(
        memory_s=table(memory_s),
        tensor_s=table(grid * dense_flops),
        expert_memory_s=table(expert_memory_s),
        expert_tensor_s=table(expert_tensor_s),
        expert_even=table(even),
        rest_s=table(some * _rest(shape, k)),
        comm_s=table(some * _comm(shape, spec, group, k, grid)),
        launch_s=np.where((tokens > k.capture_tokens) | (eager * tokens > 0), launch, 0.0),
        context_s=kv_s * (1.0 - windowed),
        context_tensor_s=4.0 * shape.layers * shape.decode_width / attention_flops_s * (1.0 - windowed),
        window_s=kv_s * windowed,
        window=float(shape.window),
        pair_s=4.0 * shape.layers * shape.attention_width / attention_flops_s,
        logits_s=2.0 * shape.head_params / (peak * k.dense_tensor * tp),
        host_s=k.host_s,
        host_per_sequence_s=k.host_per_sequence_s,
        issue_share=k.issue_share,
        overlap_p=k.overlap_p,
        top_clock_mhz=float(spec.max_sm_clock_mhz),
        stages=float(group.pipeline),
        expert_activity=k.expert_activity,
        pair_activity=k.attention_tensor / k.dense_tensor,
    )


def _grid(max_tokens: int) -> NDArray[np.int64]:
    """Token counts: all up to 64, then about 4 % apart."""
    wide = np.geomspace(64, max(65, max_tokens), 160).round()
    return np.unique(np.concatenate([np.arange(65), wide])).astype(np.int64)


def _speed(weights: str, spec: BoardSpec, fp8: float) -> float:
    """Of matrix products relative to 16-bit ones: fp8 where the board has it; 4-bit weights are widened first."""
    return fp8 if weights == "fp8" and spec.capability >= (8, 9) else 1.0


def _dense_bytes(shape: ModelShape, k: StepConstants) -> float:
    """Bytes of the weights read on every step, as many as would take as long in 16-bit matrix products."""
    attention = shape.layers * shape.attention_params * _cost_bytes(shape.attention_format, k.narrow_dense_bandwidth)
    ffn = shape.ffn_total * _cost_bytes(shape.ffn_format, k.narrow_dense_bandwidth)
    return attention + ffn + (shape.moe_layers * shape.router_params + shape.head_params) * FORMAT_BYTES["bf16"]


def _rest(shape: ModelShape, k: StepConstants) -> float:
    """Seconds of kernels that follow the clock alone, all layers."""
    seconds = shape.layers * k.layer_s + shape.moe_layers * k.moe_layer_s
    if shape.ffn_format != "bf16":
        seconds += shape.layers * k.narrow_layer_s
    if shape.expert_format != "bf16":
        seconds += shape.moe_layers * k.narrow_moe_layer_s
    return seconds


def _cost_bytes(weights: str, narrow: float) -> float:
    return FORMAT_BYTES[weights] / (1.0 if weights == "bf16" else narrow)


def _dense_flops(shape: ModelShape, spec: BoardSpec, k: StepConstants) -> float:
    """Seconds of one token's dense matrix products on one board, without the output matrix."""
    rate = spec.peak_flops_bf16 * k.dense_tensor
    attention = shape.layers * shape.attention_params / _speed(shape.attention_format, spec, k.fp8_dense)
    ffn = shape.ffn_total / _speed(shape.ffn_format, spec, k.fp8_dense)
    return 2.0 * (attention + ffn + shape.moe_layers * shape.router_params) / rate


def _experts(
    shape: ModelShape, spec: BoardSpec, group: ParallelGroup, k: StepConstants, grid: NDArray[np.int64]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Memory and tensor seconds of the routed experts, all layers, on the hottest rank; and the mean rank's share of that."""
    if not shape.experts:
        return np.zeros(len(grid)), np.zeros(len(grid)), np.ones(len(grid))
    tokens = grid * (group.data if group.expert else 1)
    load = rank_load(shape.experts, shape.top_k, tuple(tokens), group.expert_ranks, k.popularity_cv)
    sliced = 1 if group.expert else group.tensor
    memory_s = shape.moe_layers * load.touched * shape.expert_bytes / sliced / (spec.hbm_bytes_s * k.expert_bandwidth)
    slots = np.array([np.interp(k.expert_block, BLOCKS, row) for row in load.slots])
    rate = spec.peak_flops_bf16 * k.expert_tensor * _speed(shape.expert_format, spec, k.fp8_expert)
    return memory_s, shape.moe_layers * slots * 2.0 * shape.expert_params / sliced / rate, load.even


def _comm(
    shape: ModelShape, spec: BoardSpec, group: ParallelGroup, k: StepConstants, grid: NDArray[np.int64]
) -> FloatArray:
    """Two all-reduces a layer among tensor ranks, two all-to-alls a MoE layer among data ranks, one hop between stages."""
    link_s = spec.nvlink_bytes_s * k.link_bandwidth
    row = grid * shape.hidden * ACTIVATION_BYTES
    total = np.zeros(len(grid))
    if group.tensor > 1:
        once = k.link_latency_s * np.log2(group.tensor) + 2.0 * row * (group.tensor - 1) / group.tensor / link_s
        total += 2 * shape.layers * once
    if group.expert and group.data > 1:
        once = k.link_latency_s * np.log2(group.data) + row * (group.data - 1) / link_s
        total += 2 * shape.moe_layers * once
    return total + (group.pipeline - 1) * (k.link_latency_s + row / link_s)
