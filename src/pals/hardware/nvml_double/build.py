"""Builds the library with the C compiler that is there, into a cache folder named after everything that went into it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from pals.core.errors import INSTALL, ConfigError
from pals.plant.bank_layout import c_header

SONAME = "libnvidia-ml.so.1"
FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
COMPILERS = ("cc", "gcc", "clang")
NOT_SUPPORTED = 3


def library(cache: Path, environ: Mapping[str, str], sources: Mapping[str, str] | None = None) -> Path:
    """The folder that holds the library, built there where it is not yet; older builds stay for those who use them.

    `sources` (file name → text) are those of this package by default; another text gives another folder.

    Raises:
        ConfigError: no C compiler, no nvidia-ml-py to take the names from, or the build failed.
    """
    sources = all_sources() if sources is None else sources
    compiler = _compiler(environ)
    digest = hashlib.blake2b(repr((sorted(sources.items()), compiler, FLAGS)).encode(), digest_size=8).hexdigest()
    folder = cache / digest
    if not (folder / SONAME).exists():
        _build(folder, sources, compiler)
    return folder


def entry_points() -> list[str]:
    """Every function nvidia-ml-py knows, by its C name.

    Raises:
        ConfigError: nvidia-ml-py is not installed.
    """
    spec = importlib.util.find_spec("pynvml")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "nvidia-ml-py is not installed and the library's list of functions comes from it; "
            f"{INSTALL}. Nothing was built"
        )
    text = Path(spec.origin).read_text(encoding="utf-8")
    return sorted(set(re.findall(r'_nvmlGetFunctionPointer\("(nvml\w+)"\)', text)))


def stubs(names: list[str]) -> str:
    """C that answers NOT_SUPPORTED for every name, unless another file defines it."""
    head = '__attribute__((weak, visibility("default"))) int'
    return "\n".join(f"{head} {name}(void) {{ return {NOT_SUPPORTED}; }}" for name in names) + "\n"


def all_sources() -> dict[str, str]:
    """What is compiled: the files of this package, the bank's layout, and the stubs."""
    here = files("pals.hardware.nvml_double")
    own = {f.name: f.read_text(encoding="utf-8") for f in here.iterdir() if f.name.endswith((".c", ".h"))}
    return {**own, "bank_layout.h": c_header(), "stubs.c": stubs(entry_points())}


def _compiler(environ: Mapping[str, str]) -> str:
    wanted = [environ["CC"]] if environ.get("CC") else list(COMPILERS)
    for name in wanted:
        if found := shutil.which(name, path=environ.get("PATH")):
            return found
    raise ConfigError(
        f"no C compiler found (looked for {', '.join(wanted)}); install one, e.g. `apt install gcc`, or name it with CC=. "
        "Nothing was built; PALS itself does not need it"
    )


def _build(folder: Path, sources: Mapping[str, str], compiler: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as temporary:
        work = Path(temporary)
        for name, text in sources.items():
            (work / name).write_text(text, encoding="utf-8")
        made = work / "made"
        made.mkdir()
        names = sorted(name for name in sources if name.endswith(".c"))
        command = [compiler, *FLAGS, f"-Wl,-soname,{SONAME}", "-o", f"made/{SONAME}", *names, "-lm"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(
                f"{compiler} could not build {SONAME}; nothing was installed:\n{done.stderr.strip()[-2000:]}"
            )
        (made / "libnvidia-ml.so").symlink_to(SONAME)
        try:
            made.rename(folder)
        except OSError:  # somebody else was faster
            if not (folder / SONAME).exists():
                raise
