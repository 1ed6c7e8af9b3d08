"""In the real vLLM, whose MoE layers compute here: every real token is counted once for each expert that it chose, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cpu_engine.tiny_models import SHAPES

pytestmark = pytest.mark.cpu_engine

#: What `drive` sends: prompts of 138 tokens, and of each of the 6 answers all tokens but the last, which is not read again.
TOKENS = 138 + 6 * 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, vLLM's compile cache and the run directory of this file's engines."""
    return tmp_path_factory.mktemp("cpu-engine")


def drive(folder: Path, mode: str) -> Any:
    """What `drive` prints, from a process of its own; "compiled" switches counting on itself, after an engine without."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PALS_", "VLLM_"))} | {
        "PALS_EXPERTS": "0" if mode == "compiled" else "1", "PALS_RUN_DIR": str(folder / "run"),
        "VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if mode == "served" else "0",
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.cpu_engine.drive", mode, str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@pytest.fixture(scope="module")
def eager(folder: Path) -> Any:
    """What each model counted, run as it is written."""
    return drive(folder, "eager")


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Any:
    """What each model counted compiled, and "off": what the first gave before that, without counting."""
    return drive(folder, "compiled")


@pytest.mark.parametrize("model", list(SHAPES))
def test_each_layer_counts_every_token_for_each_expert_it_chose(eager: Any, model: str) -> None:
    result, (layers, top_k) = eager[model], SHAPES[model]

    assert result["before"] == 0
    assert (result["layers"], result["tokens"]) == (layers, TOKENS)
    assert [sum(row[:-1]) for row in result["sums"]] == [TOKENS * top_k] * layers
    # Expert for expert, and experts touched step for step, as a second listener at the same routers saw them.
    assert result["sums"] == result["witnessed"]


@pytest.mark.parametrize("model", list(SHAPES))
def test_compiled_counts_are_as_exact(compiled: Any, model: str) -> None:
    result, (layers, top_k) = compiled[model], SHAPES[model]

    assert (result["before"], result["warm_up"], result["tokens"]) == (0, 0, TOKENS)
    assert [sum(row[:-1]) for row in result["sums"]] == [TOKENS * top_k] * layers


def test_counting_is_absent_when_off_and_its_code_has_another_name_when_on(compiled: Any) -> None:
    off, on = compiled["off"], compiled["qwen3-moe"]

    assert (off["installed"], off["imported"]) == (False, False)
    # The name that vLLM's compile cache goes by: under the same, code without counting could be taken from it.
    assert on["compiled_as"] != off["compiled_as"]
    assert on["outputs"] == off["outputs"]


def test_an_agent_reads_a_living_engines_counts_and_its_end_removes_them(folder: Path) -> None:
    result = drive(folder, "served")

    assert (result["engines"], result["files"], result["files_after"]) == (1, 1, 0)
    assert result["tokens"] > TOKENS
    assert result["chosen"] == [2 * result["tokens"]] * 2
    assert 1.0 <= result["distinct"] <= 8.0
    assert 0.0 <= result["age_s"] < 60.0
    assert result["unknown"]["hottest_rank_over_mean"] == "every rank holds all experts"
