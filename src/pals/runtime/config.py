"""Configuration, parsed once at the edge into one frozen tree; unknown keys are errors that name the nearest known one."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from pals.control.interleaved import SMALLEST_SHARE, Interleaving
from pals.core.errors import ConfigError
from pals.core.quantities import LOWERINGS, EngineInfo, Slo
from pals.runtime.budgets import BudgetSchedule, parse_budget, parse_default
from pals.runtime.modes import MODES, with_share_apart
from pals.runtime.targets import EITHER, over, read_targets

LEAST_WINDOW_PERIODS = 6
POLICIES = (
    "static",
    "pals",
    "pals-paper",
    "cap-only",
    "batch-only",
    "clock-only",
    "vendor-preset",
    "bandit",
    "slo-clock",
)
WITHOUT_TARGET = ("static", "pals", "vendor-preset", "bandit", "slo-clock")  # they need no throughput target
OBJECTIVES = ("node", "gpu")
EXPERTS = ("auto", "off")
WRITERS = ("auto", "capd", "direct", "zeusd")
NODE_WIDE = ("period_s", "writer")  # of [control]: all engines share them


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """The policy and its period."""

    policy: str = "static"
    mode: str | None = None  # None: auto on emulated boards, advise on real ones
    writer: str = "auto"  # who writes limits and clocks: capd, this process itself, or zeusd
    period_s: float = 0.5
    profile: str | None = None
    accept_mismatch: bool = False  # use a profile made elsewhere, with wider intervals
    power_limit_w: float | None = None  # static only; None: the board's default
    active_sequences: int | None = None  # static only; None: the launch limit
    sm_clock_mhz: int | None = None  # static only; None: no clock lock
    lowering: str = "drain"  # how the engine gets under a lowered active-sequence limit
    objective: str = "node"  # pals only: whose joules count, the whole node's or the boards' alone
    experts: str = "auto"  # use the routing that an engine counts: auto where it does, or off
    canary_share: float = 0.1  # of windows in which the policy acts, in mode canary
    canary_window_s: float = 30.0
    canary_seed: int = 0
    canary_baseline: str = "static"  # the policy of the other windows

    @property
    def interleaving(self) -> Interleaving:
        """Which windows are the policy's, in mode canary."""
        return Interleaving(
            share=self.canary_share, window_s=self.canary_window_s, seed=self.canary_seed, baseline=self.canary_baseline
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """Where the agent's record goes."""

    journal: str | None = None  # None: in the run directory
    metrics_port: int = 9477
    dcgm_port: int = 0  # 0: off


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetEndpointConfig:
    """Where budgets may be put while the agent runs."""

    port: int = 0  # 0: nowhere
    host: str = "127.0.0.1"
    token: str | None = None  # the file that holds it


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything an agent needs to know."""

    control: ControlConfig = field(default_factory=ControlConfig)
    slo: Slo = field(default_factory=Slo)
    budget: BudgetSchedule = field(default_factory=BudgetSchedule)
    endpoint: BudgetEndpointConfig = field(default_factory=BudgetEndpointConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    engines: Mapping[str, Config] = field(default_factory=dict)  # by served name or model, where they differ from this

    def of(self, engine: EngineInfo) -> Config:
        """What holds for this engine.

        Raises:
            ConfigError: nothing is said of it, and what holds for all does not suffice.
        """
        for name in (engine.name, engine.model):
            if name in self.engines:
                return self.engines[name]
        check_complete(self, f" {engine.name}")
        return self


_SECTIONS: dict[str, type] = {"control": ControlConfig, "slo": Slo, "output": OutputConfig}
_NUMBER_TYPES: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "str": (str,), "bool": (bool,)}


def load_config(path: Path | None, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """Read a TOML file (None: defaults) and lay the command line's `overrides` (section → key → value) over it.

    Raises:
        ConfigError: unreadable file, unknown section or key, value of a wrong type or out of range.
    """
    if path is None:
        return _config_of({}, overrides, "command line")
    try:
        return _config_of(tomllib.loads(path.read_text(encoding="utf-8")), overrides, str(path))
    except (OSError, ValueError, OverflowError, RecursionError) as e:  # also numbers and tables too large to be told
        raise ConfigError(f"cannot read the configuration {path}: {e}. Nothing was started.") from e


def _config_of(data: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]] | None, source: str) -> Config:
    check_keys(data, [*_SECTIONS, "budget", "engine"], source, "section")
    general = {name: _table(data, name, source) for name in (*_SECTIONS, "budget")}
    engines = {
        name: _build_config(_for_engine(general, values, f"{source}: [engine.{name!r}]"), overrides, source)
        for name, values in _table(data, "engine", source).items()
    }
    for engine in engines.values():
        check_complete(engine)
    config = replace(_build_config(general, overrides, source), engines=engines)
    if not engines:
        check_complete(config)
    return config


def _build_config(
    tables: Mapping[str, Mapping[str, Any]], overrides: Mapping[str, Mapping[str, Any]] | None, source: str
) -> Config:
    merged: dict[str, Mapping[str, Any]] = {
        name: over(_read(name, values, source), _read(name, (overrides or {}).get(name, {}), "command line"))
        for name, values in tables.items()
    }
    merged["control"] = with_share_apart(merged["control"])
    parts = {name: _build(kind, merged[name], f"{source}: [{name}]") for name, kind in _SECTIONS.items()}
    budget, endpoint = _budget(merged["budget"], f"{source}: [budget]")
    return checked(replace(Config(budget=budget, endpoint=endpoint), **parts))


def _read(name: str, values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    return read_targets(values, f"{source}: [{name}]") if name == "slo" else values


def _budget(values: Mapping[str, Any], where: str) -> tuple[BudgetSchedule, BudgetEndpointConfig]:
    of_endpoint = [f.name for f in fields(BudgetEndpointConfig)]
    check_keys(values, ["power_w", "default", *of_endpoint], where)
    default_w = parse_default(values["default"], f"{where} default") if "default" in values else None
    schedule = BudgetSchedule(default_w=default_w)
    if "power_w" in values:
        schedule = parse_budget(str(values["power_w"]), default_w=default_w)
    endpoint = _build(BudgetEndpointConfig, {k: v for k, v in values.items() if k in of_endpoint}, where)
    return schedule, endpoint


def _for_engine(general: Mapping[str, Mapping[str, Any]], values: Any, where: str) -> Mapping[str, Mapping[str, Any]]:
    """The general tables with one engine's own values over them; all engines share one grid, one budget and one output."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a table of keys, not {values!r}")
    own = {name: [f.name for f in fields(_SECTIONS[name]) if f.name not in NODE_WIDE] for name in ("control", "slo")}
    own["slo"].append(EITHER)
    check_keys(values, [k for keys in own.values() for k in keys], where)
    mine = {name: {k: v for k, v in values.items() if k in keys} for name, keys in own.items()}
    return {
        name: over(_read(name, table, where), _read(name, mine.get(name, {}), where)) for name, table in general.items()
    }


def _table(data: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    table = data.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{source}: [{name}] must be a table of keys, not {table!r}")
    return table


def check_keys(given: Mapping[str, Any], known: list[str], where: str, what: str = "key") -> None:
    """Raise `ConfigError` for the first key of `given` that is not `known`, naming the nearest."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
            raise ConfigError(f"{where}: unknown {what} {key!r}; {hint} Nothing was started.")


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    known = {f.name: str(f.type) for f in fields(kind)}
    check_keys(values, list(known), where)
    for key, value in values.items():
        allowed = tuple(t for word, types in _NUMBER_TYPES.items() if word in known[key] for t in types)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(
                f"{where}: {key} = {value!r} is not a {known[key].replace(' | None', '')}. Nothing was started."
            )
        if isinstance(value, float | int) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key} = {value!r} is not a finite number. Nothing was started.")
    as_float = {k: float(v) if "float" in known[k] else v for k, v in values.items()}
    return kind(**as_float)


def checked(config: Config) -> Config:
    """`config` itself; raises `ConfigError` where values are unknown or out of range."""
    c = config.control
    chosen: list[tuple[str, str | None, Sequence[str]]] = [
        ("policy", c.policy, POLICIES),
        ("mode", c.mode, MODES),
        ("writer", c.writer, WRITERS),
        ("canary_baseline", c.canary_baseline, POLICIES),
        ("lowering", c.lowering, LOWERINGS),
        ("objective", c.objective, OBJECTIVES),
        ("experts", c.experts, EXPERTS),
    ]
    for name, value, known in chosen:
        if value is not None and value not in known:
            check_keys({value: None}, list(known), "[control]", name)
    for holds, message in (*_control_rules(c), *_slo_rules(config.slo), *_port_rules(config)):
        if not holds:
            raise ConfigError(f"{message}. Nothing was started.")
    return config


Rule = tuple[bool, str]  # whether it holds, and what is said where not


def _control_rules(c: ControlConfig) -> list[Rule]:
    return [
        (0.05 <= c.period_s <= 60, f"[control] period_s = {c.period_s} must lie in 0.05..60"),
        (
            SMALLEST_SHARE <= c.canary_share <= 1 - SMALLEST_SHARE,
            f"[control] canary_share = {c.canary_share:g} must lie in {SMALLEST_SHARE:g}..{1 - SMALLEST_SHARE:g}; modes auto and "
            "advise act always and never",
        ),
        (
            c.canary_window_s >= LEAST_WINDOW_PERIODS * c.period_s,
            f"[control] canary_window_s = {c.canary_window_s:g} must be at least {LEAST_WINDOW_PERIODS} control periods",
        ),
        (c.active_sequences is None or c.active_sequences >= 1, "[control] active_sequences must be at least 1"),
    ]


def _slo_rules(slo: Slo) -> list[Rule]:
    values = {f.name: getattr(slo, f.name) for f in fields(slo)}
    share = slo.throughput_share
    return [
        *((v is None or v > 0, f"[slo] {name} = {v} must be positive") for name, v in values.items()),
        (share is None or share <= 1, f"[slo] throughput_share = {share} must lie in 0..1, or be a text like '90%'"),
    ]


def _port_rules(config: Config) -> list[Rule]:
    ports = {
        "[output] metrics_port": config.output.metrics_port,
        "[output] dcgm_port": config.output.dcgm_port,
        "[budget] port": config.endpoint.port,
    }
    return [
        *((0 <= port <= 65535, f"{name} = {port} must lie in 0..65535 (0: off)") for name, port in ports.items()),
        *(
            (p == 0 or p != q, f"{a} and {b} are both {p}; they must differ")
            for (a, p), (b, q) in combinations(ports.items(), 2)
        ),
        (
            config.endpoint.port == 0 or bool(config.endpoint.token),
            "a budget port needs a token: give --budget-token FILE (or [budget] token)",
        ),
    ]


def check_complete(config: Config, told: str = "") -> None:
    """Raise `ConfigError` where the policy, or what a canary compares it with, lacks what it steers by."""
    control = config.control
    for policy in dict.fromkeys((control.policy, control.canary_baseline if control.mode == "canary" else "static")):
        _check_targets(policy, config.slo, told)


def _check_targets(policy: str, slo: Slo, told: str) -> None:
    latencies = (slo.ttft_p95_s, slo.tpot_p95_s, slo.ttft_p99_s, slo.tpot_p99_s)
    if policy == "slo-clock" and not any(latencies):
        raise ConfigError(
            f"policy slo-clock steers{told} by latency targets: give --slo-ttft-p95 or --slo-tpot-p95 (or [slo] ttft_p95_s, …). "
            "Nothing was started"
        )
    if policy in WITHOUT_TARGET or slo.throughput_tokens_s is not None:
        return
    if slo.throughput_share is not None:
        raise ConfigError(
            f"policy {policy} steers{told} by tokens per second and does not know what {100 * slo.throughput_share:g}% of "
            "the most throughput is: give --throughput-target in tokens/s, like 1500, or use --policy pals. Nothing was started"
        )
    raise ConfigError(
        f"policy {policy} steers{told} by a throughput target: give --throughput-target in tokens/s, like 1500 (or [slo] "
        "throughput_tokens_s). Nothing was started"
    )
