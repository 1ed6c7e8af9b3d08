"""Cap and clock sweeps: the split looks at no error, the committed constants are what the fit finds, other rows work too."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pals.core.errors import ConfigError
from pals.experiments.plant_checks import caps
from pals.experiments.plant_checks.measured import data_folder
from pals.experiments.plant_checks.sweep_fit import calibrate, constants, settled
from pals.experiments.plant_checks.sweeps import CLUB, MMBT, Sweep, read_lock_grid, read_sweeps
from pals.plant.specs import board_specs

DATA = data_folder()


def copy_of_data(tmp_path: Path) -> Path:
    for name in (MMBT, CLUB):
        shutil.copytree(DATA / name, tmp_path / name)
    return tmp_path


def keep_rows(path: Path, wanted: list[str]) -> None:
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *(r for r in rows if any(w in r for w in wanted))]) + "\n")


def test_two_rows_calibrate_whatever_they_say() -> None:
    for sweep in read_sweeps(DATA):
        low, high = sweep.setting[sweep.calibration()]

        assert high == sweep.setting.max()
        assert low < sweep.setting.min() + 0.3 * (high - sweep.setting.min())
    dense = next(s for s in read_sweeps(DATA) if s.data == MMBT and s.kind == "dense")
    assert list(dense.setting[dense.calibration()]) == [350.0, 600.0]


def test_the_clock_grid_is_predicted_at_the_top_memory_clock_alone() -> None:
    predicted = [s for s in read_sweeps(DATA) if s.lock]

    assert [s.memory_share for s in predicted] == [1.0]
    assert len(read_lock_grid(DATA)) > 1


@pytest.fixture(scope="module")
def refitted() -> dict[str, dict[str, object]]:
    return dict(caps.fit(DATA))


def test_the_committed_constants_are_what_the_fit_finds(refitted: dict[str, dict[str, object]]) -> None:
    found, committed = refitted["found"], constants()["found"]

    assert found["spread"] == pytest.approx(committed["spread"], rel=0.01)
    for board, values in committed["boards"].items():
        again = found["boards"][board]["silicon"]  # type: ignore[index]
        assert again == pytest.approx(values["silicon"], rel=0.02, abs=0.02)
        assert board_specs()[board].silicon._asdict() == values["silicon"]  # the plant reads that file, not this one
    for key, values in committed["sweeps"].items():
        again = found["sweeps"][key]  # type: ignore[index]
        assert again["calibration"] == values["calibration"]
        assert again["unknowns"] == pytest.approx(values["unknowns"], abs=0.02)


def test_predicted_rows_reach_the_targets_and_no_row_is_counted_twice() -> None:
    rows = {r.check: r for r in caps.predicted_rows(DATA)}
    limits = list(rows.values())

    assert all(r.reached for r in limits if "SM clock" not in r.check)
    assert all(len(r.residuals) == r.cases for r in limits)
    moe = next(
        r for name, r in rows.items() if name.startswith("throughput against limit") and "PRO" in name and "MoE" in name
    )
    assert not {p.x for p in moe.residuals} & {350.0, 600.0}


@pytest.mark.slow
def test_other_choices_of_calibration_rows_are_counted_too() -> None:
    rows = {r.check: r for r in caps.check(DATA)}

    pairs, left_out = rows["throughput, any two settings calibrate"], rows["throughput, all settings but one calibrate"]
    assert pairs.cases > 100
    assert left_out.cases == sum(len(s.setting) for s in read_sweeps(DATA))
    assert left_out.value < pairs.value < pairs.worst  # more rows calibrate better; the worst pair is not hidden
    assert rows["power, boards and sweeps refitted"].cases > len(read_sweeps(DATA))


def test_a_grid_without_other_memory_clocks_keeps_the_voltage_curve(tmp_path: Path) -> None:
    folder = copy_of_data(tmp_path)
    keep_rows(folder / CLUB / "clock_lock_sweep_rtx5090.csv", [",14001,"])

    found = caps.fit(folder)["found"]

    assert found["boards"]["rtx-5090"]["silicon"]["knee_ghz"] == board_specs()["rtx-5090"].silicon.knee_ghz


def test_rows_without_their_calibration_rows_are_predicted_from_the_committed_ones(tmp_path: Path) -> None:
    folder = copy_of_data(tmp_path)
    keep_rows(folder / MMBT / "summary.csv", [",32,450,", ",32,550,"])

    rows = [r for r in caps.predicted_rows(folder) if "PRO" in r.check and r.check.startswith("throughput")]

    assert {p.x for r in rows for p in r.residuals} == {450.0, 550.0}
    assert all(r.value < 10.0 for r in rows)


def test_a_new_sweep_calibrates_on_its_own_rows_and_an_unknown_board_is_named(tmp_path: Path) -> None:
    folder = copy_of_data(tmp_path)
    path = folder / CLUB / "power_cap_sweeps.csv"
    text = path.read_text()
    rows = [line for line in text.splitlines() if line.startswith("3090_moe_decode,")]
    new = [line.replace("3090_moe_decode", "3090_other_decode") for line in rows[::3]]
    strange = [line.replace("3090_moe_decode", "x").replace("RTX 3090", "RTX 9999") for line in rows[::3]]
    path.write_text(text + "\n".join([*new, *strange]) + "\n")

    found = caps.predicted_rows(folder)

    points = [p for r in found for p in r.residuals if "other" in p.group and r.check.startswith("throughput")]
    assert len(points) == len(new) - 2
    assert np.abs([p.error_pct for p in points]).mean() < 5.0
    assert any("RTX 9999" in r.note for r in found)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"summary\.csv"):
        caps.check(tmp_path)


def test_calibration_finds_the_work_that_made_the_rows() -> None:
    measured = next(s for s in read_sweeps(DATA) if s.board == "rtx-3090" and s.phase == "prefill")
    k, truth = board_specs()["rtx-3090"].silicon, np.array([np.log(1 / 1000.0), 0.6, 0.45])
    every = np.arange(len(measured.setting))
    says = settled(measured, every, k, truth, spread=0.0, top_mhz=2100.0)
    made = Sweep(**{
        **{name: getattr(measured, name) for name in Sweep.__slots__},
        "tokens_s": 1.0 / says.step_s, "draw_w": says.power_w, "clock_mhz": says.clock_mhz,
    })  # fmt: skip

    pairs = np.array([[3, 20], [0, 10]])
    found = calibrate(made, pairs, k, spread=0.0, top_mhz=2100.0)

    assert np.abs(found.T - truth).max() < 0.05
