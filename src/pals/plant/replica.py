"""A simulated replica: one engine on one group of boards, stepped event by event, O(1) work a decode step.

Schedules as vLLM V1 does, draws power as the emulated boards do; semantics, speed and differences: docs/models/replica.md.
Figures that come from here are simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import ConfigError
from pals.core.experts import ExpertCounts
from pals.core.quantities import LOWERINGS, EngineSample
from pals.plant import replica_run
from pals.plant.governor import Firmware
from pals.plant.llm_step import StepModel, StepTables
from pals.plant.replica_boards import BoardView, ReplicaBoards
from pals.plant.replica_state import PIPELINE, REQUEST, Memory, new_memory
from pals.plant.routing import Routing, RoutingTally, tally_of
from pals.plant.silicon import Silicon
from pals.plant.specs import BoardSpec
from pals.plant.workload import Workload

FloatArray = NDArray[np.float64]
Constants = TypeVar("Constants", StepTables, Silicon, Firmware)
UTILIZATION = 0.92  # vLLM's default share of board memory
LOOK_AHEAD = 256  # requests looked at together for the first that has not ended


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """What came of each request, arrays of shape (requests,), seconds from the start; NaN where it is not so far."""

    scheduled_s: FloatArray  # first planned
    first_token_s: FloatArray
    last_token_s: FloatArray
    preemptions: NDArray[np.int32]
    refused: NDArray[np.bool_]  # never runs: too many waited when it came


@dataclass(frozen=True, slots=True, kw_only=True)
class SentRequests:
    """Requests that have arrived, arrays of shape (requests,), seconds from the start; NaN where it is not so far."""

    arrival_s: FloatArray
    first_token_s: FloatArray
    last_token_s: FloatArray
    output_tokens: NDArray[np.int32]


class Replica:
    """See the module. Time starts at 0; nothing moves but by `advance`."""

    def __init__(
        self,
        model: StepModel,
        spec: BoardSpec,
        *,
        boards: int,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        block_size: int = 16,
        kv_blocks: int | None = None,
        gpu_memory_utilization: float = UTILIZATION,
        prefix_caching: bool = True,
        async_scheduling: bool = True,
        pace_when_planned: bool = False,
        board_seed: int = 0,
        setter_latency_s: float = 0.004,
        routing_seed: int = 0,
        compiled: bool = True,
    ) -> None:
        """`kv_blocks` None: what the board's memory leaves; `compiled` False runs the same code uncompiled.

        `pace_when_planned` fixes a step's duration at the clock of the moment it is planned, as the emulated engine books
        it; otherwise a step that runs slows down and speeds up with the clock. `routing_seed` says which experts are popular.

        Raises:
            ConfigError: sizes that do not fit one another, the model does not fit the boards, or numba is missing.
        """
        if max_num_seqs < 1 or max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}), and that "
                "at least 1: every running sequence decodes one token a step. Nothing was simulated"
            )
        self.spec, self.model = spec, model
        self._max_num_batched_tokens = max_num_batched_tokens
        self.kv_blocks = kv_blocks or kv_blocks_of(model, gpu_memory_utilization, block_size)
        self._memory = new_memory(
            boards=boards, block_size=block_size, max_num_seqs=max_num_seqs, max_tokens=max_num_batched_tokens
        )
        self._ended: tuple[NDArray[Any], ...] = ()  # requests that had ended when this was cloned: blank in the memory
        self._live = 0  # requests before this one have ended
        self._state = self._memory.state[0]
        s = self._state
        s["depth"] = PIPELINE if async_scheduling else 1
        s["queue_put"] = s["kv_blocks"] = self.kv_blocks
        s["block"], s["batched"], s["prefix_caching"] = block_size, max_num_batched_tokens, prefix_caching
        s["fixed_pace"] = pace_when_planned
        s["launch"] = s["limit"] = max_num_seqs
        s["due"] = 1
        self._boards = ReplicaBoards(self._memory, spec, seed=board_seed, setter_latency_s=setter_latency_s)
        self._dips_known_s = 0.0
        self._tally = tally_of(model.shape, model.constants.popularity_cv, seed=routing_seed)
        self.swap_model(model)
        self._silicon, self._firmware = numbers(spec.silicon), numbers(spec.firmware)
        self._advance: Callable[..., bool] = _compiled() if compiled else replica_run.advance

    @property
    def now_s(self) -> float:
        """Simulated time."""
        return float(self._state["now_s"])

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds; a longer request never runs."""
        return self.kv_blocks * int(self._state["block"])

    @property
    def finished(self) -> bool:
        """Whether every submitted request has its last token, or was refused."""
        return int(self._state["finished"]) + int(self._state["refused"]) == int(self._state["submitted"])

    def clone(self) -> Replica:
        """Another one in the same state, which goes on by itself and, steered alike, exactly alike.

        Requests whose predecessors and themselves have all ended never change any more: both share them, and only the live
        part behind them is copied. So a clone costs the same after a day as after a minute.
        """
        twin, m = copy(self), self._memory
        known, live = sum(map(len, self._ended)), self._first_live()
        requests = np.empty_like(m.requests)
        requests[live:] = m.requests[live:]
        shared = (m.requests, m.bounds_s)
        own = (a if any(a is s for s in shared) else a.copy() for a in m)
        twin._memory = Memory._make(own)._replace(requests=requests)
        twin._ended = (*self._ended, m.requests[known:live])
        twin._state = twin._memory.state[0]
        twin._boards = self._boards.clone(twin._memory)
        return twin

    def _first_live(self) -> int:
        """The first request that has not ended; the newest, where all have, because the next to be submitted follows it."""
        ends_s, newest = self._memory.requests["last_s"], len(self._memory.requests) - 1
        while self._live < newest and not np.isnan(ends_s[self._live]):
            unended = np.isnan(ends_s[self._live : min(self._live + LOOK_AHEAD, newest)])
            self._live += int(unended.argmax()) if unended.any() else len(unended)
        return self._live

    def _requests(self, first: int, end: int) -> NDArray[Any]:
        """Records of requests `first` to `end`, with those that had ended before this was cloned."""
        known = sum(map(len, self._ended))
        every: NDArray[Any] = self._memory.requests
        if first < known:
            every = np.concatenate([*self._ended, every[known:]])
        return every[first:end]

    def submit(self, workload: Workload) -> None:
        """Add requests; they must arrive no earlier than those submitted before, and not in the past.

        Raises:
            ConfigError: arrivals out of order, or a request that never fits the KV cache.
        """
        new = requests_of(workload)
        held = int(self._state["submitted"])
        earliest_s = max(self.now_s, float(self._memory.requests["arrival_s"][held - 1]) if held else 0.0)
        if len(new) and (np.any(np.diff(new["arrival_s"]) < 0) or new["arrival_s"][0] < earliest_s):
            raise ConfigError(
                f"{workload.name}: requests must be submitted in order of arrival, none before {earliest_s:.3f} s. Nothing "
                "was submitted"
            )
        self._check_fits(workload.name, new)
        self._memory = self._memory._replace(requests=np.concatenate([self._memory.requests[:held], new]))
        self._state["submitted"] = self._state["released"] = held + len(new)

    def keep_in_flight(self, n: int, supply: Workload | None = None) -> None:
        """Closed loop: from now on a request arrives whenever fewer than `n` are in flight; `n` 0 lets none arrive.

        Args:
            n: requests in flight; those above it end by themselves.
            supply: what is sent next, in this order, whatever its arrival times; it replaces what was not sent yet. None
                goes on with that.

        Raises:
            ConfigError: a request that never fits the KV cache; nothing was changed.
        """
        released = int(self._state["released"])
        if supply is not None:
            new = requests_of(supply)
            self._check_fits(supply.name, new)
            new["arrival_s"] = np.inf
            self._memory = self._memory._replace(requests=np.concatenate([self._memory.requests[:released], new]))
            self._state["submitted"] = released + len(new)
        self._state["in_flight"] = n
        replica_run.release(self._memory)

    def advance(self, until_s: float) -> None:
        """Go on to `until_s` of simulated time.

        Raises:
            RuntimeError: the scheduler is stuck, which is a mistake of ours.
        """
        while self.now_s < until_s:
            if self.now_s >= self._dips_known_s:
                dips, self._dips_known_s = self._boards.draw_dips(self.now_s)
                self._memory = self._memory._replace(dips=dips)
            stop_s = float(min(until_s, self._dips_known_s))
            if not self._advance(self._memory, self._tables, self._silicon, self._firmware, stop_s):
                raise RuntimeError(
                    f"the simulated scheduler plans nothing although {int(self._state['running'])} run; stopped at "
                    f"{self.now_s} s"
                )

    def _check_fits(self, name: str, new: NDArray[Any]) -> None:
        block = int(self._state["block"])
        needed = -(-(new["prompt"].astype(np.int64) + new["output"]) // block)
        if len(new) and int(needed.max()) > self.kv_blocks:
            raise ConfigError(
                f"{name}: request {int(needed.argmax())} needs {int(needed.max())} KV blocks of {block} tokens and "
                f"the replica has {self.kv_blocks}: it would never run. Nothing was submitted"
            )

    def run(self, *, chunk_s: float = 60.0) -> None:
        """Advance until every request has its last token, or was refused."""
        while not self.finished:
            self.advance(self.now_s + chunk_s)

    def set_limit_w(self, watts: float, board: int | None = None) -> None:
        """Power limit of one board, None: of each; acts some milliseconds later.

        Raises:
            ValueError: outside the boards' range; nothing was changed.
            DeviceLostError: a board is lost; the others were written.
            PermissionDeniedError: a board refuses; the others were written.
        """
        self._boards.set_limit_w(watts, board)

    def set_clock_lock(self, mhz: int | None, board: int | None = None) -> None:
        """Ceiling of the SM clock of one board, None: of each; `mhz` None releases it. Raises as `set_limit_w`."""
        self._boards.set_clock_lock(mhz, board)

    def limit_w(self, board: int) -> float:
        """The limit that a board reports as enforced, W."""
        return self._boards.limit_w(board)

    def inject(self, board: int, fault: str, value: float = 1.0) -> None:
        """Set a fault of one board; 0 removes it.

        "lost", "denied" (setters), "stuck" (a sensor shows the power and energy it showed last) and "thermal" (hardware
        slowdown) are 1 or 0; "external_limit" W; "ambient" °C of the air at the board; "slow_setter" s that each write takes
        longer to act; "dip" s that current protection holds the clock down from now on.

        Raises:
            ValueError: unknown fault, or a value it cannot have; nothing was changed.
        """
        self._boards.inject(board, fault, value)

    def set_active_sequences(self, n: int | None, lowering: str = "drain") -> None:
        """Active-sequence limit from the next planned step on, never above the launch limit; None returns to that.

        Raises:
            ValueError: unknown way of lowering; nothing was changed.
        """
        if lowering not in LOWERINGS:
            raise ValueError(f"unknown lowering {lowering!r}; known: {', '.join(LOWERINGS)}. The limit in force stays")
        launch = int(self._state["launch"])
        self._state["limit"] = launch if n is None else max(1, min(launch, n))
        self._state["lowering"] = LOWERINGS.index(lowering)

    def set_most_waiting(self, n: int | None) -> None:
        """Refuse requests that arrive from now on while `n` wait; None lets any number wait.

        A request that finds a free place does not wait. Refused ones do not come again. In a closed loop nobody is
        refused: it sends only when an answer has come, and its users would do nothing but ask again.

        Raises:
            ValueError: fewer than none; nothing was changed.
        """
        if n is not None and n < 0:
            raise ValueError(f"{n} requests cannot wait; give 0 or more, or None. The bound in force stays")
        replica_run.accept(self._memory)  # who came before now came under the bound before
        self._state["bounded"], self._state["most_waiting"] = int(n is not None), n or 0

    def swap_model(self, model: StepModel) -> None:
        """From the next step on, steps take what `model` says: another engine build, another routing of experts."""
        if len(model.tables.memory_s) <= self._max_num_batched_tokens:
            raise ConfigError(
                f"the step model knows steps of up to {len(model.tables.memory_s) - 1} tokens, the engine plans "
                f"{self._max_num_batched_tokens}: make it with max_tokens={self._max_num_batched_tokens}"
            )
        self.model, self._tables = model, numbers(model.tables)
        if self._tally is not None:
            self._route(self._counted(self._tally).routing.with_cv(model.constants.popularity_cv))

    def swap_experts(self, begin: float = 0.0, end: float = 0.5) -> None:
        """From now on the most popular experts are the least popular ones, and the other way round; no step takes more or less time.

        `begin` and `end` are shares of the more popular half of the experts, the most popular first. Without experts nothing happens.
        """
        if self._tally is not None:
            self._route(self._counted(self._tally).routing.swapped(begin, end))

    def expert_counts(self) -> ExpertCounts | None:
        """What a counting worker would have counted in all steps that are done; None for a model without experts.

        Which experts were touched is drawn here, for the steps since the last call, with their exact numbers of tokens; the sum of
        distinct experts varies around what step times are computed from. Asking changes nothing in the simulation.
        """
        if self._tally is None:
            return None
        return self._counted(self._tally).counts(self.now_s, ranks=self.model.group.expert_ranks)

    def _counted(self, tally: RoutingTally) -> RoutingTally:
        """The tally with the steps done since it was last brought up to date."""
        self._tally = tally.after(self._memory.steps_by_tokens)
        self._memory.steps_by_tokens[:] = 0
        return self._tally

    def _route(self, routing: Routing) -> None:
        if self._tally is not None:
            self._tally = replace(self._tally, routing=routing)

    def boards(self) -> tuple[BoardView, ...]:
        """The sensors of each board now.

        Raises:
            DeviceLostError: a board is lost; `board` reads the others.
        """
        return self._boards.views(range(len(self._memory.boards)))

    def board(self, i: int) -> BoardView:
        """The sensors of one board now; raises as `boards`."""
        return self._boards.view(i)

    def energy_j(self) -> float:
        """The integral of all boards' power up to the last tick, J; for checks and totals, not for controllers."""
        return float(self._memory.boards["energy_j"].sum())

    def counters(self) -> EngineSample:
        """What the engine says of itself now."""
        m = self._memory
        s = dict(zip(m.state.dtype.names or (), m.state[0].item(), strict=True))  # plain numbers, read at once
        new = s["admitted"] < s["arrived"]
        oldest_s = s["last_update_s"] - float(m.requests["arrival_s"][s["admitted"]]) if new else 0.0
        return EngineSample(
            time_s=s["last_update_s"],
            steps=s["completed"],
            running=s["running"],
            waiting=s["stacked"] + s["arrived"] - s["admitted"] - s["gaps"],
            arrived_requests=s["arrived"] - s["refused"],
            arrived_prompt_tokens=s["arrived_prompt_tokens"],
            prefill_tokens=s["prefill_tokens"],
            decode_tokens=s["decode_tokens"],
            output_tokens=s["output_tokens"],
            finished_requests=s["finished"],
            aborted_requests=0,
            preemptions=s["preemptions"],
            kv_usage=1.0 - (s["queue_put"] - s["queue_taken"]) / self.kv_blocks,
            busy_s=s["busy_s"],
            last_step_s=s["last_step_s"],
            oldest_waiting_s=max(0.0, oldest_s),
            active_limit=s["limit"],
            launch_limit=s["launch"],
            ttft_counts=tuple(m.ttft_counts.tolist()),
            tpot_counts=tuple(m.tpot_counts.tolist()),
            scheduled=s["scheduled"],
            lowering=LOWERINGS[s["lowering"]],
            refused_requests=s["refused"],
        )

    @property
    def sent_count(self) -> int:
        """Requests that have arrived, or got their time of arrival, so far."""
        return int(self._state["released"])

    @property
    def unsent_count(self) -> int:
        """Requests of a closed loop's supply that are still to be sent."""
        return int(self._state["submitted"]) - self.sent_count

    def sent(self, first: int = 0) -> SentRequests:
        """Requests sent so far, from number `first` on; a closed loop knows their arrivals only afterwards."""
        r = self._requests(first, self.sent_count)
        return SentRequests(
            arrival_s=r["arrival_s"].copy(),
            first_token_s=r["first_s"].copy(),
            last_token_s=r["last_s"].copy(),
            output_tokens=r["output"].copy(),
        )

    def results(self) -> RequestTimes:
        """The times of every request submitted so far."""
        r = self._requests(0, len(self._memory.requests))
        return RequestTimes(
            scheduled_s=r["scheduled_s"].copy(),
            first_token_s=r["first_s"].copy(),
            last_token_s=r["last_s"].copy(),
            preemptions=r["preemptions"].copy(),
            refused=r["refused"] == 1,
        )


def kv_blocks_of(model: StepModel, utilization: float, block_size: int) -> int:
    """KV blocks that fit the boards' memory, less the one vLLM keeps as a null block.

    Raises:
        ConfigError: the weights do not fit.
    """
    shape, group = model.shape, model.group
    token_bytes = shape.kv_bytes_per_token / min(group.tensor, shape.kv_heads) / group.pipeline
    return int(model.kv_capacity_bytes(utilization) // (token_bytes * block_size)) - 1


def requests_of(workload: Workload) -> NDArray[Any]:
    """The workload as request records.

    Raises:
        ConfigError: a request without prompt or output.
    """
    new = np.zeros(len(workload), REQUEST)
    new["arrival_s"] = workload.arrival_s
    new["prompt"], new["output"] = workload.prompt_tokens, workload.output_tokens
    new["prefix"] = workload.prefix_tokens
    for name in ("scheduled_s", "first_s", "last_s"):
        new[name] = np.nan
    if len(new) and (new["prompt"].min() < 1 or new["output"].min() < 1):
        raise ConfigError(f"{workload.name}: every request has at least one prompt and one output token")
    return new


def numbers(constants: Constants) -> Constants:
    """The same constants with every number a float and every array contiguous: one compiled signature for all."""
    hints = get_type_hints(type(constants))
    values: list[Any] = []
    for name, value in zip(constants._fields, constants, strict=True):
        given: Any = value
        if isinstance(given, np.ndarray):
            values.append(np.ascontiguousarray(given, dtype=np.float64))
        else:
            values.append(int(given) if hints[name] is int else float(given))
    return type(constants)(*values)


def _compiled() -> Callable[..., bool]:
    from pals.plant.compiled import compiled_advance

    return compiled_advance()
