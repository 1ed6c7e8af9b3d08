"""The one file that imports numba: compiles the simulator's plain functions, none of which it changes or copies.

What is compiled is kept on disk by numba, next to this file or in the user's cache folder. numba looks at the entry's file
alone to see whether that is stale; so a digest of every compiled source is part of the key.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from pals.core import admission
from pals.core.errors import ConfigError
from pals.plant import (
    governor,
    llm_step,
    replica_batch,
    replica_plan,
    replica_power,
    replica_run,
    replica_state,
    silicon,
)

Advance = Callable[..., bool]
run = replica_run.advance  # numba resolves it by this name
_MODULES = (admission, silicon, governor, llm_step, replica_batch, replica_plan, replica_power, replica_run)


@cache
def compiled_advance() -> Advance:
    """`replica_run.advance`, compiled at its first call or read from the cache.

    Raises:
        ConfigError: numba is not installed.
    """
    try:
        from numba import njit
        from numba.extending import register_jitable
    except ImportError as e:
        raise ConfigError(
            f"the compiled simulator needs numba ({e}): pip install 'pals-llm[simulate]', or pass compiled=False "
            "(some hundred times slower). Nothing was simulated"
        ) from e
    for module in _MODULES:
        for function in functions_of(module):
            register_jitable(function)
    entry: Advance = njit(cache=True, error_model="numpy")(entry_of(digest()))
    return entry


def functions_of(module: ModuleType) -> list[Callable[..., Any]]:
    """The functions that `module` itself defines; numba compiles those the simulator calls."""
    return [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]


def digest() -> int:
    """A number that changes whenever a compiled source does."""
    h = hashlib.blake2b(digest_size=7)
    for module in (*_MODULES, replica_state):
        h.update(inspect.getsource(module).encode())
    return int.from_bytes(h.digest())


def entry_of(build: int) -> Advance:
    """The function to compile; `build` is in its closure, hence in numba's key."""

    def advance(m: Any, tables: Any, silicon: Any, firmware: Any, until_s: float) -> bool:
        m.state[0]["build"] = build
        return run(m, tables, silicon, firmware, until_s)

    return advance
