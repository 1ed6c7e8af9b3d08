"""The plugin inside vLLM: composes with whatever scheduler vLLM picked, obeys a fresh setpoint, publishes telemetry.

It starts no thread and never raises inside a step: if its own part fails, it logs once, returns to the launch limits
and stays silent. Without an agent the engine behaves as if PALS were not installed. `PALS_PLUGIN=0` switches it off;
`PALS_EXPERTS=1` has the workers of a MoE model count their experts.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Mapping
from typing import Any

from pals.core.quantities import EngineInfo
from pals.engines.emulated_world import clock_of
from pals.engines.launch_facts import launch_facts
from pals.engines.lowering import TimeSlice, possible, preempt_down
from pals.engines.step_telemetry import StepTelemetry, tokens_given
from pals.runtime.channel import EngineChannel, run_dir

log = logging.getLogger("vllm.pals")


def register() -> None:
    """Entry point of `vllm.general_plugins`; idempotent, cheap, called in every vLLM process."""
    if os.environ.get("PALS_PLUGIN", "1") == "0":
        return
    if os.environ.get("PALS_EXPERTS", "0") != "0":
        _count_experts()
    try:
        from vllm.config import SchedulerConfig

        pick = SchedulerConfig.get_scheduler_cls
    except (ImportError, AttributeError) as e:
        log.warning("PALS: this vLLM has no scheduler seam (%s); the engine runs without PALS", e)
        return
    if getattr(pick, "composed_by_pals", False):
        return

    def get_scheduler_cls(self: Any) -> Any:
        return compose(pick(self))

    get_scheduler_cls.composed_by_pals = True  # type: ignore[attr-defined]
    SchedulerConfig.get_scheduler_cls = get_scheduler_cls


def _count_experts() -> None:
    """Have this process's workers count; nothing of it is imported where nobody asks."""
    from pals.engines import expert_counts

    if expert_counts.wanted(os.environ):
        expert_counts.install()


def compose(scheduler: type) -> type:
    """`scheduler` with PALS on top; itself if it has it already."""
    if issubclass(scheduler, PalsMixin):
        return scheduler
    return type(f"Pals{scheduler.__name__}", (PalsMixin, scheduler), {})


class EngineLink:
    """PALS's side of one scheduler: the channel, the counters, and the limit in force."""

    def __init__(self, scheduler: Any, channel: EngineChannel | None = None) -> None:
        self.capabilities = probe(scheduler)
        self.launch_limit = int(
            scheduler.max_num_active_reqs if self.capabilities["active_limit"] else scheduler.max_num_running_reqs
        )
        self._now_s = clock_of(getattr(scheduler, "vllm_config", None)).now_s
        self.telemetry = StepTelemetry(self.launch_limit)
        self.limit, self.lowering = self.launch_limit, "drain"
        self._slice = TimeSlice()
        self._refused: set[str] = set()
        self.channel = channel or EngineChannel(
            run_dir(os.environ),
            engine_info(scheduler, self.launch_limit, self.capabilities),
            name=f"vllm-{os.getpid()}",
        )
        log.info("PALS plugin: launch limit %d, capabilities %s", self.launch_limit, self.capabilities)

    def obey(self, scheduler: Any) -> None:
        """Apply the setpoint while it is fresh; the launch limit, and draining, otherwise."""
        now_s = self._now_s()
        wanted = self.channel.setpoint(now_s)
        if wanted is None:
            self.limit, self.lowering = self.launch_limit, "drain"
        else:
            self.limit = max(1, min(self.launch_limit, wanted.active_sequences))
            self.lowering = self._offered(wanted.lowering)
        if self.lowering == "preempt":
            preempt_down(scheduler, self.limit, now_s)
        elif self.lowering == "time-slice":
            self._slice.hold(scheduler, self.limit)
        self._set(scheduler, self.limit)

    def planned(self, scheduler: Any) -> None:
        """After vLLM has planned the step: whoever had to wait for a turn runs again."""
        self._slice.put_back(scheduler)

    def release(self, scheduler: Any) -> None:
        """Back to the launch limit, and no more telemetry."""
        self._slice.put_back(scheduler)
        self._set(scheduler, self.launch_limit)
        self.channel.close()

    def arrived(self, request: Any) -> None:
        """Count a request that the engine accepted."""
        self.telemetry.arrived(request, self._now_s())

    def publish(self, scheduler: Any, engine_outputs: Any, sampled_token_ids: Any) -> None:
        """Count the tokens that a step gave, and write the counters."""
        now_s = self._now_s()
        self.telemetry.updated(tokens_given(engine_outputs, sampled_token_ids), now_s)
        running, waiting = scheduler.get_request_counts()
        self.telemetry.publish(
            self.channel,
            running=running,
            waiting=waiting,
            kv_usage=scheduler.kv_cache_manager.usage,
            limit=self.limit,
            lowering=self.lowering,
            now_s=now_s,
        )

    def _offered(self, lowering: str) -> str:
        """`lowering` where this scheduler offers it, else draining, said once."""
        if lowering == "drain" or self.capabilities[lowering]:
            return lowering
        if lowering not in self._refused:
            self._refused.add(lowering)
            log.warning(
                "PALS: this scheduler does not offer what %s needs; a lowered active-sequence limit drains instead",
                lowering,
            )
        return "drain"

    def _set(self, scheduler: Any, limit: int) -> None:
        if self.capabilities["active_limit"]:  # admission alone; the runner's slots stay as they are
            scheduler.max_num_active_reqs = limit
        elif self.capabilities["running_limit"]:  # below what runs, vLLM's own assertion would kill the engine
            scheduler.max_num_running_reqs = max(limit, len(scheduler.running))


