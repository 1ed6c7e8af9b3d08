"""The report on experiments, from rows made by hand: everything promised is in it, and it needs nothing beside it.

Words of a module that name a constant tell its value: a toy run lasts `TOY_S`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.cli.main import main
from pals.core.errors import ConfigError
from pals.experiments.lab.catalogue import EXPERIMENTS
from pals.experiments.lab.experiment import Row, Table, Verdict, Wish, verdict_of
from pals.experiments.lab.report.document import Figure, Grid, Paragraph, Points, blocks_of, known
from pals.experiments.lab.report.figures import FIGURES, main_figure
from pals.experiments.lab.report.headline import BEGIN, END, headline, put_between
from pals.experiments.lab.report.markdown import markdown_of, write_markdown
from pals.experiments.lab.report.page_html import html_page, inline
from pals.experiments.lab.report.sections import Told, read_all, report
from pals.experiments.lab.report.spread import figure_stat, ratio_stat, short, stat_of
from pals.experiments.lab.store import Kept, Store, digest_of_cell
from pals.views.chart_drawing import drawn
from pals.views.charts import STYLES, Chart, Cloud, Groups, Mark, Panel, Series, Stat, Traced, styles_of

NAN = float("nan")
TOY_S = 12.5
SEEDS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyCell:
    """A number."""

    number: int
    seed: int = 1

    @property
    def slug(self) -> str:
        return f"toy-{self.number}-{self.seed}"


class Toy:
    """An experiment without a plant, one of whose promises is missed."""

    name, title, question, targets = "toy", "Toy <1>", "What is it squared?", "mean square at least 4"
    sources = ("experiments/lab/ratios.py",)
    takes = frozenset[str]()

    def cells(self, wish: Wish) -> list[ToyCell]:
        return [ToyCell(number=n, seed=s) for s in wish.seeds(1, 2) for n in (1, 2)]

    def run(self, cell: ToyCell, place: Path) -> list[Row]:
        return [{"policy": "static", "seed": cell.seed, "square": cell.number**2}]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        return [
            Table(
                header=("seed | x", "square"), lines=[["a|b", f"{NAN:.2f}"], ["c", f"{NAN:.1%}"]], caption="**Squares**"
            )
        ]

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        squares = {r["seed"]: float(r["square"]) for r in rows}
        return [
            verdict_of("mean square", squares, least=4.0),
            verdict_of("mean square is small", squares, most=3.0),
            verdict_of("nobody knows", {}, most=3.0),
        ]

    def figures(self, rows: Sequence[Row]) -> Sequence[str]:
        return ()


TOY = Toy()


def keep(place: Path, experiment: Any, cells: Mapping[str, list[Row]], digest: str = "old") -> None:
    """Rows on disk."""
    (place / experiment.name).mkdir(parents=True, exist_ok=True)
    for slug, rows in cells.items():
        Store(place / experiment.name).keep(Kept(cell=slug, digest=digest, seconds=1.0, rows=rows))


def paper_rows(policies: Sequence[str] = ("static", "pals", "oracle")) -> list[Row]:
    """Of two engines at two targets; `pals` saves a fifth, a little more with each seed."""
    return [
        {
            "engine": engine, "moe": engine.startswith("olmoe"), "seed": seed, "policy": policy, "target_share": share,
            "target_tokens_s": 1000.0 * share, "free_tokens_s": 1000.0, "tokens_per_s": 1000.0 * share,
            "tokens_per_j_gpu": 1.0 if policy == "static" else 1.2 + 0.01 * seed, "tokens_per_j_node": 1.0, "throughput_missed": 0.0,
            "span_s": 120.0, "requests": 500,
        }
        for engine in ("olmoe-1b-7b-0924--4xa100-sxm4-80gb", "gpt2--4xa100-sxm4-80gb")
        for seed in SEEDS for policy in policies for share in (0.65, 0.9)
    ]  # fmt: skip


def rows_of_all() -> dict[str, list[Row]]:
    """Of every experiment that has figures, with as few columns as they need."""
    both, line = (
        ("static", "pals"),
        {"time_s": [0.0, 1.0, 2.0], "power_w": [900.0, 800.0, 700.0], "budget_w": [None, 800.0, 750.0]},
    )

    def row(policy: str, seed: int, **more: Any) -> Row:
        gain = 1.3 if policy == "pals" else 1.0
        return {
            "policy": policy, "seed": seed, "engine": "qwen3-30b-a3b--h100-sxm5-80gb", "tokens_per_j_node": gain, "tokens_per_j_gpu": gain,
            "tokens_per_s": 100.0, "free_tokens_s": 100.0, "missed": 0.01 * seed, "good_requests": 99,
        } | more  # fmt: skip

    late = {"ttft_p99_s": 1.0, "ttft_target_s": 2.0, "tpot_p99_s": None, "tpot_target_s": 0.1}
    track = {"rmse": 0.01, "over_share": 0.0, "far_share": None, "shed_s": 1.5, "time_line": line}
    return {
        "paper-single-node": paper_rows(),
        "price": [row(p, s, mix=m, loop="open", **late) for p in both for s in SEEDS for m in ("prefill", "decode")],
        "no-loss": [row(p, s, load=x) for p in both for s in SEEDS for x in ("closed", "open 60 %")],
        "open-loop": [row(p, s, trace="code", load=x) for p in both for s in SEEDS for x in (0.2, 0.9)],
        "qos-budget": [
            row(p, s, loop="closed", budget=b, node_budget_w=w, engine=e, target_share=0.9)
            for p in both for s in SEEDS for b, w in (("90 %", 5400.0), ("4800 W", 4800.0)) for e in ("gpt2--x", "all")
        ],
        "dynamic-budget": [row(p, s, fleet="3 x DeepSeek-MoE", signal="shed", **track) for p in both for s in SEEDS],
        "surprises": [
            row(p, s, surprise=x, budgeted=b, over_s=0) for p in both for s in SEEDS for x in ("none", "heat") for b in (False, True)
        ],
        "ablations": [row(p, s, demand="open 50 %") for p in ("whole", "without clock") for s in SEEDS],
    }  # fmt: skip


def told_of(place: Path) -> list[Told]:
    keep(place, EXPERIMENTS["paper-single-node"], {"one": paper_rows()})
    return read_all([*EXPERIMENTS.values()], place)


class Strict(HTMLParser):
    """Refuses what is not closed in order; notes what is linked."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open, self.links, self.images, self.ids, self.seen = (
            list[str](),
            list[str](),
            list[str](),
            list[str](),
            set[str](),
        )

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        given = dict(attrs)
        self.links += [v for k in ("href",) if (v := given.get(k))]
        self.images += [v for k in ("src",) if (v := given.get(k))]
        self.ids += [v for k in ("id",) if (v := given.get(k))]
        assert tag != "img" or given.get("alt")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_holds_every_verdict_is_well_formed_and_needs_no_network(tmp_path: Path) -> None:
    told = told_of(tmp_path)
    page = html_page("a title", report(told, [], "pals experiment report"))
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert not parser.open
    assert "script" not in parser.seen
    assert "link" not in parser.seen
    assert parser.images
    assert all(src.startswith("data:image/svg+xml;base64,") for src in parser.images)
    assert {link.removeprefix("#") for link in parser.links} <= set(parser.ids)
    text = re.sub(r"<[^>]+>", "", page)
    for verdict in told[0].verdicts:
        assert inline(verdict.what) in text
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)


