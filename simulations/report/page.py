"""The report as one HTML page that stands alone: no script, and nothing from anywhere else.

Its policy (a `meta` element) forbids the browser to load or run anything, so that nothing that a
scenario or a run says could, even if it were not escaped; and everything is (`markup`). It is read
by keyboard and aloud: headings, tables, a link past the navigation, titles on all drawings; each
drawing has its figures in a table too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from runtime.files import write_file
from simulations.report import charts
from simulations.report.distribution import Distribution
from simulations.report.markup import Child, Element, render, tag
from simulations.report.merged import PATHS, PairRow, RecoveryRow, Report
from simulations.report.sequence import MAX_FLIGHTS, flights, sequence
from simulations.report.style import STYLE
from simulations.report.topology import legend, topology
from simulations.report.wording import budget, count, instant, nat, percent, seeds, time, verdict
from simulations.result import Result, Step

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MAX_PAIRS: Final = 400
MAX_FAILURES: Final = 100
MAX_LISTED_STEPS: Final = 2_000
MAX_FAULTS: Final = 200


def write_page(report: Report, file: Path) -> None:
    """Write the page in one step. Raises OSError."""
    write_file(file, page(report).encode(), mode=0o644)


def page(report: Report) -> str:
    """The page."""
    sections = [each for each in _sections(report) if each is not None]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{report.scenario}: {verdict(report)}"),
        tag("style", STYLE),
    )
    body = tag(
        "body",
        tag("a", "To the content", class_="skip", href="#content"),
        _top(report, sections),
        tag("main", _cards(report), sections, id="content"),
        _foot(report),
    )
    return "<!doctype html>\n" + render(tag("html", head, body, lang="en")) + "\n"


# --- the top --------------------------------------------------------------------------------------


def _top(report: Report, sections: Sequence[Element]) -> Element:
    style = "badge" if report.all_held else "badge bad"
    links = [tag("a", title, href=f"#{key}") for key, title in map(_heading, sections)]
    example = report.example
    facts = [seeds(report), "virtual time" if report.backend == "virtual" else "kernel namespaces"]
    if example is not None and example.trace and report.runs == 1:
        facts.append(f"trace {example.trace[:16]}")
    return tag(
        "header",
        tag("h1", report.scenario),
        tag("p", tag("span", verdict(report), class_=style), " ", " · ".join(facts)),
        tag("p", report.description, class_="lead") if report.description else None,
        tag("p", f"Chaos: {budget(report)}", class_="note") if report.chaos else None,
        tag("nav", links, aria_label="Sections"),
        class_="top",
    )


def _heading(section: Element) -> tuple[str, str]:
    heading = section.children[0]
    assert isinstance(heading, Element)
    return dict(section.attributes)["id"], str(heading.children[0])


def _section(key: str, title: str, *children: Child) -> Element:
    return tag("section", tag("h2", title), *children, id=key)


def _cards(report: Report) -> Element:
    reached = sum(report.outcomes.get(each, 0) for each in ("direct", "relayed", "failed"))
    cards = [_card(f"{report.held:,} / {report.runs:,}", "runs held", bad=not report.all_held)]
    for outcome in ("direct", "relayed", "failed"):
        part = report.outcomes.get(outcome, 0)
        share = percent(part / reached) if reached else "–"
        bad = outcome == "failed" and part > 0 and not report.all_held
        cards.append(_card(share, f"{outcome}: {count(part, 'pair')}", bad=bad))
    if answers := _together(report.first_answer):
        cards.append(_card(time(answers.quantile(0.5)), "first answer, median"))
        cards.append(_card(time(answers.quantile(0.95)), "first answer, 95 %"))
    recoveries = [row.times.most for row in report.recovery if row.times.count]
    if recoveries:
        cards.append(_card(time(max(recoveries)), "slowest recovery"))
    broken = sum(row.count for row in report.rules)
    cards.append(_card(f"{broken:,}", "rules broken", bad=broken > 0))
    return tag("ul", cards, class_="cards")


def _card(figure: str, title: str, *, bad: bool = False) -> Element:
    return tag("li", tag("b", figure), tag("span", title), class_="bad" if bad else None)


def _together(by_path: dict[str, Distribution]) -> Distribution | None:
    found = Distribution()
    for times in by_path.values():
        if times.count:
            found.least = min(times.least, found.least) if found.count else times.least
            found.most = max(times.most, found.most)
            found.count += times.count
            found.total += times.total
            for number, many in times.bins.items():
                found.bins[number] = found.bins.get(number, 0) + many
    return found if found.count else None


# --- the sections ---------------------------------------------------------------------------------


def _sections(report: Report) -> Iterator[Element | None]:
    yield _verdicts(report)
    example = report.example
    if example is not None and example.nodes:
        yield _section(
            "topology",
            "Topology",
            legend(example.nodes),
            _scroll(topology(example.nodes), "Topology"),
        )
    yield _nats(report)
    yield _times(report)
    yield _faults(report)
    if example is not None and example.timeline:
        yield _timeline(example)
    yield _pairs(report)
    yield _figures(report)


def _verdicts(report: Report) -> Element:
    parts: list[Child] = []
    if report.checks:
        rows = [
            tag(
                "tr",
                tag("td", _mark(not row.failed)),
                tag("th", row.text, scope="row"),
                tag("td", f"{row.held:,} of {row.held + row.failed:,}", class_="n"),
                tag("td", _examples(row.examples), class_="t"),
            )
            for row in report.checks
        ]
        parts.append(
            _table("What the scenario says must hold", ("", "check", "#held in", ""), rows)
        )
    if report.rules:
        rows = [
            tag(
                "tr",
                tag("th", row.rule, scope="row"),
                tag("td", f"{row.count:,}", class_="n"),
                tag("td", f"{row.runs:,}", class_="n"),
                tag("td", _examples(row.examples), class_="t"),
            )
            for row in report.rules
        ]
        parts.append(
            _table("Rules that were broken", ("rule", "#times", "#runs", "examples"), rows)
        )
    else:
        parts.append(tag("p", tag("span", "No rule of safety was broken.", class_="ok")))
    parts.append(_failures(report))
    return _section("verdict", "What held", parts)


def _mark(held: bool) -> Element:
    return tag("span", "held", class_="ok") if held else tag("span", "failed", class_="no")


def _examples(examples: Sequence[object]) -> list[Child]:
    return [
        tag("div", tag("code", f"seed {each.seed}"), f" {each.text}")  # type: ignore[attr-defined]
        for each in examples
    ]


def _failures(report: Report) -> list[Child]:
    parts: list[Child] = []
    if report.failures:
        rows = [
            tag(
                "tr",
                tag("th", tag("code", failure.seed), scope="row", class_="n"),
                tag("td", [tag("div", each) for each in failure.reasons], class_="t"),
            )
            for failure in report.failures[:MAX_FAILURES]
        ]
        left = len(report.failures) + report.failures_left_out - len(rows)
        parts += [tag("h3", "Runs that did not hold"), _table("", ("#seed", "why"), rows)]
        parts.append(tag("p", f"and {count(left, 'run')} more", class_="note") if left else None)
    if report.lost:
        lost = [tag("li", tag("code", f"seed {each.seed}"), f" {each.why}") for each in report.lost]
        parts += [tag("h3", "Seeds that gave no result"), tag("ul", lost[:MAX_FAILURES])]
    return parts


def _nats(report: Report) -> Element | None:
    if not any(row.reached for row in report.nat_pairs):
        return None
    rows = [
        tag(
            "tr",
            tag("th", nat(row.client_nat), scope="row"),
            tag("td", nat(row.gateway_nat)),
            *(tag("td", f"{row.outcomes.get(each, 0):,}", class_="n") for each in _REACHED),
            tag("td", f"{row.worse:,}", class_="n no" if row.worse else "n"),
        )
        for row in report.nat_pairs
        if row.reached
    ]
    head = ("client's NAT", "gateway's NAT", "#direct", "#relayed", "#failed", "#worse than theory")
    return _section(
        "nats",
        "Outcomes by pair of NATs",
        tag(
            "p",
            "How pairs that may reach one another did. “Worse” counts pairs whose path was not as "
            "good as RFC 4787 and theory promise for their NATs.",
            class_="note",
        ),
        _colours(*_REACHED),
        _scroll(charts.heat_map(report.nat_pairs), "Outcomes by pair of NATs"),
        _details("The figures", _table("", head, rows)),
    )


_REACHED: Final = ("direct", "relayed", "failed")


def _times(report: Report) -> Element | None:
    kinds = (
        ("first_answer", "From the first question to the first answer"),
        ("round_trip", "Round trip of the last exchange"),
    )
    parts: list[Child] = []
    rows: list[Element] = []
    for name, title in kinds:
        by_path: dict[str, Distribution] = getattr(report, name)
        shown: dict[str, Distribution] = {each: by_path[each] for each in PATHS if each in by_path}
        if not shown:
            continue
        drawn: list[Child] = [tag("h3", title), charts.ecdf(shown, f"{title}: share of all")]
        drawn += [
            charts.histogram(times, path, f"{title}, {path}: how many took how long")
            for path, times in shown.items()
        ]
        parts.append(tag("figure", drawn))
        rows += [_quantiles(f"{title}, {path}", times) for path, times in shown.items()]
    if not parts:
        return None
    return _section(
        "times",
        "Latency",
        _colours(*PATHS),
        tag("div", parts, class_="pair"),
        _details("The figures", _table("", ("", *_QUANTILE_HEAD), rows)),
    )


_QUANTILE_HEAD: Final = ("#count", "#least", "#p50", "#p90", "#p99", "#most")


def _quantiles(title: str, times: Distribution) -> Element:
    found = (times.least, *(times.quantile(each) for each in (0.5, 0.9, 0.99)), times.most)
    figures = (time(each if times.count else None) for each in found)
    return tag(
        "tr",
        tag("th", title, scope="row"),
        tag("td", f"{times.count:,}", class_="n"),
        [tag("td", figure, class_="n") for figure in figures],
    )


def _faults(report: Report) -> Element | None:
    example = report.example
    parts: list[Child] = []
    if example is not None and example.faults:
        parts.append(
            tag(
                "p",
                f"Seed {example.seed}. The bar is the fault, the thin line how long it took "
                "from its end until all were served again.",
                class_="note",
            )
        )
        drawing = charts.fault_axis(example.faults, example.virtual_ns)
        parts.append(_scroll(drawing, "Faults on the run's time axis"))
    with_times = [row for row in report.recovery if row.times.count]
    if with_times:
        parts.append(
            tag(
                "div",
                [
                    tag(
                        "figure",
                        tag("h3", f"Served again after: {row.kind}"),
                        charts.ecdf({"good": row.times}, f"Recovery from {row.kind}"),
                    )
                    for row in with_times
                ],
                class_="pair",
            )
        )
    if report.recovery:
        parts.append(_recovery_table(report.recovery))
    if not parts:
        return None
    return _section("faults", "Faults and recovery", parts)


def _recovery_table(recovery: Sequence[RecoveryRow]) -> Element:
    rows = []
    for row in recovery:
        times = row.times
        found = (times.quantile(0.5), times.quantile(0.9), times.most if times.count else None)
        rows.append(
            tag(
                "tr",
                tag("th", row.kind, scope="row"),
                [tag("td", f"{each:,}", class_="n") for each in (row.happened, row.undisturbed)],
                [tag("td", time(each), class_="n") for each in found],
                tag("td", f"{row.never:,}", class_="n no" if row.never else "n"),
            )
        )
    head = ("fault", "#happened", "#undisturbed", "#p50", "#p90", "#most", "#never recovered")
    return _table("Time from the end of a fault until all were served again", head, rows)


def _timeline(example: Result) -> Element:
    steps = example.timeline
    packets = len(flights(steps))
    note = f"Seed {example.seed}, {count(packets, 'packet')}"
    if packets > MAX_FLIGHTS:
        note += f", of which the first {MAX_FLIGHTS} are drawn"
    note += "; instants count from when all were online. Dots are NATs on the way"
    listed = [_listed(step) for step in steps[:MAX_LISTED_STEPS]]
    head = ("#at", "kind", "where", "peer", "what", "#bytes")
    return _section(
        "timeline",
        "One session, packet by packet",
        tag("p", note + ".", class_="note"),
        _scroll(sequence(steps), "The session, packet by packet"),
        _details("All steps as a table", _table("", head, listed)),
    )


def _listed(step: Step) -> Element:
    return tag(
        "tr",
        tag("td", instant(step.at_ns), class_="n"),
        [tag("td", each) for each in (step.kind, step.where, step.peer)],
        tag("td", step.text, class_="t"),
        tag("td", step.size or "", class_="n"),
    )


def _pairs(report: Report) -> Element | None:
    if not report.pairs:
        return None
    ordered = sorted(report.pairs, key=lambda row: (not row.worse, not row.outcomes.get("failed")))
    rows = [_pair(row) for row in ordered[:MAX_PAIRS]]
    left = len(report.pairs) + report.pairs_left_out - len(rows)
    head = ("client", "resource", "client's NAT", "gateway's NAT", "theory", "outcomes")
    return _section(
        "pairs",
        "Pairs",
        _table("", (*head, "#first answer, median"), rows),
        tag("p", f"and {count(left, 'pair')} more", class_="note") if left > 0 else None,
    )


def _pair(row: PairRow) -> Element:
    told = ", ".join(
        f"{times:,} {outcome}" if len(row.outcomes) > 1 or times > 1 else outcome
        for outcome, times in sorted(row.outcomes.items(), key=lambda each: -each[1])
    )
    return tag(
        "tr",
        tag("th", row.client, scope="row"),
        tag("td", row.resource),
        tag("td", nat(row.client_nat)),
        tag("td", nat(row.gateway_nat)),
        tag("td", row.expected or "–"),
        tag("td", told, class_="no" if row.worse else None),
        tag("td", time(row.first_answer.quantile(0.5)), class_="n"),
    )


def _figures(report: Report) -> Element | None:
    if not report.counters:
        return None
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", f"{number:,}", class_="n"))
        for name, number in sorted(report.counters.items())
    ]
    table = _details(
        f"{count(len(rows), 'counter')}", _table("Over all runs", ("counter", "#sum"), rows)
    )
    return _section("counters", "Counters", table)


def _foot(report: Report) -> Element:
    example = report.example
    parts: list[Child] = []
    if example is not None:
        parts.append(
            tag(
                "p",
                "Drawn from seed ",
                tag("code", example.seed),
                "; run it again with ",
                tag("code", f"holloway sim run FILE --seed {example.seed}"),
                ".",
            )
        )
        if example.error:
            parts += [tag("h3", "What ended that run"), tag("pre", example.error)]
    cpu = report.cost.get("cpu_s", 0.0)
    if cpu:
        virtual = report.virtual_ns / 1e9
        text = f"{virtual:,.0f} s of virtual time in {cpu:,.1f} CPU s ({virtual / cpu:,.1f} times)."
        parts.append(tag("p", text))
    return tag("footer", parts)


# --- pieces ---------------------------------------------------------------------------------------


def _table(caption: str, head: Sequence[str], rows: Sequence[Element]) -> Element:
    """A table; a heading that begins with # is of figures."""
    cells = [
        tag("th", each.lstrip("#"), scope="col", class_="n" if each.startswith("#") else None)
        for each in head
    ]
    table = tag(
        "table",
        tag("caption", tag("span", caption)) if caption else None,
        tag("thead", tag("tr", cells)),
        tag("tbody", rows),
    )
    return tag("div", table, class_="scroll")


def _scroll(drawing: Element, title: str) -> Element:
    """A drawing that is wider than the screen is scrolled, by keyboard too."""
    inner = tag("div", drawing, class_="scroll", tabindex="0", role="group", aria_label=title)
    return tag("figure", inner)


def _details(title: str, *children: Child) -> Element:
    return tag("details", tag("summary", title), *children)


def _colours(*names: str) -> Element:
    entries = []
    for name in names:
        square = tag("rect", width="12", height="12", rx="2", class_=name)
        entries.append(
            tag("li", tag("svg", square, width="12", height="12", aria_hidden="true"), name)
        )
    return tag("ul", entries, class_="legend")
