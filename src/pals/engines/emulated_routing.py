"""Routing of one emulated engine: it drifts by the schedule in PALS_EMU_ROUTING, and is counted where workers would count theirs.

A change of the spread gives steps another model from then on. Counts go through the workers' own channel, under their switch
(`PALS_EXPERTS=1`) and conditions; they are drawn when they are published, so a step costs one addition.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import numpy as np

from pals.engines.emulated_world import world_of
from pals.plant.llm_step import StepModel
from pals.plant.routing import RoutingTally, tally_of
from pals.plant.routing_schedule import RoutingSchedule, parse_routing
from pals.runtime.channel import run_dir
from pals.runtime.expert_channel import ExpertChannel, ExpertFacts

log = logging.getLogger("vllm.pals")
VARIABLE = "PALS_EMU_ROUTING"


class EmulatedRouting:
    """See the module; times are the engine's clock."""

    def __init__(
        self,
        model: StepModel,
        schedule: RoutingSchedule,
        *,
        start_s: float | None = None,
        counter: RoutingCounter | None = None,
    ) -> None:
        """The schedule counts from `start_s`, None: from the first step, since nobody knows when a server's engine began.

        All models that will be needed are made here, so that no step waits for one.
        """
        cv = model.constants.popularity_cv
        self._start_s, self._counter, self._next, self.model = start_s, counter, 0, model
        self._changes = schedule.changes(cv) if model.shape.experts else ()
        spreads = {c.cv for c in self._changes if c.cv is not None}
        self._models = {v: model.changed(replace(model.constants, popularity_cv=v)) for v in spreads}

    def at(self, now_s: float) -> StepModel:
        """The model of a step that begins at `now_s`."""
        if self._start_s is None:
            self._start_s = now_s
        while self._next < len(self._changes) and self._changes[self._next].time_s <= now_s - self._start_s:
            change = self._changes[self._next]
            self._next += 1
            if change.cv is not None:
                self.model = self._models[change.cv]
            if self._counter is not None:
                tally = self._counter.drawn()
                self._counter.tally = replace(tally, routing=change.of(tally.routing))
        return self.model

    def count(self, tokens: int, now_s: float) -> None:
        """A step of so many tokens runs."""
        if self._counter is None:
            return
        try:
            self._counter.count(tokens, now_s)
        except (OSError, ValueError) as e:  # as a worker does: the engine serves on
            log.error("PALS: counting experts failed (%s: %s); the engine serves on without", type(e).__name__, e)
            self.close()

    def close(self) -> None:
        """Count no more: remove the file."""
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.close()


class RoutingCounter:
    """Counts of all ranks of one engine, told as one worker's."""

    def __init__(self, tally: RoutingTally, channel: ExpertChannel, *, most_tokens: int, every_s: float) -> None:
        self.tally, self._channel, self._next_s, self._every_s = tally, channel, 0.0, every_s
        self._steps = np.zeros(most_tokens + 1, np.int64)  # not drawn yet, by number of tokens

    def count(self, tokens: int, now_s: float) -> None:
        """A step of so many tokens; published where it is time."""
        if tokens >= len(self._steps):
            self._steps = np.pad(self._steps, (0, tokens))
        self._steps[tokens] += 1
        if now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            t = self.drawn()
            self._channel.publish(time_s=now_s, steps=t.steps, tokens=t.tokens, sums=t.sums)

    def drawn(self) -> RoutingTally:
        """The tally with all steps so far."""
        self.tally = self.tally.after(self._steps)
        self._steps[:] = 0
        return self.tally

    def close(self) -> None:
        """Remove the file."""
        self._channel.close()


def routing_of(config: Any, model: StepModel, environ: os._Environ[str]) -> EmulatedRouting:
    """Routing of the engine of this vLLM configuration; in virtual time its schedule counts from now, as a run's faults do.

    Raises:
        ConfigError: PALS_EMU_ROUTING holds no schedule.
    """
    schedule = parse_routing(environ.get(VARIABLE, ""))
    counter = counter_of(config, model, schedule.seed, environ)
    world = world_of(config)
    return EmulatedRouting(model, schedule, start_s=None if world is None else world.clock.now_s(), counter=counter)


def counter_of(config: Any, model: StepModel, seed: int, environ: os._Environ[str]) -> RoutingCounter | None:
    """A counter where the workers of a real engine would count; None where they would not."""
    if environ.get("PALS_PLUGIN", "1") == "0" or environ.get("PALS_EXPERTS", "0") == "0":
        return None
    from pals.engines.expert_counts import (
        PUBLISH_EVERY_S,
        wanted,
        why_not,
    )  # costs an engine that counts nothing nothing

    if not wanted(environ):
        return None
    parallel = config.parallel_config
    rank = parallel.data_parallel_rank
    tally = tally_of(model.shape, model.constants.popularity_cv, seed=seed, rank=rank)
    if tally is None:
        return None
    if reason := why_not(parallel, 0):
        log.info("PALS: this engine counts no experts: %s", reason)
        return None
    balanced = getattr(parallel, "enable_eplb", False)
    facts = ExpertFacts(
        pid=os.getpid(), engine_pid=os.getpid(), tensor_rank=0, data_rank=rank, layers=tally.names,
        experts=tally.routing.experts, top_k=tally.routing.top_k, ranks=model.group.expert_ranks,
        placement=None if balanced else getattr(parallel, "expert_placement_strategy", "linear"), bypassed=(),
    )  # fmt: skip
    return RoutingCounter(
        tally, ExpertChannel(run_dir(environ), facts), every_s=PUBLISH_EVERY_S,
        most_tokens=config.scheduler_config.max_num_batched_tokens,
    )  # fmt: skip
