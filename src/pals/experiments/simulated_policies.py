"""Several policies over identical arrivals: one after the other here, or each in a worker process; the same results.

A worker ignores the terminal's signals and looks at a common event instead; it ends with its parent, however that ends.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pals.core.errors import PalsError
from pals.engines.vllm_launcher import die_with_parent
from pals.experiments.simulated_run import PolicyResult, PolicyTask, Simulation, run_policy

Report = Callable[[int, float], None]  # which task, event time
LOOK_S = 0.1


def run_policies(
    sim: Simulation, tasks: Sequence[PolicyTask], *, workers: int, stop: threading.Event, report: Report
) -> list[PolicyResult]:
    """Run all; results in the order of `tasks`. After `stop` those not begun are left out and the last may be incomplete.

    Raises:
        ConfigError: a policy does not fit.
        PalsError: a worker process was killed.
    """
    if min(workers, len(tasks)) > 1:
        return _in_workers(sim, tasks, workers, stop, report)
    results = []
    for i, task in enumerate(tasks):
        if not stop.is_set():
            results.append(run_policy(sim, task, stop=stop.is_set, report=_of_task(report, i)))
    return results


def _of_task(report: Report, i: int) -> Callable[[float], None]:
    return lambda event_s: report(i, event_s)


def _in_workers(
    sim: Simulation, tasks: Sequence[PolicyTask], workers: int, stop: threading.Event, report: Report
) -> list[PolicyResult]:
    context = multiprocessing.get_context("spawn")
    told, messages = context.Event(), context.Queue()
    waiting, running, results = deque(range(len(tasks))), dict[int, Any](), dict[int, PolicyResult]()
    try:
        while running or (waiting and not stop.is_set()):
            if stop.is_set():
                told.set()
            while waiting and len(running) < workers and not stop.is_set():
                i = waiting.popleft()
                running[i] = context.Process(target=_work, args=(sim, tasks[i], i, told, messages), daemon=True)
                running[i].start()
            _take(messages, running, results, tasks, report)
    finally:
        for process in running.values():  # only where something failed
            process.terminate()
    return [results[i] for i in sorted(results)]


def _take(
    messages: Any,
    running: dict[int, Any],
    results: dict[int, PolicyResult],
    tasks: Sequence[PolicyTask],
    report: Report,
) -> None:
    """Wait a moment for what a worker has to say; raise what made it fail."""
    dead = [i for i, p in running.items() if not p.is_alive()]  # before the queue: the last message is there by then
    try:
        i, what = messages.get(timeout=LOOK_S)
    except queue.Empty:
        for i in dead:
            raise PalsError(
                f"{tasks[i].name}: its worker process ended early (exit code {running[i].exitcode}: killed, or out of memory); "
                "no result was written. Use fewer --workers, or simulate less"
            ) from None
        return
    if isinstance(what, float):
        report(i, what)
        return
    running.pop(i).join()
    if isinstance(what, BaseException):
        raise what
    results[i] = what


def _work(sim: Simulation, task: PolicyTask, i: int, told: Any, messages: Any) -> None:
    """A worker's life."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = run_policy(sim, task, stop=told.is_set, report=lambda event_s: messages.put((i, event_s)))
        messages.put((i, result))
    except PalsError as e:
        messages.put((i, e))
