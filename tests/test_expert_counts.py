"""Counting in the worker, against small routers and workers with vLLM's interface; the real ones are in tests/cpu_engine.

What needs a GPU in vLLM (returned routed experts, expert load balancing, expert and data parallelism, padding) is played here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from pals.engines import expert_counts  # noqa: E402
from pals.engines.expert_counts import ExpertCounter, WorkerExperts, listen, rows_of_rank, whole, why_not  # noqa: E402


class Router:
    """As vLLM's: captures logical ids, then maps them to physical ones where a balancer moved experts."""

    def __init__(self, physical: Any = None) -> None:
        self.capture_fn: Callable[[Any], None] | None = None
        self.physical, self.load = physical, np.zeros(16, np.int64)

    def set_capture_fn(self, capture_fn: Callable[[Any], None] | None) -> None:
        self.capture_fn = capture_fn

    def select_experts(self, chosen: Any) -> Any:
        if self.capture_fn is not None:
            self.capture_fn(chosen)
        if self.physical is not None:
            chosen = self.physical[chosen.long()]
            self.load += np.bincount(chosen.numpy().ravel(), minlength=16)
        return chosen


def counter(layers: int = 1, experts: int = 8) -> ExpertCounter:
    return ExpertCounter(layers=layers, experts=experts, top_k=2, most_tokens=64, device="cpu")


def step(count: ExpertCounter, router: Router, chosen: Any, tokens: int | None = None) -> Any:
    tokens = len(chosen) if tokens is None else tokens
    count.begin(tokens)
    result = router.select_experts(chosen)
    count.end(tokens)
    return result


def choices(tokens: int, experts: int = 8, seed: int = 0, dtype: Any = torch.int32) -> Any:
    """`tokens` tokens' two different experts each."""
    drawn = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(2).indices
    return drawn.to(dtype)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint32])
def test_counts_and_experts_touched_are_exact_and_the_routing_is_left_as_it_was(dtype: Any) -> None:
    count, router = counter(), Router()
    listen(router, count.capture(0, whole))
    steps = [choices(n, seed=n, dtype=dtype) for n in (1, 5, 64, 3)]
    for chosen in steps:
        before = chosen.clone()
        assert torch.equal(step(count, router, chosen).long(), before.long())
    every = np.concatenate([c.long().numpy().ravel() for c in steps])
    assert count.sums[0, :8].tolist() == np.bincount(every, minlength=8).tolist()
    assert int(count.sums[0, 8]) == sum(len(np.unique(c.long().numpy())) for c in steps)
    assert (count.steps, count.tokens) == (4, 73)


def test_warm_up_dummy_batches_and_padding_are_not_counted() -> None:
    count, router = counter(), Router()
    listen(router, count.capture(0, whole))
    router.select_experts(choices(64))  # warm-up
    step(count, router, choices(16, seed=1), tokens=11)  # a graph of 16 rows, 11 of them real
    router.select_experts(choices(64))  # a dummy batch between steps
    step(count, router, choices(8, seed=2), tokens=3)
    real = np.concatenate([choices(16, seed=1)[:11].numpy().ravel(), choices(8, seed=2)[:3].numpy().ravel()])
    assert count.sums[0, :8].tolist() == np.bincount(real, minlength=8).tolist()


def test_ids_that_name_no_expert_fall_outside_and_harm_nothing() -> None:
    count, router = counter(), Router()
    listen(router, count.capture(0, whole))
    step(count, router, torch.tensor([[-1, 3], [8, 15]], dtype=torch.int32))
    assert count.sums[0, :8].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_vllms_own_capture_is_called_too_whoever_comes_first(first: str) -> None:
    count, router, theirs = counter(), Router(), list[Any]()
    if first == "theirs":
        router.set_capture_fn(theirs.append)
    listen(router, count.capture(0, whole))
    if first == "ours":
        router.set_capture_fn(theirs.append)
    step(count, router, choices(4))
    assert len(theirs) == 1
    router.set_capture_fn(None)  # they stop; we do not
    step(count, router, choices(4))
    assert (len(theirs), int(count.sums[0, :8].sum())) == (1, 16)


def test_a_balancer_that_moves_experts_keeps_its_own_count_and_ours_stays_logical() -> None:
    count, router = counter(), Router(physical=torch.arange(8) + 8)
    listen(router, count.capture(0, whole))
    step(count, router, choices(20))
    assert router.load[8:].tolist() == count.sums[0, :8].tolist()