def probe(scheduler: Any) -> dict[str, bool]:
    """What this scheduler offers; asked of the object, not of a version number."""
    return {
        "active_limit": hasattr(scheduler, "max_num_active_reqs"),
        "running_limit": hasattr(scheduler, "max_num_running_reqs") and hasattr(scheduler, "running"),
        "throttle_prefills": any(
            "throttle_prefills" in inspect.signature(vars(c)["schedule"]).parameters
            for c in type(scheduler).__mro__
            if "schedule" in vars(c)
        ),
        "async_scheduling": bool(getattr(scheduler.scheduler_config, "async_scheduling", False)),
        **possible(scheduler),
    }


def engine_info(scheduler: Any, launch_limit: int, capabilities: dict[str, bool]) -> EngineInfo:
    """What the engine says of itself."""
    import vllm

    config = scheduler.vllm_config
    p = config.parallel_config
    facts = launch_facts(config, async_scheduling=capabilities.get("async_scheduling"))
    parallelism = (
        f"tp{p.tensor_parallel_size} pp{p.pipeline_parallel_size} dp{p.data_parallel_size} "
        f"ep{int(bool(getattr(p, 'enable_expert_parallel', False)))}"
    )
    return EngineInfo(
        pid=os.getpid(),
        engine="vllm",
        version=vllm.__version__,
        model=os.environ.get("PALS_MODEL_NAME") or str(config.model_config.model),
        parallelism=parallelism,
        boards=boards_of(p, os.environ.get("CUDA_VISIBLE_DEVICES", "")),
        cuda_order=in_cuda_order(os.environ),
        launch_sequences=launch_limit,
        capabilities=capabilities,
        served_as=served_name(config.model_config),
        data_parallel=getattr(p, "data_parallel_rank_local", None) is not None,
        bank=os.environ.get("PALS_EMU_BOARDS", "") if os.environ.get("PALS_EMU") else None,
        **facts._asdict(),
    )


def served_name(model_config: Any) -> str:
    """The first name the API knows the model by; empty where vLLM does not say."""
    names = getattr(model_config, "served_model_name", None) or ""
    return str(names[0] if isinstance(names, list) else names)