def test_markdown_links_lead_somewhere_and_missing_experiments_are_named(tmp_path: Path) -> None:
    told = told_of(tmp_path)
    missing = [e for e in EXPERIMENTS.values() if e.name != "paper-single-node"]
    path = tmp_path / "sub" / "report.md"
    write_markdown(report(told, missing, "pals experiment report"), path)
    text = path.read_text(encoding="utf-8")
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(images) == len(told[0].charts) > 0
    for image in images:
        assert (path.parent / image).read_bytes().startswith(b"\x89PNG")
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert f'<a id="{anchor}"></a>' in text
    for experiment in missing:
        assert experiment.name in text
    assert "Everything here is simulated" in text
    for verdict in told[0].verdicts:
        assert verdict.what in text


def test_misses_come_first_and_no_cell_says_nan(tmp_path: Path) -> None:
    keep(
        tmp_path,
        TOY,
        {
            "toy-1-1": [{"policy": "static", "seed": 1, "square": 1}],
            "mine": [{"policy": "static", "seed": 2, "square": 5}],
        },
    )
    told = read_all([TOY], tmp_path)
    blocks = report(told, [], "pals experiment report")
    text = "\n\n".join(markdown_of(b, "x") for b in blocks)
    assert text.index("toy: mean square: 3.000, promised ≥ 4 (over 2 seeds: 1.000 … 5.000)") < text.index(
        "**Question.**"
    )
    assert "nan" not in text
    assert "a\\|b" in text
    assert "a toy run lasts 12.5 s." in text
    page = html_page("t", blocks)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "Toy &lt;1&gt;" in page
    assert 'class="missed"' in page


