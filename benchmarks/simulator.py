"""How fast the discrete-event simulator is: one replica-day at 65 % load, with and without a controller, and against others.

Command: `python -m benchmarks.simulator` (`--days 0.1` for a quick look, `--fleet 7` for a week of eight replicas, `--vidur PYTHON`
for the comparison with Vidur, installed in an environment of its own).
Pass: at least 10,000 times real time at a fixed point and 2,000 with a call every 500 ms, in processor time of one core.
Compiling is counted apart. Everything here is simulated.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pals.core.architecture import ModelShape
from pals.engines.model_zoo import shipped_config
from pals.plant.fleet import FleetSpec, simulate
from pals.plant.llm_step import StepModel
from pals.plant.replica import Replica
from pals.plant.specs import board_specs
from pals.plant.traces import read_trace
from pals.plant.workload import Workload, at_rate, tiled

DAY_S, PERIOD_S = 86400.0, 0.5
MODEL, BOARDS, COUNT, SEQUENCES = "mistralai/Mixtral-8x7B-v0.1", "a100-sxm4-80gb", 4, 256
LOAD = 0.65  # of the rate the replica sustains with a full queue
STATIC_PASS, CONTROLLED_PASS = 10_000.0, 2_000.0
PLAIN_S, VIDUR_S = 60.0, 900.0  # of the plain run, and of Vidur's


def make(compiled: bool = True) -> Replica:
    """The replica of every measurement."""
    spec = board_specs()[BOARDS]
    model = StepModel(ModelShape.from_config(shipped_config(MODEL)), spec, tensor_parallel=COUNT)
    return Replica(model, spec, boards=COUNT, max_num_seqs=SEQUENCES, compiled=compiled)


def trace(folder: Path) -> Workload:
    """One hour of conversations."""
    return read_trace(folder / "traces" / "azure_2023_conv.csv.gz")


def capacity_per_s(hour: Workload) -> float:
    """Requests a second of a replica that always has some waiting."""
    replica, rng = make(), np.random.default_rng(1)
    replica.submit(at_rate(hour, 200.0, how="time", rng=rng))
    replica.advance(60.0)
    before = replica.counters().finished_requests
    replica.advance(360.0)
    return (replica.counters().finished_requests - before) / 300.0


def timed(replica: Replica, work: Workload, until_s: float, call: Callable[[Replica], None] | None = None) -> float:
    """Processor seconds to simulate up to `until_s`, `call` every 500 ms."""
    replica.submit(work)
    began_s = time.process_time()
    if call is None:
        replica.advance(until_s)
    else:
        for k in range(1, round(until_s / PERIOD_S) + 1):
            replica.advance(k * PERIOD_S)
            call(replica)
    return time.process_time() - began_s


def look(replica: Replica) -> None:
    """What a controller does: read boards and engine, set a limit."""
    boards, engine = replica.boards(), replica.counters()
    replica.set_limit_w(400.0 if engine.waiting or boards[0].throttled else 390.0)


def report(name: str, replica: Replica, cpu_s: float, until_s: float) -> float:
    """Print one line; return times real time."""
    engine = replica.counters()
    events = engine.steps + engine.arrived_requests + engine.finished_requests + int(until_s / 0.01)
    speed = until_s / cpu_s
    print(
        f"{name:34} {cpu_s:8.2f} s  {speed:10,.0f}x real time  {engine.steps / cpu_s:12,.0f} steps/s  {events / cpu_s:12,.0f} events/s"
        f"  ({engine.steps:,} steps, {engine.finished_requests:,} requests, {engine.preemptions} preemptions)"
    )
    return speed


def against_plain(work: Workload) -> float:
    """How many times the compiled run is faster than the same functions uncompiled; both must agree in every bit."""
    plain, quick = make(compiled=False), make()
    short = work.between(0.0, PLAIN_S)
    plain_s, quick_s = timed(plain, short, PLAIN_S), timed(quick, short, PLAIN_S)
    same = (
        all(a.tobytes() == b.tobytes() for a, b in zip(as_arrays(plain), as_arrays(quick), strict=True))
        and plain.energy_j() == quick.energy_j()
    )
    report("plain Python, same functions", plain, plain_s, PLAIN_S)
    report("compiled, same minute", quick, quick_s, PLAIN_S)
    print(f"compiled is {plain_s / quick_s:,.0f} times faster; results bit-identical: {'yes' if same else 'NO'}")
    return plain_s / quick_s if same else 0.0


def as_arrays(replica: Replica) -> tuple[np.ndarray, ...]:
    """Times of every request."""
    r = replica.results()
    return r.scheduled_s, r.first_token_s, r.last_token_s, r.preemptions


def against_vidur(python: str, work: Workload) -> None:
    """Vidur's event loop over the same quarter of an hour, in its own environment, beside ours."""
    part, quick = work.between(0.0, VIDUR_S), make()
    quick_s = timed(quick, part, VIDUR_S)
    step_s = quick.counters().busy_s / quick.counters().steps
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.csv"
        rows = zip(part.arrival_s, part.prompt_tokens, part.output_tokens, strict=True)
        trace.write_text("".join(f"{t},{p},{o}\n" for t, p, o in rows))
        driver = Path(__file__).with_name("vidur_driver.py")
        arguments = [str(driver), str(trace), str(step_s), str(SEQUENCES), "8192"]
        done = subprocess.run([python, *arguments], capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        print(f"Vidur did not run: {done.stderr.strip().splitlines()[-1]}")
        return
    other = json.loads(done.stdout.splitlines()[-1])
    speed = other["simulated_s"] / other["cpu_s"]
    print(f"Vidur 0.0.26, Sarathi scheduler, every step {1e3 * step_s:.1f} ms, no power: {speed:,.0f}x real time")
    report("ours, same requests, with power", quick, quick_s, VIDUR_S)
    print(f"ours is {VIDUR_S / quick_s / speed:,.0f} times faster")


def fleet_of_eight(hour: Workload, rate_per_s: float, days: float, workers: int) -> None:
    """Eight replicas behind one router."""
    spec = board_specs()[BOARDS]
    model = StepModel(ModelShape.from_config(shipped_config(MODEL)), spec, tensor_parallel=COUNT)
    fleet = FleetSpec(model=model, spec=spec, replicas=8, boards=COUNT, engine={"max_num_seqs": SEQUENCES})
    rng = np.random.default_rng(2)
    work = tiled(at_rate(hour, 8 * rate_per_s, how="thin", rng=rng), days * DAY_S, rng=rng)
    began_s = time.perf_counter()
    result = simulate(fleet, work, router="least-outstanding", until_s=days * DAY_S, workers=workers)
    wall_s = time.perf_counter() - began_s
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"processor time of the fleet's processes: {children.ru_utime + children.ru_stime:.0f} s")
    print(
        f"{days:g} days of 8 replicas, {workers} processes: {wall_s:.0f} s, {len(work):,} requests, "
        f"{days * DAY_S * 8 / wall_s:,.0f}x real time, mean node power {result.node_power_w.mean() / fleet.nodes:.0f} W a node"
    )


