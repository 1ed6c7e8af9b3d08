"""The DCGM view: dcgm-exporter's names, units and labels, from tick records alone; what is unknown is absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pals.core.quantities import Slo
from pals.plant.boards import BoardBank
from pals.plant.specs import board_specs
from pals.runtime.budgets import BudgetSchedule
from pals.runtime.channel import EngineChannel
from pals.runtime.tick import TickRecord
from pals.views.dcgm import FIELDS, DcgmCollector, dcgm_text, serve_dcgm
from tests.loopback import free_port
from tests.test_tick import go, rig
from tests.worlds import Board, Clock, Engine, board_info, engine_info


def records(boards: int = 2) -> list[TickRecord]:
    clock = Clock(until_s=103.0)
    return go(rig(clock, [Board(clock, i) for i in range(boards)], Engine(clock)), clock, BudgetSchedule(), Slo())


def with_board(record: TickRecord, **changes: Any) -> TickRecord:
    """`record` with a change to the first board's reading."""
    first, *rest = record.sample.boards
    return replace(record, sample=replace(record.sample, boards=(replace(first, **changes), *rest)))


def shown(collector: DcgmCollector) -> dict[tuple[str, str], float]:
    """Values by (metric, board); the parser itself gives every counter a `_total`."""
    families = text_string_to_metric_families(dcgm_text(collector).decode())
    return {(s.name.removesuffix("_total"), s.labels["gpu"]): s.value for f in families for s in f.samples}


def observed(*, emulated: bool = False, **changes: Any) -> DcgmCollector:
    collector = DcgmCollector(emulated=emulated, hostname="node7")
    engine = collector.engine([board_info(0), board_info(1)])
    for record in records():
        engine.observe(with_board(record, **changes))
    return collector


def test_units_are_those_of_dcgm_exporter() -> None:
    made = records()
    values = shown(observed(temperature_c=61.0, memory_clock_mhz=2619, busy_ratio=0.75))

    assert values["DCGM_FI_DEV_POWER_USAGE", "0"] == 320.0
    assert values["DCGM_FI_DEV_POWER_MGMT_LIMIT", "1"] == 400.0
    assert (
        values["DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "1"] == (made[-1].sample.boards[1].energy_j or 0.0) * 1000.0 > 0
    )
    assert values["DCGM_FI_DEV_SM_CLOCK", "0"] == 1410.0
    assert values["DCGM_FI_DEV_MEM_CLOCK", "0"] == 2619.0
    assert values["DCGM_FI_DEV_GPU_TEMP", "0"] == 61.0
    assert values["DCGM_FI_DEV_GPU_UTIL", "0"] == 75.0


def test_what_a_board_does_not_report_is_absent_and_never_zero() -> None:
    names = {name for name, board in shown(observed(temperature_c=61.0)) if board == "1"}

    assert names == {f.name for f in FIELDS} - {"DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_MEM_CLOCK", "DCGM_FI_DEV_GPU_UTIL"}


def test_the_page_has_the_exporters_types_and_labels() -> None:
    page = dcgm_text(observed()).decode()

    assert "# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter\nDCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{" in page
    assert "# TYPE DCGM_FI_DEV_POWER_USAGE gauge\n" in page
    assert "untyped" not in page
    (power, _) = (line for line in page.splitlines() if line.startswith("DCGM_FI_DEV_POWER_USAGE{"))
    for label in (
        'gpu="0"', 'UUID="GPU-0"', 'device="nvidia0"', 'modelName="Test board"', 'Hostname="node7"',
        'DCGM_FI_DRIVER_VERSION="1.0"',
    ):  # fmt: skip
        assert label in power


def test_emulated_boards_say_so_where_reports_name_the_model() -> None:
    assert 'modelName="Test board (EMULATED)"' in dcgm_text(observed(emulated=True)).decode()


def test_a_lost_board_is_absent_and_the_others_keep_their_names() -> None:
    collector = observed()
    others = collector.engine([board_info(2)])
    others.observe(records(1)[-1])
    assert {board for _, board in shown(collector)} == {"0", "1", "2"}

    lost = records()[-1]
    collector.engine([board_info(0), board_info(1)]).observe(
        replace(
            lost,
            sample=replace(lost.sample, boards=lost.sample.boards[1:], absent=(0,)),
            enforced_limits_w=lost.enforced_limits_w[1:],
        )
    )

    assert {board for _, board in shown(collector)} == {"1", "2"}
    others.close()
    collector.engine([board_info(0), board_info(1)]).close()
    assert shown(collector) == {}


def test_the_docs_name_every_metric() -> None:
    docs = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")

    for field in FIELDS:
        assert f"| `{field.name}` | {field.kind} |" in docs


def test_nothing_is_shown_before_the_first_record() -> None:
    assert dcgm_text(DcgmCollector(emulated=False)) == b""


def test_the_endpoint_answers_as_the_exporter_does() -> None:
    port = free_port()
    stop = serve_dcgm(observed(), port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert b"DCGM_FI_DEV_POWER_USAGE" in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/elsewhere", timeout=5)
    finally:
        stop()


def page_at(port: int) -> str:
    """The agent's page, once it is there; at most ten seconds."""
    end_s = time.monotonic() + 10.0
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                if text := answer.read().decode():
                    return str(text)
        except OSError:
            if time.monotonic() > end_s:
                raise
        time.sleep(0.05)


def test_the_agent_shows_its_engines_boards_until_it_ends(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    bank = BoardBank.create(tmp_path / "emulated-boards.bank", board_specs()["a100-sxm4-80gb"], 2)
    EngineChannel(tmp_path, replace(engine_info(os.getpid()), boards=(1,), bank=str(bank.path)), name="engine")
    port = free_port()
    command = [sys.executable, "-m", "pals.cli", "agent", "--metrics-port", "0", "--dcgm-port", str(port)]
    with subprocess.Popen(
        command, env={**os.environ, "PALS_RUN_DIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    ) as agent:
        try:
            page = page_at(port)
            second = subprocess.run(
                [*command, "--mode", "advise"], env={**os.environ, "PALS_RUN_DIR": str(tmp_path)},
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
        finally:
            agent.send_signal(signal.SIGINT)
            _, said = agent.communicate(timeout=30)
    bank.close()

    assert agent.returncode == 0, said
    assert 'gpu="1"' in page
    assert 'gpu="0"' not in page
    assert 'modelName="NVIDIA A100-SXM4-80GB (EMULATED)"' in page
    assert "DCGM_FI_DEV_MEM_CLOCK{" in page
    assert (second.returncode, f"DCGM port {port} is in use" in second.stderr) == (2, True)
    assert "--dcgm-port" in second.stderr
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