def test_what_is_not_complete_or_made_by_other_sources_is_said(tmp_path: Path) -> None:
    rows: list[Row] = [{"policy": "static", "seed": 1, "square": 1}]
    fresh = TOY.cells(Wish())[0]
    keep(tmp_path, TOY, {fresh.slug: rows}, digest=digest_of_cell(TOY, fresh))
    coverage = read_all([TOY], tmp_path)[0].coverage
    assert (coverage.wanted, coverage.there, coverage.outdated, coverage.own, coverage.full) == (2, 1, 0, 0, False)
    keep(tmp_path, TOY, {"toy-2-2": rows, "of a user": rows})
    coverage = read_all([TOY], tmp_path)[0].coverage
    assert (coverage.wanted, coverage.there, coverage.outdated, coverage.own, coverage.full) == (4, 2, 1, 1, True)
    text = "\n".join(markdown_of(b, "x") for b in report(read_all([TOY], tmp_path), [], "c"))
    assert "**Not complete**" in text
    assert "**1 of these cells** were run by sources other than the present" in text


def test_rows_of_another_form_are_refused_and_named(tmp_path: Path) -> None:
    keep(tmp_path, TOY, {"toy-1-1": [{"policy": "static", "seed": 1}]})
    with pytest.raises(ConfigError, match=r"rows of toy .* lack 'square'"):
        read_all([TOY], tmp_path)


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_can_be_made_of_whatever_policies_there_are(name: str) -> None:
    rows = rows_of_all()[name]
    charts = FIGURES[name](rows)
    assert charts
    assert len({c.name for c in charts}) == len(charts)
    assert all(c.telling() is not None and c.made == "simulated" for c in charts)
    baseline = [r for r in rows if r["policy"] in ("static", "whole")]
    for chart in FIGURES[name](baseline):  # nothing to compare: perhaps no chart, never a mistake
        chart.telling()


def test_the_main_figure_takes_what_is_there() -> None:
    rows = rows_of_all()
    whole = main_figure(rows)
    assert whole is not None
    assert len(whole.panels) == 4
    part = main_figure({"qos-budget": rows["qos-budget"]})
    assert part is not None
    assert len(part.panels) == 1
    assert main_figure({"surprises": rows["surprises"]}) is None


def test_panels_of_each_kind_are_drawn_the_same_twice_with_names_and_origin() -> None:
    stat = Stat(value=1.0, low=0.5, high=2.0)
    panels: list[Panel] = [
        Cloud(title="cloud", x_label="x, s", y_label="y, W", series=[Series(name="pals", x=[stat], y=[stat])], marks=[Mark(at=1.0, label="m")]),
        Groups(title="bars", label="%", groups=["a", "b"], values=[("pals", [stat, None]), ("static", [Stat.exact(0.0), None])], bars=True),
        Groups(title="dots", label="%", groups=["a"], values=[("other", [stat])], lying=True),
        Traced(title="line", label="W", time_s=[0.0, 1.0], drawn=[("power", [1.0, NAN])], stepped=[("budget", [2.0, 2.0])]),
    ]  # fmt: skip
    chart = Chart(name="all", caption="c", panels=panels, columns=2)
    svg = drawn(chart, "svg")
    assert svg == drawn(chart, "svg")
    assert svg.count(b"<svg") == 1
    with pytest.raises(ValueError, match="no panel"):
        drawn(Chart(name="none", caption="c", panels=[]), "png")


