"""The few lines that a README carries, between two marks, and nothing beside them is touched."""

from __future__ import annotations

from collections.abc import Sequence

from pals.core.errors import ConfigError
from pals.experiments.lab.experiment import Verdict
from pals.experiments.lab.pages import grid, verdict_line
from pals.experiments.lab.report.sections import Told

BEGIN, END = "<!-- experiments: begin -->", "<!-- experiments: end -->"
MOST_MISSED = 3  # lines of missed promises of one experiment
HEADER = ("promise (simulated)", "target", "measured", "over seeds", "seeds", "verdict")


def headline(told: Sequence[Told], command: str) -> str:
    """A table: of each experiment its first promise and those that were missed, then how many of all were kept."""
    lines = list[list[str]]()
    for t in told:
        reached, missed, left = t.counts
        for v in shown_of(t.verdicts):
            what, target, measured, spread, seeds, _ = verdict_line(v)
            word = "reached" if v.reached else "**missed**"
            lines.append([f"`{t.experiment.name}`: {what}", target, measured, spread, seeds, word])
        total = f"{reached} of {len(t.verdicts)} reached, {missed} missed, {left} not judged"
        lines.append([f"`{t.experiment.name}`, all promises ({t.coverage.told} cells)", "", "", "", "", total])
    return f"{grid(HEADER, lines)}\n\nMade by `{command}`.\n"


def shown_of(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The first that is judged, and the first missed ones."""
    judged = [v for v in verdicts if v.reached is not None]
    missed = [v for v in judged[1:] if v.reached is False][:MOST_MISSED]
    return [*judged[:1], *missed]


def put_between(text: str, table: str) -> str:
    """`text` with `table` between its marks.

    Raises:
        ConfigError: the marks are not there, or not once each in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"the file must hold `{BEGIN}` and after it `{END}`, once each. Nothing was written")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}"
