"""Optional packages, asked for before anything is started."""

from __future__ import annotations

from importlib.util import find_spec

from pals.core.errors import INSTALL, ConfigError

PACKAGES = {  # by module
    "vllm": "vllm", "pynvml": "nvidia-ml-py", "aiohttp": "aiohttp", "matplotlib": "matplotlib", "scipy": "scipy",
    "pyarrow": "pyarrow", "numba": "numba", "sklearn": "scikit-learn",
}  # fmt: skip


def installed(module: str) -> bool:
    """Whether the module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def require(*modules: str) -> None:
    """Raise `ConfigError` where one of these modules is not installed."""
    missing = [PACKAGES[m] for m in modules if not installed(m)]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        raise ConfigError(f"{', '.join(missing)} {are} not installed; {INSTALL}. Nothing was started")
