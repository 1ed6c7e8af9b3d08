"""How fast policies are simulated with the live controller's own tick: an hour of azure-2023-conv on 4 × A100.

Command: `python -m benchmarks.simulated_policies` (`--hours 24` for a day).
Pass: at least 2,000 times real time for each policy, in processor time of one core. Compiling is not counted. Everything
here is simulated.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from pals.cli.main import parser
from pals.cli.simulate import simulation_of, tasks_of
from pals.experiments.simulated_run import run_policy

PASS = 2_000.0
NODE = ("--model", "mixtral-8x7b", "--boards", "4xa100-sxm4-80gb", "--policy", "static,pals-paper")


def main() -> int:
    """Print a line for each policy; 1 where the target is missed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--hours", default="1", help="of the trace (default 1)")
    hours = options.parse_args().hours
    reached = True
    with tempfile.TemporaryDirectory(prefix="pals-benchmark-") as folder:
        args = parser().parse_args(["simulate", *NODE, "--hours", hours, "--out", folder])
        args.given = []
        sim = simulation_of(args)
        for task in tasks_of(args, sim):
            began_s = time.process_time()
            result = run_policy(sim, task, stop=lambda: False, report=lambda event_s: None)
            cpu_s = time.process_time() - began_s
            ticks = result.event_s / task.config.control.period_s
            speed = result.event_s / cpu_s
            print(
                f"{task.name:12} {result.event_s:9,.0f} s simulated in {cpu_s:6.2f} s of one core: {speed:7,.0f}x real time, "
                f"{1e6 * cpu_s / ticks:4.0f} µs a tick, {len(result.answers.sent_s):,} requests"
            )
            reached = reached and speed >= PASS
        print(f"target {PASS:,.0f}x for each: {'reached' if reached else 'MISSED'}")
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
