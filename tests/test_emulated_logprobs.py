"""Log-probabilities on emulated boards: one certain token a step, and a clear refusal of what nothing computes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.scheduler_harness import Driver, engine_config, make_scheduler, request

from pals.core.architecture import ModelShape
from pals.engines.emulated_device import BookedStep, EmulatedDevice
from pals.plant.boards import BoardBank
from pals.plant.llm_step import StepModel
from pals.plant.specs import board_specs

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_requests_that_ask_get_each_token_with_probability_one_and_the_others_nothing(
    olmoe: Path, tmp_path: Path
) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from pals.engines.emulated_executor import model_output

    board = board_specs()["h100-sxm5-80gb"]
    shape = ModelShape.from_config(json.loads((olmoe / "config.json").read_text()))
    device = EmulatedDevice(
        StepModel(shape, board, tensor_parallel=1), BoardBank.create(tmp_path / "bank", board, 1), (0,),
        canned=list(range(100, 1100)), eos=None, environ={},
    )  # fmt: skip
    told: dict[str, list[Any]] = {"asks": [], "does-not": []}

    class Kept(AsyncScheduler):  # type: ignore[misc]
        def update_from_output(self, *args: Any) -> Any:
            result = super().update_from_output(*args)
            for out in (o for client in result.values() for o in client.outputs):
                told[out.request_id].append((list(out.new_token_ids), out.new_logprobs))
            return result

    driver = Driver(
        make_scheduler(Kept, engine_config(olmoe, max_num_seqs=8)), lambda output: model_output(device.launch(output))
    )
    for rid in told:
        driver.add(request(rid, prompt=9, output=5))
    driver.scheduler.requests["asks"].sampling_params.logprobs = 3
    driver.drain()

    assert [row for _, row in told["does-not"]] == [None] * 5
    for tokens, row in told["asks"]:
        assert row.logprob_token_ids.tolist() == [tokens]
        assert (row.logprobs.tolist(), row.sampled_token_ranks.tolist()) == ([[0.0]], [1])


def test_a_step_without_a_sampled_token_still_has_its_row() -> None:
    from pals.engines.emulated_executor import certain

    step = BookedStep(start_s=0.0, end_s=1.0, req_ids=["a", "b"], sampled=[[], [7]], logprobs=True)

    assert certain(step).slice_request(1, 1).logprob_token_ids.tolist() == [[7]]
    assert certain(step).slice_request(0, 0).logprobs.tolist() == []


@pytest.mark.parametrize("name", ["prompt_logprobs", "logprob_token_ids"])
def test_what_no_model_computes_is_refused_as_the_requests_own_fault(name: str) -> None:
    from pals.engines.emulated_platform import EmulatedPlatform, refusal

    EmulatedPlatform.validate_request({}, SimpleNamespace(logprobs=5))
    with pytest.raises(refusal(), match=f"{name} is not there on emulated boards"):
        EmulatedPlatform.validate_request({}, SimpleNamespace(**{name: [1]}))
