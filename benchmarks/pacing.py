"""Does a client see the emulated step time? 64 streams at 10 ms a step, through the real server and `vllm bench serve`.

Command: `python -m benchmarks.pacing`. Pass: client TPOT within 1 % of 10 ms while the device stood idle at most 2 %
of the time; with more idle time the host was too busy to tell, and the run is inconclusive.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pals.engines.vllm_launcher import tail
from pals.experiments.demo import free_port, healthy

SEQUENCES, STEP_S, MODEL = 64, 0.010, "allenai/OLMoE-1B-7B-0924"
TOLERANCE, IDLE_MOST = 0.01, 0.02


def serve(scratch: Path, port: int) -> subprocess.Popen[bytes]:
    """`pals serve` with a fixed step time and a device trace."""
    environ = {
        **os.environ, "PALS_RUN_DIR": str(scratch / "run"), "PALS_EMU_STEP_S": str(STEP_S),
        "PALS_EMU_TRACE": str(scratch / "trace.jsonl"),
    }  # fmt: skip
    with (scratch / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pals.cli", "serve", MODEL, "--emulate", "h100-sxm5-80gb", "--port", str(port),
             "--metrics-port", "0", "--max-num-seqs", str(SEQUENCES)],
            env=environ, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    while not healthy(f"http://127.0.0.1:{port}"):
        if process.poll() is not None:
            raise RuntimeError(tail(scratch / "serve.log"))
        time.sleep(0.25)
    return process


def bench(scratch: Path, port: int) -> float:
    """Median TPOT that `vllm bench serve` reports, seconds."""
    from pals.cli.serve import cache_folder
    from pals.engines.model_zoo import local_folder

    environ = {**os.environ, "PALS_EMU": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai", "--model", MODEL,
         "--tokenizer", str(local_folder(MODEL, cache_folder())), "--base-url", f"http://127.0.0.1:{port}",
         "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "512", "--ignore-eos",
         "--num-prompts", str(3 * SEQUENCES), "--max-concurrency", str(SEQUENCES), "--save-result",
         "--result-dir", str(scratch), "--result-filename", "bench.json", "--disable-tqdm"],
        env=environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return float(json.loads((scratch / "bench.json").read_text())["median_tpot_ms"]) / 1000.0


def idle_share(trace: Path) -> float:
    """Share of the time the device waited for the host, over steps with a full batch."""
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    full = [r for r in rows if r["decode"] >= SEQUENCES - 1]
    busy_s = sum(r["end_s"] - r["start_s"] for r in full)
    gaps_s = sum(r["gap_s"] for r in full)
    return gaps_s / (busy_s + gaps_s) if full else 1.0


def main() -> int:
    """Measure and print; 1 where the pace is wrong and the device was kept busy."""
    with tempfile.TemporaryDirectory() as name:
        scratch, port = Path(name), free_port()
        process = serve(scratch, port)
        try:
            tpot_s = bench(scratch, port)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)
        idle = idle_share(scratch / "trace.jsonl")
    error = tpot_s / STEP_S - 1
    right = abs(error) <= TOLERANCE
    verdict = ("pass" if right else "FAIL") if idle <= IDLE_MOST else "inconclusive (the host was too busy)"
    print(
        f"{SEQUENCES} streams × {STEP_S * 1e3:.0f} ms (emulated): client TPOT {tpot_s * 1e3:.3f} ms ({error:+.2%}), "
        f"device idle {idle:.2%}: {verdict}"
    )
    return int(idle <= IDLE_MOST and not right)


if __name__ == "__main__":
    sys.exit(main())