def boards_of(parallel: Any, visible: str) -> tuple[int, ...]:
    """Board indices of this data-parallel rank on this node, as vLLM's workers count them; empty where unknown.

    Through --device-ids or CUDA_VISIBLE_DEVICES, by index or UUID. Empty means unknown: an agent must not guess, or it would
    steer boards that belong to somebody else. Ranks on other nodes are not counted; boards that Ray chose are unknown.
    """
    backends = {getattr(parallel, f"{kind}_backend", None) for kind in ("distributed_executor", "data_parallel")}
    if backends & {"ray", "external_launcher"}:
        return ()
    first, ranks = _local_ranks(parallel)
    assigned = getattr(parallel, "assigned_physical_gpu_ids", None)
    if assigned:  # of this rank alone, or of all
        mine = assigned if len(assigned) == ranks else assigned[first : first + ranks]
        return tuple(int(i) for i in mine) if len(mine) == ranks else ()
    if not visible:
        return tuple(range(first, first + ranks))
    mine = [_index(v.strip()) for v in visible.split(",")[first : first + ranks]]
    return tuple(i for i in mine if i is not None) if len(mine) == ranks and None not in mine else ()


def _local_ranks(parallel: Any) -> tuple[int, int]:
    """The first local rank of this data-parallel rank, and how many it has here."""
    every = getattr(parallel, "world_size", None) or parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    here = getattr(parallel, "local_world_size", every)
    if here < every:  # over several nodes: vLLM counts from 0 on each
        return 0, here
    return (getattr(parallel, "data_parallel_rank_local", 0) or 0) * here, here


def _index(device: str) -> int | None:
    """The NVML index of an index or UUID in CUDA_VISIBLE_DEVICES, as vLLM's platform finds it; None where it does not."""
    if device.isdigit():
        return int(device)
    try:
        from vllm.platforms import current_platform

        return int(current_platform.device_control_id_to_physical_device_id(device))
    except Exception:  # noqa: BLE001 - the driver's own error among them, which vLLM brings along; unknown is an answer
        return None


def in_cuda_order(environ: Mapping[str, str]) -> bool:
    """Whether indices count boards as CUDA does by default, fastest first, which NVML does not know."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    by_uuid = bool(visible) and not any(v.strip().isdigit() for v in visible.split(","))
    return environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and not by_uuid


class PalsMixin:
    """Laid over vLLM's scheduler; each method does vLLM's work first-hand and PALS's beside it.

    Whatever PALS's own part raises is caught: an exception in a step would kill the engine and every request in it.
    """

    _pals: EngineLink | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            self._pals = self._pals_link()
        except Exception as e:  # noqa: BLE001 - see the class
            self._pals_failed(e)

    def _pals_link(self) -> EngineLink:
        """Make the link; tests give a scheduler another one here."""
        return EngineLink(self)

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """A request arrives."""
        result = super().add_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._pals is not None:
            try:
                self._pals.arrived(request)
            except Exception as e:  # noqa: BLE001 - see the class
                self._pals_failed(e)
        return result

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step under the limit now in force."""
        link = self._pals
        if link is not None:
            try:
                link.obey(self)
            except Exception as e:  # noqa: BLE001 - see the class
                self._pals_failed(e)
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            if link is not None:
                link.planned(self)
        if self._pals is not None:
            try:
                self._pals.telemetry.scheduled(output)
            except Exception as e:  # noqa: BLE001 - see the class
                self._pals_failed(e)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take a step's tokens, then publish."""
        result = super().update_from_output(scheduler_output, model_runner_output, *args, **kwargs)  # type: ignore[misc]
        if self._pals is not None:
            try:
                self._pals.publish(self, result, model_runner_output.sampled_token_ids)
            except Exception as e:  # noqa: BLE001 - see the class
                self._pals_failed(e)
        return result

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        """The engine stops: remove the channel."""
        link, self._pals = self._pals, None
        if link is not None:
            with contextlib.suppress(OSError):
                link.channel.close()
        return super().shutdown(*args, **kwargs)  # type: ignore[misc]

    def _pals_failed(self, error: Exception) -> None:
        """Log once, go back to the launch limits and stay silent from now on."""
        link, self._pals = self._pals, None
        log.error(
            "PALS plugin failed (%s: %s); the engine goes on at its launch limits without PALS",
            type(error).__name__,
            error,
        )
        if link is not None:
            with contextlib.suppress(Exception):  # the channel may be what failed; the limit is set first
                link.release(self)
