"""Synthetic expert counts for the tests: skewed popularity, tokens that draw their experts from it, published as a worker does."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pals.cli.experts import Look, print_looked
from pals.core.experts import Counts, FloatArray
from pals.core.quantities import EngineInfo
from pals.runtime.channel import EngineChannel, find_engines
from pals.runtime.expert_channel import ExpertChannel, ExpertFacts
from pals.runtime.group import EngineGroup
from pals.views.expert_figure import draw_experts
from pals.views.expert_text import plain_experts
from tests.worlds import engine_info


@dataclass
class ExpertEngine:
    """This process as an engine that counts experts, in `folder`; all is drawn from `seed`.

    Layers named in `bypassed` are counted by nobody. `tilt` is the popularity's exponent: 0 is even.
    """

    folder: Path
    name: str = "synthetic/moe"
    layers: int = 8
    experts: int = 64
    top_k: int = 8
    ranks: int = 1
    bypassed: tuple[int, ...] = ()
    tilt: float = 0.5
    seed: int = 7
    time_s: float = 100.0
    steps: int = 0
    tokens: int = 0
    channel: ExpertChannel | None = None
    info: EngineInfo = field(init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self.info = engine_info(os.getpid())
        self.names = tuple(f"model.layers.{i}.mlp.experts" for i in range(self.layers))
        self._sums: Counts = np.zeros((self.layers, self.experts + 1), np.int64)
        self.shuffle()

    def start(self, **info: Any) -> None:
        """The engine's own channel: it runs."""
        EngineChannel(self.folder, replace(self.info, model=self.name, **info), name=self.name.replace("/", "-"))

    def shuffle(self) -> None:
        """Another workload: the same skew on other experts."""
        ranked = (1.0 + np.arange(self.experts)) ** -self.tilt
        self._chance: FloatArray = np.array(
            [self._random.permutation(ranked / ranked.sum()) for _ in range(self.layers)]
        )

    def serve(self, seconds: float, *, steps_per_s: float = 20.0, tokens: int = 32) -> None:
        """Take steps of `tokens` tokens, each with `top_k` different experts in every layer, and publish."""
        steps = round(seconds * steps_per_s)
        for layer in set(range(self.layers)) - set(self.bypassed):
            keys = np.log(self._chance[layer]) + self._random.gumbel(size=(steps, tokens, self.experts))
            chosen = np.argpartition(-keys, self.top_k, axis=2)[:, :, : self.top_k].reshape(steps, -1)
            self._sums[layer, :-1] += np.bincount(chosen.ravel(), minlength=self.experts)
            self._sums[layer, -1] += sum(len(np.unique(step)) for step in chosen)
        self.time_s, self.steps, self.tokens = self.time_s + seconds, self.steps + steps, self.tokens + steps * tokens
        self.publish()

    def publish(self) -> None:
        """As the worker does."""
        if self.channel is None:
            facts = ExpertFacts(
                pid=os.getpid(), engine_pid=self.info.pid, tensor_rank=0, data_rank=0, layers=self.names,
                experts=self.experts, top_k=self.top_k, ranks=self.ranks, placement="linear",
                bypassed=tuple(self.names[i] for i in self.bypassed),
            )  # fmt: skip
            self.channel = ExpertChannel(self.folder, facts)
        self.channel.publish(time_s=self.time_s, steps=self.steps, tokens=self.tokens, sums=self._sums)


def demonstration(folder: Path, *, figure: Path | None = None, width: int = 104) -> str:
    """What a watch of six windows shows at its end; the workload changes after the third. All of it synthetic."""
    engine = ExpertEngine(folder, layers=8, ranks=4, bypassed=(5,))
    engine.start()
    engine.serve(30.0)
    look = Look(EngineGroup(find_engines(folder)), folder)
    for nth in range(6):
        if nth == 3:
            engine.shuffle()
        picture = look.again(partial(engine.serve, 5.0))
    if figure is not None:
        draw_experts(picture, look.over_time, figure)
    return plain_experts(partial(print_looked, picture, look.over_time), width=width)


if __name__ == "__main__":
    with TemporaryDirectory() as made:
        print(demonstration(Path(made), figure=Path(sys.argv[1]) if len(sys.argv) > 1 else None))
