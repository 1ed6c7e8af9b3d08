"""Findings about what is installed here, and about variables that change what an engine started from here would do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pals.core.diagnosis import Finding, RunDirFacts, SoftwareFacts, Status, finding

OK, WARNING, PROBLEM = Status.OK, Status.WARNING, Status.PROBLEM
OPTIONAL = {
    "nvidia-ml-py": (PROBLEM, "boards can be neither read nor set without it"),
    "aiohttp": (WARNING, "pals profile and pals demo need it"),
    "matplotlib": (WARNING, "pals demo draws no figure without it"),
}


def packages(facts: SoftwareFacts, *, real_boards: bool) -> Iterator[Finding]:
    """vLLM, PALS's place in it, and optional packages."""
    yield _vllm(facts, real_boards=real_boards)
    yield _entry_points(facts)
    for name, (status, why) in OPTIONAL.items():
        version = facts.packages.get(name)
        yield finding(
            "software", "package", OK if version else status, version or f"not installed: {why}", subject=name,
            remedy=None if version else f"pip install {name}", version=version,
        )  # fmt: skip
    old = facts.packages.get("pynvml")
    if old and old.split(".")[0].isdigit() and int(old.split(".")[0]) < 12:
        yield finding(
            "software", "package", WARNING, f"{old}: outdated, puts its own module in place of nvidia-ml-py's",
            subject="pynvml", remedy="pip uninstall pynvml; pip install --force-reinstall nvidia-ml-py", version=old,
        )  # fmt: skip


def _vllm(facts: SoftwareFacts, *, real_boards: bool) -> Finding:
    made_for = f"PALS is made for {facts.vllm_wanted or 'versions its metadata does not name here'}"
    status, remedy = OK, None
    if facts.vllm is None:
        status, text = (
            WARNING,
            "not installed here: pals serve cannot start; engines of other environments can be steered",
        )
        remedy = f"pip install 'vllm{facts.vllm_wanted or ''}'"
    elif facts.vllm_has_kernels is False and real_boards:
        status, text = PROBLEM, f"{facts.vllm}, the pure-Python build: it serves on emulated boards only"
        remedy = f"for these GPUs: pip install --force-reinstall --no-deps vllm=={facts.vllm}"
    else:
        text = f"{facts.vllm}{', pure-Python build' if facts.vllm_has_kernels is False else ''}; {made_for}"
        if facts.vllm_fits is False:
            status, remedy = WARNING, f"pip install 'vllm{facts.vllm_wanted}'; the plugin takes what it finds"
    return finding(
        "software", "vllm", status, text, subject="vLLM", remedy=remedy, version=facts.vllm,
        wanted=facts.vllm_wanted, fits=facts.vllm_fits, has_kernels=facts.vllm_has_kernels, python=facts.python,
    )  # fmt: skip


def _entry_points(facts: SoftwareFacts) -> Finding:
    found = list(facts.entry_points)
    status, remedy = OK, None
    text = f"vLLM here finds PALS {facts.pals} (plugin and emulated platform)"
    if len(found) < 2:
        status, text = PROBLEM, f"vLLM here would not find PALS; entry points registered: {', '.join(found) or 'none'}"
        remedy = "in a checkout of PALS: pip install --no-deps -e . (with the Python of vLLM's environment)"
    return finding(
        "software", "entry-points", status, text, subject="plugin", remedy=remedy, entry_points=found, pals=facts.pals
    )


def run_directory(folder: RunDirFacts) -> Finding:
    """Whether engine and agent can meet there."""
    state = ("exists" if folder.exists else "will be made") if folder.writable else "is not writable for this user"
    return finding(
        "environment", "run-directory", OK if folder.writable else PROBLEM, f"{folder.path} {state}",
        subject="run directory", path=folder.path, exists=folder.exists, writable=folder.writable,
        remedy=None if folder.writable else "set PALS_RUN_DIR to a folder that engine and agent may both write",
    )  # fmt: skip


def variables(environ: Mapping[str, str], *, emulated: bool, mixed_boards: bool) -> Iterator[Finding]:
    """Variables of this shell that surprise people; one ok where there is none."""
    found = [*_plugin_traps(environ, emulated=emulated), *_board_traps(environ, mixed_boards=mixed_boards)]
    yield from found
    if not found:
        yield finding("environment", "variables", OK, "none stands in the way", subject="variables")


def _plugin_traps(environ: Mapping[str, str], *, emulated: bool) -> Iterator[Finding]:
    plugins = environ.get("VLLM_PLUGINS")
    named = [p.strip() for p in (plugins or "").split(",")]
    if plugins is not None and "pals" not in named:
        yield _trap(
            "VLLM_PLUGINS", plugins, PROBLEM, "vLLM loads only what it names, and pals is not among it",
            "unset VLLM_PLUGINS, or add pals (and pals_emulated to emulate)",
        )  # fmt: skip
    elif plugins is not None and "pals_emulated" not in named:
        yield _trap(
            "VLLM_PLUGINS", plugins, WARNING, "names pals but not pals_emulated: emulated boards will not work",
            "add pals_emulated if you want to emulate",
        )  # fmt: skip
    if environ.get("PALS_PLUGIN") == "0":
        yield _trap("PALS_PLUGIN", "0", WARNING, "engines started from here run without PALS", "unset PALS_PLUGIN")
    if (emu := environ.get("PALS_EMU")) and not emulated:
        yield _trap(
            "PALS_EMU", emu, WARNING, "whatever its value, vLLM started from here emulates and uses no GPU",
            "unset PALS_EMU; pals serve --emulate sets it for its own engine",
        )  # fmt: skip
    if (target := environ.get("VLLM_TARGET_DEVICE")) == "cpu":
        yield _trap(
            "VLLM_TARGET_DEVICE", target, WARNING, "at run time it makes vLLM skip platform plugins",
            "unset it once vLLM is installed",
        )  # fmt: skip


def _board_traps(environ: Mapping[str, str], *, mixed_boards: bool) -> Iterator[Finding]:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible and not all(v.strip().isdigit() for v in visible.split(",")):
        yield _trap(
            "CUDA_VISIBLE_DEVICES", visible, WARNING, "lists no indices, so an engine cannot say which boards it uses",
            "list indices, e.g. CUDA_VISIBLE_DEVICES=0,1",
        )  # fmt: skip
    order = environ.get("CUDA_DEVICE_ORDER", "not set")
    if mixed_boards and order != "PCI_BUS_ID":
        yield _trap(
            "CUDA_DEVICE_ORDER", order, WARNING, "with boards of several types, CUDA numbers them otherwise than NVML",
            "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )  # fmt: skip


def _trap(name: str, value: str, status: Status, text: str, remedy: str) -> Finding:
    return finding("environment", "variables", status, f"{value!r}: {text}", subject=name, remedy=remedy, value=value)
