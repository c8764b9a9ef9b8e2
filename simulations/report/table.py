"""A report on the terminal: what held, what did not, and the figures, within 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from admin.safety import printable
from simulations.report.merged import PATHS, NatRow, PairRow, Report, is_worse
from simulations.report.wording import budget, count, instant, nat, percent, seeds, time, verdict

MAX_PAIRS: Final = 24
"""Rows of single pairs; of more pairs only those that went wrong are shown, and sums by NAT."""
MAX_ROWS: Final = 30
MAX_FAILURES: Final = 10
MAX_TEXT: Final = 160
"""Characters of a check that names many."""
STYLES: Final = {
    "direct": "blue",
    "relayed": "yellow",
    "failed": "red",
    "denied": "bright_black",
    "unasked": "bright_black",
}


def show(report: Report, console: Console) -> None:
    """Print a report."""
    for part in parts(report):
        console.print(part)


def parts(report: Report) -> Iterator[RenderableType]:
    """What is printed, one after the other."""
    style = "bold green" if report.all_held else "bold red"
    yield Text.assemble(
        _plain(f"{report.scenario}, {seeds(report)} ({report.backend}): "),
        (printable(verdict(report)), style),
    )
    if report.chaos:
        yield _plain(f"chaos: {budget(report)}")
    yield from _pairs(report)
    yield from _times(report)
    yield from _faults(report)
    yield from _checks(report)
    yield from _broken(report)
    yield from _failures(report)
    yield from _end(report)


def _pairs(report: Report) -> Iterator[RenderableType]:
    if report.runs == 1 and len(report.pairs) <= MAX_PAIRS:
        yield _of_one_run(report)
        return
    shown = [
        row
        for row in report.pairs
        if row.worse or (row.outcomes.get("failed") and row.expected != "none")
    ]
    if len(report.pairs) <= MAX_PAIRS:
        shown = report.pairs
    if shown:
        yield _by_pair(shown[:MAX_PAIRS])
        if len(shown) > MAX_PAIRS:
            yield _plain(f"and {count(len(shown) - MAX_PAIRS, 'pair')} more of this kind")
    if len(report.nat_pairs) > 1 or len(report.pairs) > MAX_PAIRS:
        rows = sorted(report.nat_pairs, key=lambda row: (-row.worse, -row.reached))
        yield _by_nat(rows[:MAX_ROWS])
        if len(rows) > MAX_ROWS:
            yield _plain(f"and {count(len(rows) - MAX_ROWS, 'pair of NATs', 'pairs of NATs')} more")


def _of_one_run(report: Report) -> Table:
    table = _table("client", "resource", "NATs on the way", "theory", "outcome", "first answer")
    table.add_column("round trip", justify="right")
    example = report.example
    for pair in example.pairs if example is not None else ():
        table.add_row(
            _plain(pair.client),
            _plain(pair.resource),
            _plain(f"{nat(pair.client_nat)} - {nat(pair.gateway_nat)}"),
            _plain(pair.expected or "–"),
            _outcome(pair.outcome, " !" if is_worse(pair) else ""),
            time(pair.first_answer_ns),
            time(pair.round_trip_ns),
        )
    return table


def _by_pair(rows: list[PairRow]) -> Table:
    table = _table(
        "client", "resource", "NATs on the way", "theory", "outcomes", "first answer p50"
    )
    for row in rows:
        table.add_row(
            _plain(row.client),
            _plain(row.resource),
            _plain(f"{nat(row.client_nat)} - {nat(row.gateway_nat)}"),
            _plain(row.expected or "–"),
            _outcomes(row.outcomes),
            time(row.first_answer.quantile(0.5)),
        )
    return table


def _by_nat(rows: list[NatRow]) -> Table:
    table = _table("client's NAT", "gateway's NAT", "pairs", "direct", "relayed", "failed")
    table.add_column("worse than theory", justify="right")
    for row in rows:
        shares = (percent(row.share(each)) for each in ("direct", "relayed", "failed"))
        table.add_row(
            _plain(nat(row.client_nat)),
            _plain(nat(row.gateway_nat)),
            f"{sum(row.outcomes.values()):,}",
            *shares,
            Text(f"{row.worse:,}", style="red" if row.worse else ""),
        )
    return table


def _times(report: Report) -> Iterator[RenderableType]:
    if report.runs == 1 and len(report.pairs) <= MAX_PAIRS:
        return
    table = _table("", "", "count", "p50", "p90", "p99", "most")
    for title, by_path in (
        ("first answer", report.first_answer),
        ("round trip", report.round_trip),
    ):
        for path in PATHS:
            if (times := by_path.get(path)) is not None:
                quantiles = (time(times.quantile(each)) for each in (0.5, 0.9, 0.99))
                table.add_row(title, path, f"{times.count:,}", *quantiles, time(times.most))
    if table.row_count:
        yield table


def _faults(report: Report) -> Iterator[RenderableType]:
    example = report.example
    if report.runs == 1 and example is not None and 0 < len(example.faults) <= MAX_ROWS:
        table = _table("at", "fault", "targets", "for", "served again after")
        for fault in example.faults:
            recovered = Text("never", style="red")
            if fault.recovery_ns is not None:
                recovered = Text(time(fault.recovery_ns) if fault.recovery_ns else "undisturbed")
            targets = ", ".join(fault.targets[:3]) + (" ..." if len(fault.targets) > 3 else "")
            table.add_row(
                instant(fault.at_ns),
                fault.kind,
                _plain(targets),
                time(fault.duration_ns),
                recovered,
            )
        yield table
    elif report.recovery:
        table = _table("fault", "happened", "undisturbed", "p50", "p90", "most", "never")
        for row in report.recovery:
            times = row.times
            table.add_row(
                _plain(row.kind),
                f"{row.happened:,}",
                f"{row.undisturbed:,}",
                time(times.quantile(0.5)),
                time(times.quantile(0.9)),
                time(times.most if times.count else None),
                Text(f"{row.never:,}", style="red" if row.never else ""),
            )
        yield table


def _checks(report: Report) -> Iterator[RenderableType]:
    for row in report.checks:
        mark = ("ok  ", "green") if not row.failed else ("FAIL", "bold red")
        share = f" ({row.held:,} of {row.held + row.failed:,} runs)" if report.runs > 1 else ""
        yield Text.assemble(mark, _plain(f" {_shortened(row.text)}{share}"))
        for example in row.examples[: 2 if report.runs > 1 else 1]:
            whose = f"seed {example.seed}: " if report.runs > 1 else ""
            yield _plain(f"       {whose}{example.text}")


def _broken(report: Report) -> Iterator[RenderableType]:
    for row in report.rules:
        times = count(row.count, "time") + (
            f" in {count(row.runs, 'run')}" if report.runs > 1 else ""
        )
        yield Text.assemble(("BROKEN", "bold red"), _plain(f" {row.rule}, {times}"))
        for example in row.examples[:3]:
            yield _plain(f"       seed {example.seed}: {example.text}")


def _failures(report: Report) -> Iterator[RenderableType]:
    if report.runs > 1:
        for failure in report.failures[:MAX_FAILURES]:
            why = failure.reasons[0] if failure.reasons else ""
            yield _plain(f"seed {failure.seed} did not hold: {why}")
        left = len(report.failures) + report.failures_left_out - MAX_FAILURES
        if left > 0:
            yield _plain(f"and {count(left, 'run')} more")
    for lost in report.lost[:MAX_FAILURES]:
        yield _plain(f"seed {lost.seed} gave no result: {lost.why}")
    example = report.example
    if report.runs == 1 and example is not None and example.error:
        yield Text.assemble(("ended early: ", "bold red"), _plain(example.error))


def _end(report: Report) -> Iterator[RenderableType]:
    example = report.example
    if report.runs == 1 and example is not None and example.trace:
        yield _plain(f"trace of seed {example.seed}: {example.trace}")
    cpu = report.cost.get("cpu_s")
    if cpu:
        speed = report.virtual_ns / 1e9 / cpu
        yield _plain(
            f"{report.virtual_ns / 1e9:,.0f} virtual s in {cpu:,.1f} CPU s ({speed:,.1f} times)"
        )


# --- pieces ---------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        figure = column in _FIGURES
        table.add_column(column, justify="right" if figure else "left", overflow="fold")
    return table


_FIGURES: Final = frozenset({
    "pairs", "direct", "relayed", "failed", "count", "p50", "p90", "p99", "most", "never", "at",
    "for", "happened", "undisturbed", "first answer", "first answer p50", "served again after",
})  # fmt: skip


def _outcome(outcome: str, mark: str = "") -> Text:
    return Text(outcome + mark, style=STYLES.get(outcome, ""))


def _outcomes(outcomes: dict[str, int]) -> Text:
    text = Text()
    for i, (outcome, times) in enumerate(sorted(outcomes.items(), key=lambda each: -each[1])):
        text.append(", " if i else "")
        text.append(
            f"{times:,} {outcome}" if len(outcomes) > 1 else outcome, STYLES.get(outcome, "")
        )
    return text


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 60]} ... {text[-50:]}"


def _plain(text: str) -> Text:
    """Text of a scenario or run: no markup in it is obeyed, nor a control character."""
    return Text(printable(text))
