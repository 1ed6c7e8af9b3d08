"""The tests' environment: vLLM on the emulated accelerator, its channels in a folder of their own."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.emulated_node import EmulatedNode

# The same examples every time, and no judgement of how fast a shared machine is; HYPOTHESIS_PROFILE=explore looks further.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

_RUN_DIR = tempfile.mkdtemp(prefix="pals-tests-")
atexit.register(shutil.rmtree, _RUN_DIR, ignore_errors=True)
os.environ.update(
    PALS_EMU="1", PALS_RUN_DIR=_RUN_DIR, VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="WARNING",
)  # fmt: skip
for _name in ("PALS_EMU_BOARDS", "PALS_EMU_STEP_S", "PALS_PLUGIN", "VLLM_PLUGINS"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small MoE, built here."""
    pytest.importorskip("tokenizers")
    from pals.engines.model_zoo import local_folder

    return local_folder("OLMoE-1B-7B", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def nvml_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the C library of the emulated boards is built, once."""
    return tmp_path_factory.mktemp("nvml")


@pytest.fixture
def node(nvml_cache: Path) -> Iterator[EmulatedNode]:
    """Two emulated boards, for a capd of their own; a test file may have nodes of another kind."""
    from tests.emulated_node import emulated_node

    with emulated_node(nvml_cache) as made:
        yield made


@pytest.fixture
def hangups_arrive() -> Iterator[None]:
    """SIGHUP asks this process and its children to stop, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
