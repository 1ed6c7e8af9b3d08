"""Configuration, parsed once at the edge into one frozen tree; unknown keys are errors that name the nearest known one."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pals.control.interleaved import SMALLEST_SHARE, Interleaving
from pals.core.errors import ConfigError
from pals.core.quantities import LOWERINGS, EngineInfo, Slo
from pals.runtime.budgets import BudgetSchedule, parse_budget
from pals.runtime.modes import MODES, with_share_apart

LEAST_WINDOW_PERIODS = 6
POLICIES = ("static", "pals-paper", "cap-only", "batch-only", "clock-only")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """The policy and its period."""

    policy: str = "static"
    mode: str | None = None  # None: auto on emulated boards, advise on real ones
    period_s: float = 0.5
    profile: str | None = None
    accept_mismatch: bool = False  # use a profile made elsewhere, with wider intervals
    power_limit_w: float | None = None  # static only; None: the board's default
    active_sequences: int | None = None  # static only; None: the launch limit
    sm_clock_mhz: int | None = None  # static only; None: no clock lock
    lowering: str = "drain"  # how the engine gets under a lowered active-sequence limit
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
class Config:
    """Everything an agent needs to know."""

    control: ControlConfig = field(default_factory=ControlConfig)
    slo: Slo = field(default_factory=Slo)
    budget: BudgetSchedule = field(default_factory=BudgetSchedule)
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
    data: dict[str, dict[str, Any]] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise ConfigError(f"cannot read the configuration {path}: {e}") from e
    source = str(path) if path is not None else "command line"
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
        name: {**values, **{k: v for k, v in (overrides or {}).get(name, {}).items() if v is not None}}
        for name, values in tables.items()
    }
    merged["control"] = with_share_apart(merged["control"])
    check_keys(merged["budget"], ["power_w"], f"{source}: [budget]")
    parts = {name: _build(kind, merged[name], f"{source}: [{name}]") for name, kind in _SECTIONS.items()}
    budget = parse_budget(str(merged["budget"]["power_w"])) if "power_w" in merged["budget"] else BudgetSchedule()
    return checked(replace(Config(budget=budget), **parts))


def _for_engine(general: Mapping[str, Mapping[str, Any]], values: Any, where: str) -> Mapping[str, Mapping[str, Any]]:
    """The general tables with one engine's own values over them; all engines share one grid, one budget and one output."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a table of keys, not {values!r}")
    own = {name: [f.name for f in fields(_SECTIONS[name]) if f.name != "period_s"] for name in ("control", "slo")}
    check_keys(values, [k for keys in own.values() for k in keys], where)
    return {
        name: {**table, **{k: v for k, v in values.items() if k in own.get(name, ())}}
        for name, table in general.items()
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
    c, slo, out = config.control, config.slo, config.output
    if c.policy not in POLICIES:
        check_keys({c.policy: None}, list(POLICIES), "[control]", "policy")
    if c.mode is not None and c.mode not in MODES:
        check_keys({c.mode: None}, list(MODES), "[control]", "mode")
    if c.canary_baseline not in POLICIES:
        check_keys({c.canary_baseline: None}, list(POLICIES), "[control]", "canary_baseline")
    if c.lowering not in LOWERINGS:
        check_keys({c.lowering: None}, list(LOWERINGS), "[control]", "lowering")
    rules = [
        (0.05 <= c.period_s <= 60, f"[control] period_s = {c.period_s} must lie in 0.05..60"),
        (0 <= out.metrics_port <= 65535, f"[output] metrics_port = {out.metrics_port} must lie in 0..65535 (0: off)"),
        (0 <= out.dcgm_port <= 65535, f"[output] dcgm_port = {out.dcgm_port} must lie in 0..65535 (0: off)"),
        (
            out.dcgm_port == 0 or out.dcgm_port != out.metrics_port,
            f"[output] metrics_port and dcgm_port are both {out.dcgm_port}; they must differ",
        ),
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
        *(
            (value is None or value > 0, f"[slo] {f.name} = {value} must be positive")
            for f in fields(slo)
            for value in [getattr(slo, f.name)]
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"{message}. Nothing was started.")
    return config


def check_complete(config: Config, told: str = "") -> None:
    """Raise `ConfigError` where the policy lacks what it steers by."""
    compared = config.control.canary_baseline if config.control.mode == "canary" else "static"
    if {config.control.policy, compared} != {"static"} and config.slo.throughput_tokens_s is None:
        raise ConfigError(
            f"policy {config.control.policy} steers{told} by a throughput target: give --target-tokens-s (or [slo] throughput_tokens_s)"
        )
