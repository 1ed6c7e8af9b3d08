"""A profile for people, in a terminal or a file: what was measured, how good it is, and what it advises. Says no more than the facts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pals.core.quantities import Fingerprint
from pals.models.parameters import CORRECTION_SD
from pals.views.profile_facts import DrawFacts, ProfileFacts, QualityFacts
from pals.views.profile_parameters import FAR_SDS, ParameterFacts
from pals.views.profile_points import BestPoint, Estimate, PointFacts, number

INDENT = (0, 0, 0, 2)
WEAK_ERROR, WEAK_WIDTH = 0.15, 0.5  # beyond which a quantity is told apart
WIDE = 100  # columns from which tables are shown whole
SOURCES = {
    "measured": "MEASURED: a real engine on real boards",
    "emulated": "EMULATED: a real engine, boards and step times are simulated",
    "simulated": "SIMULATED: engine and boards, every watt and second",
}
#: Name, unit and factor from SI of each predicted quantity.
QUANTITY_WORDS: dict[str, tuple[str, str, float]] = {
    "power_w": ("power, all boards", "W", 1.0),
    "node_power_w": ("power, node", "W", 1.0),
    "natural_draw_w": ("natural draw, all boards", "W", 1.0),
    "sm_clock_mhz": ("SM clock", "MHz", 1.0),
    "step_s": ("step time, mean", "ms", 1e3),
    "tpot_p50_s": ("TPOT p50", "ms", 1e3),
    "tpot_p95_s": ("TPOT p95", "ms", 1e3),
    "prefill_tokens_per_s": ("prefill rate of a full step", "tokens/s", 1.0),
    "ttft_p50_s": ("TTFT p50, nothing queued", "ms", 1e3),
    "ttft_p95_s": ("TTFT p95, nothing queued", "ms", 1e3),
    "tokens_per_s": ("throughput, output", "tokens/s", 1.0),
    "tokens_per_j": ("tokens/J, of the boards", "tokens/J", 1.0),
}


def print_profile(facts: ProfileFacts, console: Console) -> None:
    """Print everything; tables lose their less needed columns in a narrow terminal."""
    wide = console.width >= WIDE
    _print_head(facts, console)
    for point in facts.points:
        _section(console, _point_title(point), _point_table(point))
    _section(console, "Boards: natural draw, without a clock lock", _draw_table(facts.draws, wide=wide))
    console.print(_draw_note(facts), style="dim")
    _section(
        console,
        "Quality: median error of measured rows, and half width of 90 % intervals",
        _quality_table(facts.quality),
    )
    for name in dict.fromkeys(b.mix for b in facts.best_points):
        mine = [b for b in facts.best_points if b.mix == name]
        _section(console, _best_title(facts, name), _best_table(mine, facts.energy_of, wide=wide))
    console.print(_best_note(facts), style="dim")
    _section(console, "Parameters", _parameter_table(facts.parameters, wide=wide))
    console.print(_parameter_note(facts.parameters), style="dim")
    _print_notes(facts, console)


def plain_text(facts: ProfileFacts, *, width: int) -> str:
    """The same for a file: no colours, no blanks at the ends of lines."""
    lines = io.StringIO()
    print_profile(
        facts, Console(file=lines, highlight=False, markup=False, emoji=False, color_system=None, width=width)
    )
    return "\n".join(line.rstrip() for line in lines.getvalue().splitlines())


def _section(console: Console, title: str, table: Table) -> None:
    console.print()
    console.print(Text(printable(title), "bold"))
    console.print(Padding(table, INDENT, expand=False))


def _table(*columns: str, left: Iterable[int] = (0,)) -> Table:
    """Without lines; `left` are the columns of words."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    words = set(left)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i in words else "right", no_wrap=i not in words, vertical="bottom")
    return table


