"""When a queue that may only grow so long is full: the one rule for API server, virtual engine and simulator.

Plain scalars, so that the simulator can compile it.
"""

from __future__ import annotations


def queue_full(most_waiting: int, waiting: int, places: int, left_waiting: bool) -> bool:
    """Whether one more request would wait beyond those that may.

    Whoever finds a free place does not wait, so that a bound of 0 still fills the batch.

    Args:
        most_waiting: requests that may wait.
        waiting: requests not yet running, those that will find a place included.
        places: the active-sequence limit less what runs; negative while a lowered limit drains.
        left_waiting: the newest step left somebody waiting, so that free places cannot be had: KV blocks are lacking.
    """
    free = 0 if left_waiting or places < 0 else places
    return waiting >= most_waiting + free