def main() -> int:
    """Print the table; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=1.0, help="simulated days of the static run (default 1)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the traces (default data)")
    parser.add_argument(
        "--fleet", type=float, default=0.0, metavar="DAYS", help="eight replicas too, for so many days (7)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of the fleet (default 2)")
    parser.add_argument("--vidur", metavar="PYTHON", help="interpreter of an environment in which Vidur is installed")
    args = parser.parse_args()

    began_s = time.perf_counter()
    warm = make()
    warm.advance(1e-3)
    print(f"compiling or reading the cache: {time.perf_counter() - began_s:.1f} s")
    hour = trace(args.data)
    sustained = capacity_per_s(hour)
    rng = np.random.default_rng(0)
    until_s = args.days * DAY_S
    work = tiled(at_rate(hour, LOAD * sustained, how="thin", rng=rng), until_s, rng=rng)
    print(
        f"SIMULATED: {MODEL} on {COUNT} x {BOARDS}; sustains {sustained:.1f} requests/s, load {LOAD:.0%}: {work.described()}"
    )

    static, wall_s = make(), time.perf_counter()
    static_speed = report("fixed point", static, timed(static, work, until_s), until_s)
    print(f"{'':34} {time.perf_counter() - wall_s:8.2f} s of wall-clock time")
    ttft_s = static.results().first_token_s - work.arrival_s
    print(f"{'':34} TTFT p50 {np.nanmedian(ttft_s):.3f} s, p99 {np.nanpercentile(ttft_s, 99):.3f} s")
    controlled, part_s = make(), until_s / 4
    controlled_speed = report("a call every 500 ms", controlled, timed(controlled, work, part_s, look), part_s)
    ratio = against_plain(work)
    if args.vidur:
        against_vidur(args.vidur, work)
    if args.fleet:
        fleet_of_eight(hour, LOAD * sustained, args.fleet, args.workers)
    return 0 if static_speed >= STATIC_PASS and controlled_speed >= CONTROLLED_PASS and ratio > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