def _print_head(facts: ProfileFacts, console: Console) -> None:
    f = facts.fingerprint
    console.print(Text(printable(f"{f.model} on {f.boards} × {f.board}"), "bold"))
    source = SOURCES.get(facts.source, facts.source.upper())
    console.print(Text(printable(source), "" if facts.source == "measured" else "bold yellow"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in (
        ("engine", _engine_words(f, facts.step_tokens)),
        ("flags", f.flags or "not known"),
        ("driver", f.driver),
        ("made", f"{facts.made_at}, by {facts.command}"),
        ("file", f"{facts.file}, {facts.bytes / 1024:.1f} KiB"),
        ("boards", f"limits {facts.min_limit_w:.0f}..{facts.found_limit_w:.0f} W (the found one), "
                   f"SM clock {facts.min_sm_clock_mhz}..{facts.max_sm_clock_mhz} MHz"),
        ("rows", _rows_words(facts)),
        *(("mix" if i == 0 else "", _mix_words(facts, i)) for i in range(len(facts.mixes))),
    ):  # fmt: skip
        table.add_row(name, printable(words))
    console.print(Padding(table, INDENT, expand=False))


def _engine_words(f: Fingerprint, step_tokens: int) -> str:
    version = f.engine_version + (f" ({f.engine_build})" if f.engine_build else "")
    parts = (f.parallelism, f.dtype, f"launch batch {f.launch_sequences}", f"steps of at most {step_tokens} tokens")
    return f"{f.engine} {version}: {', '.join(p for p in parts if p)}"


def _rows_words(facts: ProfileFacts) -> str:
    locks, sequences = facts.measured_locks_mhz, facts.measured_sequences
    clocks = f"clock locks {_levels(locks)} MHz" if locks else "no clock lock"
    return (
        f"{facts.rows} in {facts.measured_s / 60:.0f} min of the engine's time; limits {_levels(facts.measured_limits_w)} W; "
        f"{clocks}; active sequences {_levels(sequences)}"
    )


def _levels(values: Sequence[float]) -> str:
    if len(values) <= 7:
        return ", ".join(f"{v:.0f}" for v in values)
    return f"{values[0]:.0f}..{values[-1]:.0f} ({len(values)} levels)"


def _mix_words(facts: ProfileFacts, i: int) -> str:
    m = facts.mixes[i]
    cached = f" and {m.cached_tokens:.0f} cached" if m.cached_tokens else ""
    room = "" if m.sequences_in_kv_cache is None else f"; the KV cache holds {m.sequences_in_kv_cache:.0f} sequences"
    rows = f"{m.rows} row{'s' * (m.rows != 1)}" if m.rows else "not measured"
    return f"{m.name}: {m.prompt_tokens:.0f} prompt tokens{cached}, {m.output_tokens:.0f} output tokens, ±{m.length_spread_ratio:.0%}: {rows}{room}"


def _draw_table(draws: Sequence[DrawFacts], *, wide: bool) -> Table:
    limit = "at the found limit"
    head = [
        "mix",
        "active\nsequences",
        "natural draw\nW per board",
        "limit\nbinds",
        f"power {limit}\nW per board",
        "SM clock there\nMHz",
    ]
    table = _table(*(head if wide else [h.replace(f" {limit}", "").replace(" there", "") for h in head]), left=(0, 3))
    before = None
    for d in draws:
        table.add_row(
            printable(d.mix) if d.mix != before else "", str(d.active_sequences), _interval(d.natural_draw_per_board_w),
            d.limit_binds, _interval(d.power_per_board_w) if wide else number(d.power_per_board_w.value),
            _interval(d.sm_clock_mhz) if wide else number(d.sm_clock_mhz.value),
        )  # fmt: skip
        before = d.mix
    return table


def _draw_note(facts: ProfileFacts) -> str:
    words = f"Found limit: {facts.found_limit_w:.0f} W. A limit above the natural draw changes nothing; a clock lock, or a limit below it, does."
    if any(d.limit_binds == "prefill steps" for d in facts.draws):
        words += " Prefill steps: the mean stays below the limit, but steps that prefill are slowed by it."
    return words


def _quality_table(quality: Sequence[QualityFacts]) -> Table:
    table = _table(
        "quantity", "error\nfitted rows", "error\nrows left out", "half width\nmedian", "half width\nlargest"
    )
    for q in quality:
        errors = [_share(e) for e in (q.error_in_sample_ratio, q.error_left_out_ratio)]
        bad = (q.error_left_out_ratio or 0.0) > WEAK_ERROR or q.half_width_median_ratio > WEAK_WIDTH
        widths = (_share(q.half_width_median_ratio), _share(q.half_width_largest_ratio))
        table.add_row(QUANTITY_WORDS[q.quantity][0], *errors, *widths, style="yellow" if bad else "")
    return table


def _best_title(facts: ProfileFacts, mix: str) -> str:
    m = next(m for m in facts.mixes if m.name == mix)
    return f"Best point per load, by tokens/J of the {facts.energy_of}: {mix}, {m.prompt_tokens:.0f} in, {m.output_tokens:.0f} out"


def _best_table(best: Sequence[BestPoint], energy_of: str, *, wide: bool) -> Table:
    head = ["load", "target\ntokens/s", "limit\nW", "lock\nMHz", "active\nseq.", f"{energy_of}\nW", "output\ntokens/s", "\ntokens/J",
            "TPOT\np95 ms", "TTFT\np95 ms", "energy\nsaved"]  # fmt: skip
    if not wide:
        del head[1]
    table = _table(*head)
    for b in best:
        target = [number(b.target_tokens_per_s)] if wide else []
        if b.best is None or b.tokens_per_j is None or b.saved_energy_ratio is None:
            table.add_row(f"{b.load_ratio:.0%}", *target, *["–"] * (len(head) - 1 - len(target)))
            continue
        p = b.best.predicted
        per_j = _interval(b.tokens_per_j) if wide else number(b.tokens_per_j.value)
        table.add_row(
            f"{b.load_ratio:.0%}", *target, f"{b.best.power_limit_w:.0f}", str(b.best.sm_clock_lock_mhz or "–"),
            str(b.best.active_sequences), number(p["node_power_w" if energy_of == "node" else "power_w"].value),
            number(p["tokens_per_s"].value), per_j, number(1e3 * p["tpot_p95_s"].value),
            number(1e3 * p["ttft_p95_s"].value), f"{round(100 * b.saved_energy_ratio)}%",
        )  # fmt: skip
    return table


def _best_note(facts: ProfileFacts) -> str:
    first = facts.references[0]
    none = [b for b in facts.best_points if b.best is None]
    words = (
        "Load: share of the largest predicted throughput, kept by the lower end of the interval. The engine has enough work of the mix; "
        "nothing queues. Energy saved: per output token, against "
        f"{first.power_limit_w:.0f} W, no lock, {first.active_sequences} sequences."
    )
    if none:
        words += " –: no point surely keeps it; the surest gives " + "; ".join(
            f"{b.mix} {b.largest_pessimistic_tokens_per_s / b.target_tokens_per_s * b.load_ratio:.0%}"
            for b in {b.mix: b for b in none}.values()
        )
    return printable(words + "." * bool(none))


def _parameter_table(parameters: Sequence[ParameterFacts], *, wide: bool) -> Table:
    head = ["parameter", "fitted", "which is", "prior", "moved\nprior sds", "learnt"]
    table = _table(*(head if wide else [*head[:2], *head[3:5]]))
    for p in parameters:
        if not p.used or (p.name.startswith("correction") and not p.far):
            continue
        amount = "" if p.amount is None else f"{number(p.amount)} {p.unit}"
        prior = f"{number(p.prior_low)}..{number(p.prior_high)}"
        moved = f"{p.moved_prior_sds:+.1f}" + ("!" if p.far else " ")
        row = [p.meaning, number(p.value), amount, prior, moved, f"{p.learnt_ratio:.0%}"]
        table.add_row(*(row if wide else [*row[:2], *row[3:5]]), style="yellow" if p.far else "")
    return table


def _parameter_note(parameters: Sequence[ParameterFacts]) -> str:
    far = sum(p.far for p in parameters)
    near = [p for p in parameters if p.name.startswith("correction") and not p.far]
    told = ", ".join(f"{p.name.removeprefix('correction_')}: {p.value:+.1%}" for p in near)
    words = (
        [f"Corrections of the kernels' time by tokens of a step (prior ±{CORRECTION_SD:.0%}): {told}."] if near else []
    )
    words.append("Prior: a standard deviation to each side. Learnt: how much of it the rows took away.")
    if far:
        words.append(
            f"!: {far} moved by more than {FAR_SDS:.0f} sds: the prior does not fit these boards, or rows that the model cannot "
            "express bend it; there it interpolates, and says little beyond its rows."
        )
    return " ".join(words)


def _point_title(point: PointFacts) -> str:
    lock = f"{point.sm_clock_lock_mhz} MHz" if point.sm_clock_lock_mhz else "no clock lock"
    return f"At {point.power_limit_w:.0f} W, {lock}, {point.active_sequences} active sequences: {point.mix}"


def _point_table(point: PointFacts) -> Table:
    table = _table("quantity", "predicted", "90 % interval", "unit", left=(0, 3))
    for name, (words, unit, factor) in QUANTITY_WORDS.items():
        e = point.predicted[name]
        table.add_row(words, number(factor * e.value), f"{number(factor * e.low)}..{number(factor * e.high)}", unit)
    return table


def _print_notes(facts: ProfileFacts, console: Console) -> None:
    if not facts.notes and not facts.not_predicted:
        return
    console.print()
    console.print(Text("Notes", "bold"))
    for note in (*facts.notes, *facts.not_predicted):
        console.print(Padding(Text(printable(note)), INDENT, expand=False))


def _interval(e: Estimate) -> str:
    return f"{number(e.value)} ({number(e.low)}..{number(e.high)})"


def _share(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.1%}" if ratio < 0.9995 else f"{ratio:.0%}" if ratio < 9.995 else ">999%"


def printable(text: str) -> str:
    """Text from a file, without what a terminal would obey, and without markup."""
    return "".join(c if c.isprintable() else "?" for c in text)