def test_of_gathered_tokens_a_data_parallel_rank_counts_its_own() -> None:
    chosen = choices(9)
    assert torch.equal(rows_of_rank(chosen, [2, 4, 3], 1), chosen[2:6])
    assert torch.equal(rows_of_rank(chosen, [5, 9, 7], 1), chosen)
    assert rows_of_rank(chosen, [5, 4, 7], 1) is None


def parallel(**more: Any) -> Any:
    given = {
        "use_ubatching": False, "tensor_parallel_size": 1, "enable_expert_parallel": False, "data_parallel_size": 1,
        "data_parallel_rank": 0, "enable_eplb": False, "distributed_executor_backend": "uni",
    }  # fmt: skip
    return SimpleNamespace(**given | more)


def test_the_first_of_a_tensor_parallel_group_counts_and_all_ranks_of_an_expert_parallel_one() -> None:
    assert [why_not(parallel(tensor_parallel_size=2), r) is None for r in range(4)] == [True, False, True, False]
    assert why_not(parallel(tensor_parallel_size=2, enable_expert_parallel=True), 1) is None
    assert "micro-batches" in (why_not(parallel(use_ubatching=True), 0) or "")
    assert "spread over ranks" in (why_not(parallel(use_sequence_parallel_moe=True), 0) or "")


def config() -> Any:
    return SimpleNamespace(
        parallel_config=parallel(), device_config=SimpleNamespace(device="cpu"), additional_config={},
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 2),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=32),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[64]),
    )  # fmt: skip


class Runner:
    """As vLLM's MoE layer, in what is used of it."""

    def __init__(self, name: str, *, experts: int = 8, monolithic: bool = False) -> None:
        self.layer_name, self.router, self.is_monolithic = name, Router(), monolithic
        self.moe_config = SimpleNamespace(num_experts=experts, experts_per_token=2)


class Worker:
    """As vLLM's worker wrapper: makes its layers after its device, then takes steps."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.vllm_config, self.worker, self.layers = config(), SimpleNamespace(rank=0), list[Runner]()
        self.breaks = breaks

    def init_device(self) -> None: ...

    def execute_model(self, scheduler_output: Any) -> str:
        for runner in self.layers:
            if not runner.is_monolithic:
                runner.router.select_experts(choices(scheduler_output.rows))
        if self.breaks:
            raise RuntimeError("vLLM's own")
        return "tokens"

    def shutdown(self) -> str:
        return "ended"


def test_a_worker_publishes_at_most_twice_a_second_and_its_memory_is_fixed(tmp_path: Path) -> None:
    now_s = 10.0
    worker = WorkerExperts(config(), 0, clock=lambda: now_s, folder=tmp_path)
    layers = [Runner("a"), Runner("b", monolithic=True), Runner("draft")]
    for runner in layers:
        worker.adopt(runner)
    from pals.runtime.expert_channel import read_worker

    told = []
    for tokens in (4, 4, 4, 4):
        worker.begin(tokens)
        layers[0].router.select_experts(choices(tokens))
        worker.end(tokens)
        told.append(read_worker(next(tmp_path.glob("*.experts"))).counts)
        now_s += 0.2
    assert [t.tokens for t in told if t is not None] == [4, 4, 4, 16]
    last = told[-1]
    assert last is not None
    assert (last.layers, last.bypassed, last.known.tolist()) == (("a", "b"), ("b",), [True, False])
    worker.close()
    assert list(tmp_path.glob("*.experts")) == []


def test_the_wrapped_worker_serves_on_when_counting_fails() -> None:
    wrapped = type("Wrapped", (Worker,), dict(zip(
        ("init_device", "execute_model", "shutdown"),
        expert_counts._wrapped(Worker.init_device, Worker.execute_model, Worker.shutdown), strict=True,
    )))  # fmt: skip
    worker = wrapped()
    output = SimpleNamespace(total_num_scheduled_tokens=4, rows=4)
    assert worker.execute_model(output) == "tokens"  # nothing to count
    worker._pals_experts = SimpleNamespace(begin=lambda tokens: 1 // 0, end=lambda tokens: None, close=lambda: None)
    assert worker.execute_model(output) == "tokens"
    assert "_pals_experts" not in vars(worker)
    assert worker.shutdown() == "ended"
    with pytest.raises(RuntimeError, match="vLLM's own"):
        wrapped(breaks=True).execute_model(output)


def test_off_unless_asked_for() -> None:
    assert not expert_counts.wanted({})
    assert not expert_counts.wanted({"PALS_EXPERTS": "yes"})
    assert expert_counts.wanted({"PALS_EXPERTS": "1"})
