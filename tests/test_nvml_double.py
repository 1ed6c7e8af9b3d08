"""The C library over emulated boards: the same answers as the Python double, and unmodified tools that see them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pals.core.errors import ConfigError
from pals.hardware.emulated_nvml import EmulatedNvml
from pals.hardware.nvml_double.build import SONAME, all_sources, entry_points, library
from pals.plant.bank_layout import STALE_S
from pals.plant.boards import BoardBank
from pals.plant.keeper import kept_fresh
from pals.plant.silicon import Load
from pals.plant.specs import board_specs
from tests.nvml_calls import play

pynvml = pytest.importorskip("pynvml")
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
A100 = board_specs()["a100-sxm4-80gb"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the library, built here."""
    return library(tmp_path_factory.mktemp("nvml"), os.environ)


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[BoardBank]:
    """Two A100 in virtual time, busy from 10 to 60 s, seen at 20 s; this process drives the time."""
    made = BoardBank.create(tmp_path / "bank", A100, 2, seed=5, now_s=10.0)
    made.set_virtual_time(10.0)
    made.book([0, 1], 10.0, 60.0, Load(compute=0.5, memory=0.6), 10.0)
    made.register_process(os.getpid(), [1], 30 * 2**30)
    made.set_virtual_time(20.0)
    yield made
    made.close()


