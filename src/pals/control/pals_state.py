"""What the `pals` policy is made with, and what it remembers from tick to tick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pals.control.choice import Pick
from pals.control.demand import Demand
from pals.control.lever_table import FREE, Lever, MixKey
from pals.control.margins import Margins
from pals.control.outlook import Bias
from pals.control.routing import Routing
from pals.control.trust import Trust
from pals.control.worth import Worth

OBJECTIVES = ("node", "gpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class PalsSettings:
    """Constants of the policy; a run may change them, a user need not."""

    objective: str = "node"  # whose joules: the node's, estimated, or the boards' alone
    benefit: float = 0.02  # share of the joules per token that a move must save
    dwell_s: float = 8.0  # after a move, before the next one that only saves
    longest_dwell_s: float = 130.0  # a saving that had to be taken back doubles the dwell, up to here
    calm_s: float = 60.0  # a saving that stood for so long was no mistake
    floor_s: float = 600.0  # a clock that was too slow is not tried again for so long, twice as long if it was again
    longest_floor_s: float = 3600.0
    less: float = 0.85  # of the demand then: below it the floor does not hold
    room: float = 0.07  # of a logarithm: so far below its targets a point must stay to be moved to for a saving
    rise: float = 0.12  # the same for a move that targets ask for, where one reaches so far: not step by step
    slowest: float = 0.7  # a move that only saves leaves so much of the clock
    surge_s: float = 4.0  # more speed for a queue lasts at least so long; twice as long where it comes again soon
    longest_surge_s: float = 30.0  # a surge that lasts longer is the load
    settle_s: float = 3.0  # after a move, before its figures teach anything
    bias_window_s: float = 8.0  # one lesson
    bias_memory_s: float = 60.0
    use_clock: bool = True
    use_limit: bool = True
    use_batch: bool = True
    use_bias: bool = True  # correct the profile by what is measured
    use_margins: bool = True  # stay below targets by intervals and experience
    use_queue: bool = True  # look at who waits
    use_experts: bool = True  # predict by the routing that is measured, where it is


class Window(NamedTuple):
    """Figures of the point in force, summed up since they teach."""

    since_s: float
    tokens: int
    busy_s: float
    energy_j: float | None
    running: float = 0.0
    ticks: int = 0


class Surge(NamedTuple):
    """More speed for those who wait now: where to go back to, and since when."""

    lever: Lever
    batch: int | None
    since_s: float


class Floor(NamedTuple):
    """A clock that a saving came down to and that targets did not allow: nothing as slow is tried again for a while."""

    clock_mhz: float
    closed: bool  # whether clients waited for answers
    size: float  # tokens per second that were asked for, or requests inside a closed loop
    until_s: float
    lasts_s: float


class Move(NamedTuple):
    """Where to, and why: "targets", "queue", "calm", "efficiency"; "hold" where no better point exists."""

    pick: Pick
    reason: str


class State(NamedTuple):
    """What the policy remembers."""

    demand: Demand = Demand()
    margins: Margins = Margins()
    bias: Bias = Bias()
    lessons: int = 0
    key: MixKey | None = None
    lever: Lever = FREE
    batch: int | None = None  # None: the launch batch
    moved_s: float = -1e9  # last move of any kind
    saved_s: float = -1e9  # last move that only saved
    surged_s: float = -1e9  # last move for a queue
    dwell_s: float = 0.0
    floor: Floor | None = None
    surge: Surge | None = None
    surge_hold_s: float = 0.0
    squeezed_s: float = -1e9  # when the point in force last missed a target that no other point keeps
    tested: tuple[bool, bool] = (False, False)  # whether TTFT and TPOT of the point in force are near their targets
    window: Window | None = None
    ceiling_w: float = 0.0
    trust: Trust = Trust()
    why: tuple[str, str] = (
        "start",
        "nothing is known of the load yet: the limit found, no clock lock, the launch batch",
    )
    refusing_s: float | None = None  # when the queue last had to be bounded; None: it is not
    worth: Worth = Worth()
    routing: Routing = Routing()
