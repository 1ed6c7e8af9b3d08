"""Which boards the agent opens for an engine: those it names, in an order both sides share, or none at all."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pals.cli.agent import open_boards_of
from pals.core.errors import ConfigError, DeviceLostError
from pals.hardware.nvml import Nvml
from tests.worlds import board_info, engine_info


def nvml_of(*names: str, lost: int | None = None) -> Nvml:
    def open_one(index: int) -> Any:
        if index == lost:
            raise DeviceLostError(f"GPU-{index}: lost")
        return SimpleNamespace(info=replace(board_info(index), name=names[index]))

    return Nvml(open_one, len(names), may_write=False, close=lambda: None)


def opened(nvml: Nvml, *, boards: tuple[int, ...], cuda_order: bool) -> list[int]:
    engine = replace(engine_info(), boards=boards, cuda_order=cuda_order)
    return [b.info.index for b in open_boards_of(engine, nvml)]


def test_where_all_boards_are_of_one_kind_the_order_of_cuda_is_nvmls() -> None:
    assert opened(nvml_of("A100", "A100", "A100"), boards=(2, 0), cuda_order=True) == [2, 0]
    assert opened(nvml_of("A100", "A100", "A100", lost=1), boards=(2, 0), cuda_order=True) == [2, 0]


def test_on_a_mixed_node_the_order_must_be_nvmls() -> None:
    mixed = nvml_of("A100", "H100", lost=None)

    with pytest.raises(ConfigError, match=r"several kinds \(A100, H100\).*CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        opened(mixed, boards=(0,), cuda_order=True)
    assert opened(mixed, boards=(0,), cuda_order=False) == [0]


def test_an_engine_that_names_no_boards_is_refused() -> None:
    with pytest.raises(ConfigError, match="PALS will not guess"):
        opened(nvml_of("A100"), boards=(), cuda_order=False)
