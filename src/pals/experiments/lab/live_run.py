"""The lab's runs on real vLLM over emulated boards, in a process of their own: vLLM's import changes the process it happens in.

Run as a module with a folder, it is that process: it serves the tasks of the folder and leaves their figures there.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pals.core.errors import INSTALL, ConfigError, PalsError
from pals.engines.emulated_world import emulating
from pals.engines.model_zoo import local_folder
from pals.engines.vllm_launcher import die_with_parent
from pals.experiments.lab.engines import locked
from pals.experiments.lab.figures import Figures, figures_of
from pals.experiments.lab.live_plant import LivePlant
from pals.experiments.lab.loads import Feed
from pals.experiments.lab.meter import SpanMeter
from pals.experiments.lab.run import RunTask, answers_between
from pals.experiments.virtual_run import BANK_FILE, LiveNode, VirtualNode, drive, running
from pals.models.profile import Profile
from pals.runtime.agent import AgentSetup, open_session
from pals.runtime.config import Config, OutputConfig
from pals.runtime.tick import TickRecord

TASKS, FIGURES, PROFILE, JOURNAL = "tasks.pickle", "figures.pickle", "profile.json", "journal.jsonl"
TOLD_LINES = 12  # of a process that failed
NEEDED = {"vllm": "vllm", "pynvml": "nvidia-ml-py"}  # by module


def emulate(tasks: Sequence[RunTask], place: Path) -> list[Figures]:
    """The figures of each task, served by real vLLM in a new process; only one such process runs at a time below `place`.

    Raises:
        ConfigError: vLLM is not installed.
        PalsError: the process failed; says why.
    """
    check_installed(NEEDED)
    with locked(place / "emulated.lock"), tempfile.TemporaryDirectory(prefix="pals-live-") as scratch:
        folder = Path(scratch)
        (folder / TASKS).write_bytes(pickle.dumps(list(tasks)))
        ended = subprocess.run(
            [sys.executable, "-m", "pals.experiments.lab.live_run", scratch], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, preexec_fn=die_with_parent, check=False,
        )  # fmt: skip
        if ended.returncode != 0:
            told = "\n".join(ended.stderr.splitlines()[-TOLD_LINES:])
            raise PalsError(f"the process with real vLLM ended with exit code {ended.returncode}: {told}")
        found: list[Figures] = pickle.loads((folder / FIGURES).read_bytes())
        return found


def check_installed(needed: Mapping[str, str]) -> None:
    """Raise `ConfigError` where one of these modules (value: its package) is not installed; none is imported."""
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise ConfigError(f"not installed: {', '.join(missing)}, and real vLLM serves here; {INSTALL}. Nothing was run")


def serve(task: RunTask, folder: Path) -> Figures:
    """One task on a node of its own in this process; `folder` is new and becomes the run directory.

    Raises:
        ConfigError: the profile does not fit this engine, or vLLM refuses an option.
    """
    sim = task.sim
    options = [
        "--tensor-parallel-size", str(sim.boards), "--max-num-seqs", str(sim.max_num_seqs), "--max-num-batched-tokens",
        str(sim.max_num_batched_tokens), f"--{'' if sim.prefix_caching else 'no-'}enable-prefix-caching",
    ]  # fmt: skip
    with emulating(sim.model, folder, folder / BANK_FILE):
        node = VirtualNode(
            model=local_folder(sim.model, folder.parent / "models"), options=options, spec=sim.spec, count=sim.boards,
            board_seed=sim.board_seed, folder=folder,
        )  # fmt: skip
        with running(node) as live:
            watched, stop = _Watched(live, task), threading.Event()
            setup = AgentSetup(
                find=lambda: (live.channel,), open_boards=lambda group: live.nvml.boards, config=_config(task, live),
                emulated=True, may_write=True, folder=folder, watch=lambda name, boards: watched,
                say=lambda text: None, virtual_command="pals experiment run live-check",
            )  # fmt: skip
            with closing(open_session(setup, live.channel, live.channel.info.name, folder / JOURNAL)) as session:
                drive(live, session, setup.config, watched, stop)
    return watched.figures()


class _Watched:
    """Feeds the load and meters each tick, in the order of a simulated run; is over when the load is."""

    def __init__(self, live: LiveNode, task: RunTask) -> None:
        plant: Any = LivePlant(live, seed=task.seed)  # a replica for what is asked here
        self._task, self._plant = task, plant
        self._figures: Figures | None = None
        self._meter = SpanMeter(plant, task.load.warmup_s)
        self._feed: Feed = task.load.start(plant, task.rng())

    @property
    def answered(self) -> bool:
        """Whether the load is over."""
        return self._figures is not None

    def observe(self, record: TickRecord) -> None:
        """Take one tick."""
        if self._figures is not None:
            return
        self._meter.observe(record)
        if not self._feed.over(record.sample.time_s):
            self._feed.feed()
            return
        ledger = self._meter.ledger()
        answers = answers_between(self._plant, ledger.time_s[0], ledger.time_s[-1])
        self._figures = figures_of(answers, ledger, self._task.slo, boards=self._task.sim.boards)

    def close(self) -> None:
        """Nothing is open."""

    def figures(self) -> Figures:
        """Of the whole run."""
        if self._figures is None:
            raise PalsError("the emulated run ended before its measured span did; there are no figures")
        return self._figures


def _config(task: RunTask, live: LiveNode) -> Config:
    """The task's configuration; its profile is taken for this vLLM release, as the simulated side does."""
    config, info = task.config, live.channel.info
    told = None
    if task.profile is not None:
        told = live.folder / PROFILE
        told.write_text(_of_release(task.profile, info.version, info.build).to_json(), encoding="utf-8")
    control = replace(config.control, profile=None if told is None else str(told))
    return replace(config, control=control, output=OutputConfig(journal=str(live.folder / JOURNAL)))


def _of_release(profile: Profile, version: str, build: str | None) -> Profile:
    """Emulated boards take the same time under each release that is supported."""
    return replace(profile, fingerprint=replace(profile.fingerprint, engine_version=version, engine_build=build))


def main(argv: Sequence[str]) -> int:
    """The process: serve every task of a folder."""
    place = Path(argv[0])
    tasks: list[RunTask] = pickle.loads((place / TASKS).read_bytes())
    found = []
    try:
        for i, task in enumerate(tasks):
            folder = place / f"run-{i}"
            folder.mkdir()
            found.append(serve(task, folder))
    except PalsError as e:
        print(e, file=sys.stderr)
        return 2
    (place / FIGURES).write_bytes(pickle.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
