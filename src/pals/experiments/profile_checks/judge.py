"""One case judged: every method learns the same rows of every split and answers the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pals.experiments.profile_checks.case import Case
from pals.experiments.profile_checks.own import OWN, own
from pals.experiments.profile_checks.question import (
    POWER,
    QUANTITIES,
    THROUGHPUT,
    FloatArray,
    Learned,
    Method,
    Told,
    questions_of,
    truth_of,
)
from pals.experiments.profile_checks.regret import NEEDED, Choice, judge, scenarios_of, told_figures
from pals.experiments.profile_checks.rivals import RIVALS
from pals.experiments.profile_checks.score import Score, score
from pals.experiments.profile_checks.splits import RANDOM, SWEEP, UNSWEPT, Split

WHOLE = (RANDOM, SWEEP, UNSWEPT)  # kinds of split on which every method answers every quantity
OWN_BOLD = f"{OWN}, by values"  # the profile's picks were its intervals left aside
LEAST_CANDIDATES = 10  # points with every figure, for a choice to be one


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A method's score on one quantity over all splits of a kind."""

    kind: str
    method: str
    quantity: str
    score: Score
    shared: Score  # on the rows that the profile answered: where methods are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A method's choice in one scenario."""

    method: str
    mix: str
    share: float
    multiple: float
    choice: Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a case came to."""

    name: str
    group: str
    basis: str
    seed: int
    marks: tuple[Mark, ...]
    picks: tuple[Pick, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {**asdict(self), "picks": [{**asdict(p), "choice": list(p.choice)} for p in self.picks]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Judged:
        """What `to_dict` made."""
        marks = [
            Mark(**{**m, "score": Score(**m["score"]), "shared": Score(**m["shared"])}) for m in data["marks"]
        ]  # fmt: skip
        picks = [Pick(**{**p, "choice": Choice(*p["choice"])}) for p in data["picks"]]
        return Judged(**{**data, "marks": tuple(marks), "picks": tuple(picks)})


def methods_of(rivals: bool) -> dict[str, Method]:
    """The profile first, then those it is compared with."""
    return {OWN: own, **(RIVALS if rivals else {})}


def judge_case(case: Case, methods: Mapping[str, Method], costs: Mapping[str, float]) -> Judged:
    """Every split, and choices with what was learned from the sweep."""
    totals: dict[tuple[str, str, str], tuple[Score, Score]] = {}
    picks: list[Pick] = []
    known: dict[tuple[int, ...], dict[str, Learned]] = {}
    for split in case.splits():
        learned = {name: _learn(name, method, case, split, known) for name, method in methods.items()}
        for key, pair in _marks(split, learned).items():
            before = totals.get(key, (Score(), Score()))
            totals[key] = (before[0] + pair[0], before[1] + pair[1])
        if split.kind == SWEEP:
            picks = _picks(case, learned)
    marks = [
        Mark(kind=kind, method=method, quantity=quantity, score=plain, shared=shared)
        for (kind, method, quantity), (plain, shared) in totals.items()
    ]
    return Judged(
        name=case.name, group=case.group, basis=case.basis, seed=case.seed, marks=tuple(marks), picks=tuple(picks),
        costs=costs,
    )  # fmt: skip


def _quantities(name: str, split: Split) -> tuple[str, ...]:
    return QUANTITIES if name == OWN or split.kind in WHOLE else (POWER, THROUGHPUT)


def _learn(
    name: str, method: Method, case: Case, split: Split, known: dict[tuple[int, ...], dict[str, Learned]]
) -> Learned:
    """Learned once where splits share their rows, as leaving out a row of a short sweep and leaving out its level do."""
    rows = (split.kind in WHOLE, *map(id, split.train))
    mine = known.setdefault(rows, {})
    if name not in mine:
        mine[name] = method(split.train, case.mixes, case.facts, _quantities(name, split))
    return mine[name]


def _marks(split: Split, learned: Mapping[str, Learned]) -> dict[tuple[str, str, str], tuple[Score, Score]]:
    """Scores by kind, method and quantity: on all rows, and on those that the profile answered."""
    questions, found = questions_of(split.test), {}
    answers = {name: who.answer(questions, _quantities(name, split)) for name, who in learned.items()}
    for name, told in answers.items():
        for quantity, figure in told.items():
            truth = truth_of(split.test, quantity)
            if not np.isfinite(truth).any():
                continue
            shared = _answered(answers.get(OWN, {}).get(quantity), len(truth))
            found[split.kind, name, quantity] = (score(figure, truth), score(figure, truth, shared))
    return found


def _answered(told: Told | None, count: int) -> FloatArray:
    return np.ones(count) if told is None else np.isfinite(told.value).astype(np.float64)


def _picks(case: Case, learned: Mapping[str, Learned]) -> list[Pick]:
    """The choice of each method in each scenario of each mix, among the finer grid."""
    found = []
    for mix in range(len(case.mixes)):
        rows = [r for r in case.choices if r.mix == mix and all(getattr(r, q) is not None for q in NEEDED)]
        if len(rows) < LEAST_CANDIDATES:  # too few requests ended in the others' windows
            continue
        scenarios = scenarios_of(rows, mix)
        for name, who in learned.items():
            told = who.answer(questions_of(rows), NEEDED)
            if any(quantity not in told for quantity in NEEDED):
                continue
            figures = told_figures(told)
            bold = {OWN_BOLD: figures._replace(half=None)} if name == OWN else {}
            found += [
                Pick(
                    method=how, mix=case.mixes[mix].name, share=s.share, multiple=s.multiple, choice=judge(by, rows, s)
                )
                for how, by in ({name: figures} | bold).items()
                for s in scenarios
            ]  # fmt: skip
    return found