def test_colours_and_markers_tell_names_apart() -> None:
    names = [*STYLES, *(f"engine {i}" for i in range(24))]
    looks = styles_of(names)
    assert len({(s.colour, s.marker) for s in looks.values() if s not in STYLES.values()}) >= 16
    assert len({(s.colour, s.marker) for s in STYLES.values()}) == len(STYLES)


@given(values=st.dictionaries(st.integers(1, 9), st.floats(-1e6, 1e6), min_size=1))
def test_error_bars_span_the_seeds(values: dict[int, float]) -> None:
    stat = stat_of(values)
    assert stat is not None
    assert stat.low == min(values.values())
    assert stat.high == max(values.values())
    assert stat.low - 1e-9 <= stat.value <= stat.high + 1e-9 or math.isclose(stat.value, stat.low, rel_tol=1e-9)


def test_values_that_are_unknown_are_not_drawn_as_numbers() -> None:
    assert stat_of({}) is None
    assert stat_of({1: 1.0, 2: NAN}) is None
    with pytest.raises(ValueError, match="value"):
        Stat.exact(NAN)
    rows: list[Row] = [
        {"policy": "pals", "seed": 1, "e": 1, "x": None},
        {"policy": "static", "seed": 1, "e": 1, "x": 2.0},
    ]
    assert ratio_stat(rows, "x", "pals", "static", ("e",)) is None
    found = figure_stat(rows, "x", scale=100.0)
    assert found is not None
    assert found.value == 200.0
    assert known("nan (nan–1.2), nan%") == "– (––1.2), –"
    assert known("nanometre, finance") == "nanometre, finance"


def test_engines_have_short_names() -> None:
    assert short("mixtral-8x7b-v0.1--4xa100-sxm4-80gb") == "Mixtral-8x7B, 4×A100"
    assert short("some-model--h100-sxm5-80gb") == "some-model, H100"


def test_a_docstring_becomes_paragraphs_and_lists() -> None:
    made = list(blocks_of("One.\n\n- a `b`\n  goes on\n- c\n\nTwo\nlines."))
    assert made == [Paragraph(text="One."), Points(items=["a `b`\ngoes on", "c"]), Paragraph(text="Two lines.")]


def test_the_main_table_goes_between_its_marks_and_touches_nothing_else(tmp_path: Path) -> None:
    told = told_of(tmp_path)
    table = headline(told, "pals experiment report")
    first = put_between(f"before\n{BEGIN}\nold\n{END}\nafter\n", table)
    assert put_between(first, table) == first
    assert first.startswith("before\n")
    assert first.endswith("\nafter\n")
    assert "old" not in first
    assert f"{told[0].counts[1]} missed" in first
    for text in ("nothing", f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(ConfigError, match="once each"):
            put_between(text, table)


def test_the_command_writes_what_is_asked_for_and_refuses_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--rows", str(tmp_path / "rows")]
    assert main(["experiment", "report", *place]) == 2
    assert "no rows of paper-single-node" in capsys.readouterr().err
    told_of(tmp_path / "rows")
    assert main(["experiment", "report", *place, "--out", str(tmp_path / "r.pdf")]) == 2
    assert main(["experiment", "report", *place, "--full"]) == 2
    assert main(["experiment", "report", *place, "--main-figure", "x.gif"]) == 2
    assert main(["experiment", "run", "price", *place]) == 2
    readme, figure = tmp_path / "README.md", tmp_path / "docs" / "experiments.png"
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert main(["experiment", "report", *place, "--main-figure", str(figure), "--main-table", str(readme)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "`paper-single-node`" in readme.read_text()
    assert not list((tmp_path / "rows").glob("report*"))
    assert main(["experiment", "report", "paper-single-node", *place, "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


def test_a_grid_is_what_an_experiment_tells(tmp_path: Path) -> None:
    blocks = report(told_of(tmp_path), [], "c")
    captions = [b.caption for b in blocks if isinstance(b, Grid)]
    tables = EXPERIMENTS["paper-single-node"].tables(paper_rows())
    assert [t.caption.strip("*") for t in tables] == captions[-len(tables) :]
    numbers = [b.number for b in blocks if isinstance(b, Figure)]
    assert numbers == list(range(1, len(numbers) + 1))
