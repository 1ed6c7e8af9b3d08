"""Every experiment by name, in the order in which `all` runs them."""

from __future__ import annotations

from pals.experiments.lab.ablations import Ablations
from pals.experiments.lab.dynamic_budget import DynamicBudget
from pals.experiments.lab.experiment import Experiment
from pals.experiments.lab.experts import Experts
from pals.experiments.lab.live_check import LiveCheck
from pals.experiments.lab.no_loss import NoLoss
from pals.experiments.lab.open_loop import OpenLoopTraces
from pals.experiments.lab.paper_single_node import PaperSingleNode
from pals.experiments.lab.price import Price
from pals.experiments.lab.qos_budget import QosBudget
from pals.experiments.lab.surprises import Surprises

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        PaperSingleNode(), Price(), QosBudget(), DynamicBudget(), OpenLoopTraces(), NoLoss(), Surprises(), Ablations(),
        Experts(), LiveCheck(),
    )
}  # fmt: skip
