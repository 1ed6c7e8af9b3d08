"""Jobs over worker processes that live as long as there are jobs; one that is stopped is ended at once, since only its parent keeps results.

A worker ignores the terminal's signals and ends with its parent, however that ends.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from pals.core.errors import PalsError
from pals.engines.vllm_launcher import die_with_parent

Job = TypeVar("Job")
Result = TypeVar("Result")
LOOK_S = 0.1  # between two looks at whether to stop


class Failed(NamedTuple):
    """A job that failed, and why; the others go on."""

    why: str


class _Worker(NamedTuple):
    process: Any
    ours: Connection


def in_workers(
    work: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, stop: Callable[[], bool]
) -> Iterator[tuple[int, Result | Failed]]:
    """Position and result of each job as it ends; ends early after `stop`.

    Args:
        work: a function of a module, called in a worker.
        jobs: can be pickled, as can results.
        workers: processes, at most one a job.
        stop: looked at every `LOOK_S`.
    """
    context = multiprocessing.get_context("spawn")
    waiting, busy = deque(range(len(jobs))), dict[Any, tuple[int, _Worker]]()  # by the worker's connection
    idle = [_start(context, work) for _ in range(min(workers, len(jobs)))]
    try:
        while (waiting or busy) and not stop():
            while waiting and idle:
                worker, i = idle.pop(), waiting.popleft()
                worker.ours.send(jobs[i])
                busy[worker.ours] = (i, worker)
            for ready in wait(list(busy), timeout=LOOK_S):
                i, worker = busy.pop(ready)
                try:
                    result = worker.ours.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    code = worker.process.exitcode
                    result = Failed(f"its worker process ended early (exit code {code}: killed, or out of memory)")
                    worker = _start(context, work)
                idle.append(worker)
                yield i, result
    finally:
        for worker in [*idle, *(w for _, w in busy.values())]:
            worker.process.terminate()
            worker.process.join()
            worker.ours.close()


def _start(context: Any, work: Callable[[Job], Result]) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen here
    return _Worker(process, ours)


def _serve(work: Callable[[Any], Any], jobs: Connection) -> None:
    """A worker's life."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        try:
            result = work(job)
        except PalsError as e:
            result = Failed(str(e))
        except Exception:  # noqa: BLE001 - the process's outermost loop: one cell's mistake must not end the others
            result = Failed(traceback.format_exc())
        jobs.send(result)
