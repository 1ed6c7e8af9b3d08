"""What this Python environment offers to an engine: vLLM, PALS's entry points, packages, variables; imports none of them."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

from pals import __version__
from pals.core.diagnosis import SoftwareFacts

DISTRIBUTION = "pals-llm"
PACKAGES = ("nvidia-ml-py", "aiohttp", "matplotlib", "pynvml")
GROUPS = {"vllm.general_plugins": "pals", "vllm.platform_plugins": "pals_emulated"}
VARIABLES = (
    "PALS_RUN_DIR",
    "PALS_PLUGIN",
    "PALS_EXPERTS",
    "PALS_EMU",
    "PALS_EMU_BOARDS",
    "VLLM_PLUGINS",
    "VLLM_TARGET_DEVICE",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
)


def probe_software(environ: Mapping[str, str]) -> SoftwareFacts:
    """Look at the installed distributions and at `environ`."""
    vllm = version_of("vllm")
    wanted = wanted_vllm()
    return SoftwareFacts(
        python=platform.python_version(),
        pals=__version__,
        vllm=vllm,
        vllm_wanted=wanted,
        vllm_fits=fits(vllm, wanted) if vllm and wanted else None,
        vllm_has_kernels=has_kernels() if vllm else None,
        entry_points=tuple(
            f"{group}: {name}" for group, name in GROUPS.items() if metadata.entry_points(group=group, name=name)
        ),
        packages={name: version_of(name) for name in PACKAGES},
        environment={name: environ[name] for name in VARIABLES if name in environ},
    )


def version_of(distribution: str) -> str | None:
    """Its installed version; None where it is missing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def wanted_vllm() -> str | None:
    """The vLLM versions that PALS's own metadata names, such as ">=0.28,<0.34"."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    found = (re.match(r"vllm\s*([<>=!~][^;]*)", r) for r in requirements)
    return next(
        (",".join(sorted(m[1].strip().split(","), reverse=True)) for m in found if m), None
    )  # lower bound first


def fits(version: str, wanted: str) -> bool | None:
    """Whether `version` satisfies `wanted`; None where that cannot be told."""
    try:
        from packaging.specifiers import SpecifierSet
        from packaging.version import InvalidVersion, Version
    except ImportError:  # comes with vLLM
        return None
    try:
        return SpecifierSet(wanted).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return None


def has_kernels() -> bool | None:
    """Whether the installed vLLM has compiled kernels; the pure-Python build runs on emulated boards only."""
    spec = util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return any(any(Path(folder).glob("_C*.so")) for folder in spec.submodule_search_locations)