def seen_from(lib: Path, bank_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program that finds the library and the boards as any tool would."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")}
    environ |= {"LD_LIBRARY_PATH": str(lib), "PALS_EMU_BOARDS": str(bank_path), "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)


def python_from(lib: Path, bank_path: Path, code: str) -> dict[str, object]:
    """Run Python code that prints one JSON object."""
    done = seen_from(lib, bank_path, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def through_the_double(bank: BoardBank) -> tuple[list[list[object]], set[str]]:
    """The script of calls through the Python double; also which functions were called."""
    pynvml._nvmlGetFunctionPointer_cache.clear()
    before, pynvml.nvmlLib = pynvml.nvmlLib, EmulatedNvml(bank, time.monotonic)
    try:
        pynvml.nvmlInit()
        told = play(bank)
        called = set(pynvml._nvmlGetFunctionPointer_cache)
        pynvml.nvmlShutdown()
        return told, called
    finally:
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml.nvmlLib = before


@pytest.mark.parametrize("writable", [True, False])
def test_both_doubles_give_the_same_values_and_error_codes(lib: Path, tmp_path: Path, writable: bool) -> None:
    paths = [tmp_path / "python.bank", tmp_path / "c.bank"]
    banks = [BoardBank.create(p, A100, 2, seed=3, writable=writable, now_s=10.0) for p in paths]
    banks[0].set_virtual_time(10.0)

    wanted, called = through_the_double(banks[0])
    done = seen_from(lib, paths[1], sys.executable, "-m", "tests.nvml_calls", str(paths[1]))

    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    different = [(w, g) for w, g in zip(wanted, got, strict=True) if json.loads(json.dumps(w)) != g]
    assert different == []
    offered = {name for name in vars(EmulatedNvml) if name.startswith("nvml")} - {"nvmlInit_v2", "nvmlShutdown"}
    assert offered <= called  # nothing the double answers was left out
    errors = {str(answer) for _, answer in got if str(answer).startswith("error")}
    assert errors >= {"error 2", "error 3", "error 4", "error 6", "error 15"}
    for each in banks:
        each.close()


def test_the_library_offers_every_name_of_nvidia_ml_py_and_admits_what_it_lacks(lib: Path, bank: BoardBank) -> None:
    code = f"""
import ctypes, json
lib = ctypes.CDLL("{SONAME}")
missing = [name for name in {entry_points()!r} if not hasattr(lib, name)]
print(json.dumps({{"missing": missing, "nvlink": lib.nvmlDeviceGetNvLinkState(1, 0), "early": lib.nvmlDeviceGetCount_v2(None)}}))
"""
    assert python_from(lib, bank.path, code) == {"missing": [], "nvlink": 3, "early": 1}


def test_limits_and_locks_written_in_c_act_on_the_physics(lib: Path, bank: BoardBank) -> None:
    free_w = bank.reading(0, 0.0).power_instant_w
    code = """
import json, pynvml as n
n.nvmlInit()
first, second = (n.nvmlDeviceGetHandleByIndex(i) for i in range(2))
n.nvmlDeviceSetPowerManagementLimit(first, 150_000)
n.nvmlDeviceSetGpuLockedClocks(second, 210, 905)
print(json.dumps({"limit": n.nvmlDeviceGetEnforcedPowerLimit(first)}))
"""
    assert python_from(lib, bank.path, code) == {"limit": 150_000}

    bank.set_virtual_time(25.0)
    assert free_w > 200
    assert bank.reading(0, 0.0).power_instant_w == pytest.approx(150, abs=3)
    assert bank.reading(1, 0.0).sm_clock_mhz == 900


def test_gpustat_prints_the_boards(lib: Path, bank: BoardBank) -> None:
    pytest.importorskip("gpustat")
    done = seen_from(lib, bank.path, sys.executable, "-m", "gpustat", "--json")

    boards = json.loads(done.stdout)["gpus"]
    assert [b["name"] for b in boards] == ["NVIDIA A100-SXM4-80GB"] * 2
    assert [b["uuid"] for b in boards] == [bank.uuid(0), bank.uuid(1)]
    for i, board in enumerate(boards):
        reading = bank.reading(i, 0.0)
        assert board["power.draw"] == int(reading.power_avg_w)
        assert board["enforced.power.limit"] == 400
        assert board["temperature.gpu"] == round(reading.temperature_c)
        assert (board["utilization.gpu"], board["memory.total"]) == (100, 81920)
    assert [b["memory.used"] for b in boards] == [0, 30 * 1024]
    assert [[p["pid"] for p in b["processes"]] for b in boards] == [[], [os.getpid()]]


def test_gpustat_shows_a_lost_board_as_lost_and_the_other_as_it_is(lib: Path, bank: BoardBank) -> None:
    pytest.importorskip("gpustat")
    bank.inject(0, "lost", 1, 0.0)

    lines = seen_from(lib, bank.path, sys.executable, "-m", "gpustat", "--no-color").stdout.splitlines()

    assert "GPU is lost" in lines[1]
    assert "81920 MB" in lines[2]


def test_nvitop_reads_the_boards_and_prints_its_table(lib: Path, bank: BoardBank) -> None:
    pytest.importorskip("nvitop")
    code = """
import json, nvitop
d = nvitop.Device(1)
print(json.dumps({
    "power": d.power_usage(), "limit": d.power_limit(), "energy": d.total_energy_consumption(), "clock": d.sm_clock(),
    "top": d.max_sm_clock(), "memory": d.memory_used(), "busy": d.gpu_utilization(), "hbm": d.memory_utilization(),
    "capability": d.cuda_compute_capability(), "by uuid": nvitop.Device(uuid=d.uuid()).index,
    "processes": [[pid, p.gpu_memory(), p.gpu_sm_utilization()] for pid, p in d.processes().items()],
}))
"""
    reading = bank.reading(1, 0.0)
    assert python_from(lib, bank.path, code) == {
        "power": round(reading.power_avg_w * 1000), "limit": 400_000, "energy": round(reading.energy_j * 1000),
        "clock": reading.sm_clock_mhz, "top": 1410, "memory": 30 * 2**30, "busy": 100, "hbm": 60,
        "capability": [8, 0], "by uuid": 1, "processes": [[os.getpid(), 30 * 2**30, 100]],
    }  # fmt: skip

    table = seen_from(lib, bank.path, sys.executable, "-m", "nvitop", "-1", "--ascii").stdout
    assert f"{reading.power_avg_w:.0f}W / 400W" in table
    assert " 0B / 80.00GiB" in table
    assert "30.00GiB / 80.00GiB" in table
    assert f" {os.getpid()} " in table


ZEUS = """
import json, sys
from pathlib import Path
from zeus.device import get_gpus
from zeus.device.gpu.common import ZeusGPUInvalidArgError, ZeusGPUNoPermissionError, ZeusGPUNotSupportedError
from zeus.monitor import ZeusMonitor
from pals.plant.boards import BoardBank
bank = BoardBank.open(Path(sys.argv[1]))
bank.set_virtual_time(20.0)
gpus, monitor, told = get_gpus(), ZeusMonitor(cpu_indices=[]), {}
monitor.begin_window("w", sync_execution=False)
bank.set_virtual_time(50.0)
told["window"] = list(monitor.end_window("w", sync_execution=False).gpu_energy.values())
told["instant"] = gpus.get_instant_power_usage(0)
told["clocks"] = gpus.get_supported_graphics_clocks(0, gpus.get_supported_memory_clocks(0)[0])
for name, change in {
    "limit": lambda: gpus.set_power_management_limit(0, 200_000), "lock": lambda: gpus.set_gpu_locked_clocks(1, 210, 900),
    "low": lambda: gpus.set_power_management_limit(0, 20_000), "hbm": lambda: gpus.set_memory_locked_clocks(0, 1593, 1593),
}.items():
    try:
        told[name] = change()
    except (ZeusGPUInvalidArgError, ZeusGPUNoPermissionError, ZeusGPUNotSupportedError) as e:
        told[name] = type(e).__name__
bank.set_virtual_time(52.0)
told["after"] = [gpus.get_instant_power_usage(0), gpus.get_power_management_limit(0), bank.reading(1, 0.0).sm_clock_mhz]
gpus.reset_power_management_limit(0) if told["limit"] is None else None
told["reset"] = gpus.get_power_management_limit(0)
print(json.dumps(told))
"""


@pytest.mark.parametrize("writable", [True, False])
def test_zeus_measures_a_window_and_sets_limits_and_locks(lib: Path, tmp_path: Path, writable: bool) -> None:
    pytest.importorskip("zeus.monitor")
    bank = BoardBank.create(tmp_path / "bank", A100, 2, seed=5, writable=writable, now_s=10.0)
    bank.book([0, 1], 10.0, 60.0, Load(compute=0.5, memory=0.6), 10.0)
    before_j = [bank.reading(i, 20.0).energy_j for i in range(2)]

    done = seen_from(lib, bank.path, sys.executable, "-c", ZEUS, str(bank.path))

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    mean_w = np.array(told["window"]) / 30.0
    assert mean_w == pytest.approx([told["instant"] / 1000.0] * 2, rel=0.1)
    assert min(before_j) > 0
    assert (told["clocks"][0], told["clocks"][-1], len(told["clocks"])) == (1410, 210, 81)
    refused = "ZeusGPUNoPermissionError"
    assert [told[k] for k in ("limit", "lock")] == ([None, None] if writable else [refused, refused])
    assert told["low"] == ("ZeusGPUInvalidArgError" if writable else refused)
    assert told["hbm"] == "ZeusGPUNotSupportedError"
    power_mw, limit_mw, clock_mhz = told["after"]
    if writable:
        assert power_mw == pytest.approx(200_000, rel=0.02)
        assert (limit_mw, clock_mhz) == (200_000, 900)
    else:
        assert (limit_mw, clock_mhz) == (400_000, 1410)
    assert told["reset"] == 400_000
    bank.close()


STALE = """
import json, sys, time, pynvml as n
from pathlib import Path
from pals.plant.boards import BoardBank
from pals.plant.specs import board_specs
path = Path(sys.argv[1])
bank = BoardBank.open(path)
bank.refresh(time.monotonic())
n.nvmlInit()
handle = n.nvmlDeviceGetHandleByIndex(0)
def ask(function, *args):
    try:
        return function(handle, *args) or "done"
    except n.NVMLError as e:
        return e.value
told = [ask(n.nvmlDeviceGetName)]
bank.refresh(time.monotonic() - float(sys.argv[2]))
told += [ask(n.nvmlDeviceGetName), ask(n.nvmlDeviceGetPowerUsage), ask(n.nvmlDeviceSetPowerManagementLimit, 300_000)]
other = BoardBank.create(path, board_specs()["h100-sxm5-80gb"], 1)
told += [ask(n.nvmlDeviceGetName)]
other.refresh(time.monotonic())
told += [ask(n.nvmlDeviceGetName)]
print(json.dumps({"told": told}))
"""


def test_boards_that_nobody_refreshes_are_lost_until_another_server_takes_them_over(lib: Path, tmp_path: Path) -> None:
    bank = BoardBank.create(tmp_path / "bank", A100, 1)

    done = seen_from(lib, bank.path, sys.executable, "-c", STALE, str(bank.path), str(STALE_S + 1.0))

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["told"] == ["NVIDIA A100-SXM4-80GB", 15, 15, 15, 15, "NVIDIA H100 80GB HBM3"]
    assert bank.reading(0, time.monotonic()).requested_limit_w == 400.0
    bank.close()


@pytest.mark.parametrize(
    "leave",
    [
        "bank.refresh(time.monotonic() - 10)",  # its server was killed
        "bank.refresh(time.monotonic() + 1000)",  # its file is of before a reboot
        "bank.set_virtual_time(5.0)",  # its simulator has ended
        "pass",  # nobody ever kept it
    ],
)
def test_a_tool_started_on_boards_of_the_dead_finds_no_driver(lib: Path, tmp_path: Path, leave: str) -> None:
    bank = BoardBank.create(tmp_path / "bank", A100, 1)
    code = f"import sys, time; from pathlib import Path; from pals.plant.boards import BoardBank; bank = BoardBank.open(Path(sys.argv[1])); {leave}"
    assert seen_from(lib, bank.path, sys.executable, "-c", code, str(bank.path)).returncode == 0

    done = seen_from(lib, bank.path, sys.executable, "-c", "import pynvml; pynvml.nvmlInit()")

    assert "NVMLError_DriverNotLoaded" in done.stderr
    assert "nobody keeps these boards" in done.stderr
    bank.close()


def test_a_file_that_is_no_bank_and_a_missing_one_are_refused(lib: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"x" * 100_000)
    init = (sys.executable, "-c", "import pynvml; pynvml.nvmlInit()")

    assert "NVMLError_LibRmVersionMismatch" in seen_from(lib, tmp_path / "noise", *init).stderr
    assert "cannot be opened; is `pals serve --emulate`" in seen_from(lib, tmp_path / "none", *init).stderr
    with pytest.raises(ConfigError, match="not a file of emulated boards"):
        BoardBank.open(tmp_path / "noise")


def test_a_setter_takes_as_long_as_a_real_one_and_a_forked_child_may_use_it(lib: Path, tmp_path: Path) -> None:
    bank = BoardBank.create(tmp_path / "bank", A100, 1, seed=2, setter_latency_s=0.02)
    bank.inject(0, "slow_setter", 0.04, time.monotonic())
    takes_s = bank.setter_time_s(0)  # drawn in C from the same numbers
    code = """
import json, os, time, pynvml as n
n.nvmlInit()
handle = n.nvmlDeviceGetHandleByIndex(0)
began = time.monotonic()
if (child := os.fork()) == 0:
    n.nvmlDeviceSetPowerManagementLimit(handle, 222_000)
    os._exit(0)
os.waitpid(child, 0)
print(json.dumps({"took_s": time.monotonic() - began, "limit": n.nvmlDeviceGetPowerManagementLimit(handle)}))
"""
    with kept_fresh(bank.path):
        told = python_from(lib, bank.path, code)
    assert told["limit"] == 222_000
    assert float(str(told["took_s"])) >= takes_s > 0.085
    assert bank.setter_time_s(0) != takes_s  # the next call draws anew: C counts its writes
    bank.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from pals.plant.boards import BoardBank
class Killer:
    compute = property(lambda self: os.kill(os.getpid(), signal.SIGKILL))
BoardBank.open(Path(sys.argv[1])).book([0], 20.0, 30.0, Killer(), 20.0)
"""


def test_what_a_killed_writer_left_half_written_is_not_shown_until_somebody_writes_again(
    lib: Path, bank: BoardBank
) -> None:
    killed = seen_from(lib, bank.path, sys.executable, "-c", KILLED, str(bank.path))
    assert killed.returncode == -signal.SIGKILL
    code = """
import json, pynvml as n
n.nvmlInit()
try:
    print(json.dumps({"count": n.nvmlDeviceGetCount()}))
except n.NVMLError as e:
    print(json.dumps({"error": e.value}))
"""
    assert python_from(lib, bank.path, code) == {"error": pynvml.NVML_ERROR_TIMEOUT}
    bank.set_virtual_time(21.0)
    assert python_from(lib, bank.path, code) == {"count": 2}


def test_a_process_that_has_ended_is_listed_no_more(lib: Path, bank: BoardBank) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    bank.register_process(ended.pid, [0, 1], 10 * 2**30)
    code = """
import json, pynvml as n
n.nvmlInit()
hs = [n.nvmlDeviceGetHandleByIndex(i) for i in range(2)]
print(json.dumps({"pids": [[p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(h)] for h in hs],
                  "used": [n.nvmlDeviceGetMemoryInfo(h).used for h in hs]}))
"""
    assert python_from(lib, bank.path, code) == {"pids": [[], [os.getpid()]], "used": [0, 30 * 2**30]}
    bank.forget_process(os.getpid())
    assert bank.processes(1) != []  # the ended one's entry stays, and is not shown
    assert python_from(lib, bank.path, code) == {"pids": [[], []], "used": [0, 0]}


def test_virtual_time_does_not_run_backwards_and_wins_over_now(bank: BoardBank) -> None:
    with pytest.raises(ValueError, match="lies before"):
        bank.set_virtual_time(19.0)
    before_j = bank.energy_integral_j(0, 1e9)
    assert bank.virtual_time_s() == 20.0
    assert bank.energy_integral_j(0, 2e9) == before_j


def test_a_stuck_sensor_stays_while_the_board_goes_on(bank: BoardBank) -> None:
    bank.inject(0, "stuck", 1, 0.0)
    before, true_j = bank.reading(0, 0.0), bank.energy_integral_j(0, 0.0)
    bank.set_limit(0, 150.0, 0.0)
    bank.set_virtual_time(30.0)

    after = bank.reading(0, 0.0)
    assert (after.power_avg_w, after.power_instant_w, after.energy_j) == (
        before.power_avg_w, before.power_instant_w, before.energy_j,
    )  # fmt: skip
    assert after.sm_clock_mhz < before.sm_clock_mhz
    assert bank.energy_integral_j(0, 0.0) > true_j + 1000


def test_the_sources_compile_without_a_warning_and_another_text_is_built_anew(lib: Path, tmp_path: Path) -> None:
    sources = all_sources()
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    names = [n for n in sources if n.endswith(".c")]
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-fsyntax-only"]
    assert subprocess.run([str(COMPILER), *flags, *names], cwd=tmp_path, check=False).returncode == 0

    built_at = (lib / SONAME).stat().st_mtime_ns
    assert library(lib.parent, os.environ) == lib
    assert (lib / SONAME).stat().st_mtime_ns == built_at
    changed = library(lib.parent, os.environ, {**sources, "setters.c": sources["setters.c"] + "/* changed */\n"})
    assert changed != lib
    assert (changed / SONAME).exists()


def test_without_a_compiler_and_with_a_broken_source_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no C compiler found .*install one"):
        library(tmp_path, {"PATH": str(tmp_path)})
    with pytest.raises(ConfigError, match="could not build"):
        library(tmp_path, os.environ, {"broken.c": "int main("})
    assert list(tmp_path.iterdir()) == []


def pals(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `pals emulate nvml` in a run directory of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pals.cli", "emulate", "nvml", *args],
        capture_output=True, text=True, env=command_environ(folder), timeout=60, check=False,
    )  # fmt: skip


def command_environ(folder: Path) -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PALS_")}
    return environ | {"PALS_RUN_DIR": str(folder / "run"), "XDG_CACHE_HOME": str(folder.parent / "cache")}


def test_the_command_runs_another_on_boards_of_its_own_and_hands_on_its_exit_code(tmp_path: Path) -> None:
    code = "import pynvml as n, sys; n.nvmlInit(); sys.exit(40 + n.nvmlDeviceGetCount())"

    done = pals(tmp_path, "--boards", "2xa100-sxm4-80gb", "--load", "0.5", "--", sys.executable, "-c", code)

    assert (done.returncode, done.stderr) == (42, "")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no emulated boards are kept"),
        (("--load", "0.5"), "give --boards too"),
        (("--boards", "a100-sxm4-80gb", "--load", "1.5"), "outside 0..1"),
        (("--boards", "a100-sxm4-80g", "--", "true"), "did you mean"),
        (("--bords", "a100-sxm4-80gb"), "unknown option '--bords'"),
        (("--boards", "a100-sxm4-80gb", "--", "/no/such/tool"), "cannot run '/no/such/tool'"),
    ],
)
def test_wrong_arguments_say_what_to_do(tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    done = pals(tmp_path, *args)

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_boards_of_their_own_live_until_ctrl_c_for_whoever_exports_the_line(lib: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pals.cli", "emulate", "nvml", "--boards", "3xh100-sxm5-80gb"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=command_environ(tmp_path),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        code = f"{sys.executable} -c 'import pynvml as n; n.nvmlInit(); print(n.nvmlDeviceGetCount())'"
        seen = subprocess.run(["bash", "-c", f"{line}{code}"], capture_output=True, text=True, timeout=30, check=False)
        assert seen.stdout.strip() == "3"
    finally:
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    assert "EMULATED" in errors
    assert list((tmp_path / "run").iterdir()) == []
