"""The command line: a plain install answers --help, and bad input gets one clear message and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def pals(*args: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PALS_")} | {"PALS_RUN_DIR": str(run_dir)}
    return subprocess.run(
        [sys.executable, "-m", "pals.cli", *args], capture_output=True, text=True, env=environ, timeout=60
    )


PLAIN_INSTALL = (
    "import sys\n"
    "class Refuse:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] in {'vllm', 'torch', 'pynvml', 'aiohttp', 'matplotlib', 'tokenizers', 'openai'}:\n"
    "            raise ImportError(name)\n"
    "sys.meta_path.insert(0, Refuse())\n"
    "from pals.cli import main\n"
)


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "GPT2", "--emulate", "h100-sxm5-80gb", "--port", "18790", "--metrics-port", "0"],
        ["profile"],
        ["demo"],
        ["emulate", "run", "GPT2", "--boards", "h100-sxm5-80gb"],
    ],
)
def test_a_plain_install_says_what_to_install(command: list[str], tmp_path: Path) -> None:
    code = f"{PLAIN_INSTALL}sys.exit(main({command!r}))"
    environ = {**os.environ, "PALS_RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environ)

    assert done.returncode == 2, done.stderr
    assert "from the checkout: pip install '.[vllm,nvml,client,simulate,evaluate]'. Nothing was started" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_needs_none_of_the_optional_packages() -> None:
    code = PLAIN_INSTALL + (
        "try: main(['--help'])\nexcept SystemExit as e: assert e.code == 0\nassert main(['models']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout
    assert "mistralai/Mixtral-8x7B-v0.1" in done.stdout


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["serv", "m"], "did you mean 'serve'"),
        (["agent"], "no running engine with PALS"),
        (["agent", "--policy", "pals-papr"], "did you mean 'pals-paper'"),
        (["agent", "--engin", "3", "--nonsense"], "nonsense"),
        (["serve", "Mixtral-8x7B"], "--emulate 4xa100-sxm4-80gb"),
        (["serve", "Mixtral-8x7B", "--emulate", "4xa100-sxm-80gb"], "did you mean 'a100-sxm4-80gb'"),
        (["serve", "Mixtrl-8x7B", "--emulate", "h100-sxm5-80gb"], "did you mean"),
        (["serve", "gpt2", "--emulate", "h100-sxm5-80gb", "--budget-w", "lots"], "budget 'lots'"),
        (["serve", "gpt2", "--emulate", "h100-sxm5-80gb", "--port", "http"], "'http' is not a port"),
        (["replay", "/nonexistent"], "cannot read the journal"),
        (["profile"], "no running engine with PALS"),
        (["demo", "--seconds", "9999"], "600 s"),
        (["serve", "gpt2", "--emulate", "h100-sxm5-80gb", "--budget-w", "nan:100"], "times must be numbers"),
        (["serve", "gpt2", "--emulate", "h100-sxm5-80gb", "--port", "18791", "--log", "/tmp"], "is a folder"),
        (
            ["serve", "gpt2", "--emulate", "h100-sxm5-80gb", "--port", "18791", "--power-limit-w", "9"],
            "outside 200..700 W",
        ),
    ],
)
def test_bad_input_says_what_and_what_to_do_and_leaves_nothing(args: list[str], told: str, tmp_path: Path) -> None:
    done = pals(*args, run_dir=tmp_path / "run")

    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "metrics at" not in done.stderr
    left = list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else []
    assert left == []


def test_status_without_anything_says_so(tmp_path: Path) -> None:
    done = pals("status", run_dir=tmp_path)

    assert done.returncode == 0
    assert "no engine with PALS runs" in done.stdout
    assert "no agent" in done.stdout


def test_files_in_the_wrong_place_are_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    serve = ["serve", "gpt2", "--emulate", "h100-sxm5-80gb", "--port", "18792", "--metrics-port", "0"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PALS_")}
    for extra, told in (
        ({"PALS_RUN_DIR": str(tmp_path / "file")}, "cannot be made (File exists"),
        ({"PALS_RUN_DIR": str(tmp_path / "run"), "XDG_CACHE_HOME": str(tmp_path / "file")}, "Not a directory"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pals.cli", *serve], capture_output=True, text=True, env=environ | extra, timeout=60
        )
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert str(tmp_path / "file") in done.stderr
        assert "Traceback" not in done.stderr
