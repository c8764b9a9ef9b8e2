"""Reports: many runs in one, in bounded memory; nothing that a run says steers what shows it."""

from __future__ import annotations

import io
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from simulations.report import merged
from simulations.report.charts import CHARACTER
from simulations.report.distribution import Distribution, bin_of, middle_of
from simulations.report.markup import render, tag
from simulations.report.merged import (
    MAX_FAILURES,
    Merger,
    Report,
    is_worse,
    merge,
    report_from_json,
    report_to_json,
)
from simulations.report.page import POLICY, page, write_page
from simulations.report.sequence import flights
from simulations.report.table import show
from simulations.report.topology import topology
from simulations.result import Checked, Injected, Node, Pair, Result, Step, Violation, to_json

NASTY = "<script>alert(1)</script>\"'&\x1b[31m\u202e</title></style>"


def run_of(seed: int, *, text: str = "plain", held: bool = True) -> Result:
    """A result with something in every field; times depend on the seed."""
    draw = random.Random(seed)
    nats = ("EI/APD", "APD/APD", text)
    pairs = tuple(
        Pair(
            client=f"{text} client {i}",
            resource=f"{text} wiki",
            gateway="gateway",
            client_nat=draw.choice(nats),
            gateway_nat=draw.choice(nats),
            expected="direct",
            why=text,
            outcome=draw.choice(("direct", "direct", "relayed", "failed", "denied")),
            first_answer_ns=draw.randrange(10**8, 10**9),
            round_trip_ns=draw.randrange(10**7, 10**8),
            asked=10,
            answered=9,
        )
        for i in range(12)
    )
    return Result(
        scenario=text,
        seed=seed,
        trace="ab" * 32,
        virtual_ns=60 * 10**9,
        pairs=pairs,
        faults=(
            Injected(at_ns=10**10, kind="crash", targets=(text,), recovery_ns=10**9, text=text),
            Injected(at_ns=2 * 10**10, kind="roam", targets=("a",), duration_ns=10**9),
            Injected(at_ns=5 * 10**10, kind="database", targets=(), recovery_ns=0),
        ),
        checks=(Checked(number=1, text=f"{text} is reached", held=held, detail=text),),
        violations=() if held else (Violation(at_ns=5, rule=text, detail=text),),
        nodes=(
            Node(name="home", kind="network", behind="internet", label=text),
            Node(name="laptop", kind="client", behind="home"),
            Node(name="portal", kind="portal", behind="internet"),
        ),
        timeline=(
            Step(at_ns=5, kind="stun", where="laptop", peer="192.0.2.1:9", text="sent x", size=9),
            Step(
                at_ns=7, kind="stun", where="home", peer="192.0.2.1:9", text="translated x", size=9
            ),
            Step(
                at_ns=9,
                kind="drop",
                where="office",
                peer="q",
                text="dropped x (nat filter)",
                size=9,
            ),
            Step(at_ns=9, kind=text, where=text, peer=text, text=text),
            Step(at_ns=9, kind="fault", where="", peer="", text=text),
        ),
        counters={text: seed},
        error="" if held else text,
        cost={"cpu_s": 0.5},
    )


# --- distributions --------------------------------------------------------------------------------


@given(st.integers(0, 2**62))
def test_a_value_is_known_to_within_its_bin(value: int) -> None:
    assert abs(middle_of(bin_of(value)) - value) <= value / 32


@given(st.lists(st.integers(0, 10**12), min_size=1), st.floats(0, 1))
def test_quantiles_are_those_of_the_sorted_values_to_within_a_bin(
    values: list[int], share: float
) -> None:
    times = Distribution.of(values)
    ordered = sorted(values)
    place = max(-(-share * len(ordered) // 1) - 1, 0)
    exact = ordered[min(int(place), len(ordered) - 1)]
    found = times.quantile(share)
    assert found is not None
    assert abs(found - exact) <= exact / 16 + 1
    assert (times.least, times.most, times.count) == (ordered[0], ordered[-1], len(values))
    assert [round(part * len(values)) for _, part in times.steps()][-1] == len(values)


def test_however_many_values_there_are_the_bins_are_few() -> None:
    draw = random.Random(1)
    times = Distribution.of(draw.randrange(10 ** draw.randrange(1, 12)) for _ in range(50_000))
    assert len(times.bins) < 1_300


# --- merging --------------------------------------------------------------------------------------


def test_a_report_goes_to_json_and_back() -> None:
    report = merge(*(run_of(seed, held=seed % 3 != 0) for seed in range(9)))
    assert report_from_json(report_to_json(report)) == report
    assert (report.runs, report.held, report.first_seed, report.last_seed) == (9, 6, 0, 8)


def test_the_json_of_one_result_is_a_report_too() -> None:
    assert report_from_json(to_json(run_of(4))) == merge(run_of(4))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"seed": 1}', b'{"kind": "x"}', b"\xff"])
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        report_from_json(data)


def test_the_example_is_the_first_run_that_did_not_hold() -> None:
    assert merge(run_of(1), run_of(2)).example == run_of(1)
    failed = run_of(2, held=False)
    assert merge(run_of(1), failed, run_of(3, held=False)).example == failed


def test_a_report_keeps_few_of_many_failures_and_pairs_and_counts_the_rest() -> None:
    merger = Merger("x")
    failed = attrs.evolve(run_of(1, held=False), timeline=(), nodes=(), pairs=())
    for seed in range(MAX_FAILURES + 7):
        merger.add(attrs.evolve(failed, seed=seed))
    report = merger.report()
    assert len(report.failures) == MAX_FAILURES
    assert report.failures_left_out == 7
    assert len(report.rules[0].examples) == merged.MAX_EXAMPLES
    assert report.rules[0].count == report.runs

    pairs = tuple(
        Pair(client=f"c{i}", resource="r", client_nat=f"{i}") for i in range(merged.MAX_PAIRS + 3)
    )
    wide = merge(Result(scenario="x", seed=1, pairs=pairs))
    assert (len(wide.pairs), wide.pairs_left_out) == (merged.MAX_PAIRS, 3)
    assert len(wide.nat_pairs) == merged.MAX_NAT_PAIRS


@pytest.mark.parametrize(
    ("expected", "outcome", "worse"),
    [
        ("direct", "direct", False),
        ("direct", "relayed", True),
        ("direct", "failed", True),
        ("direct", "denied", False),
        ("relayed", "direct", False),
        ("relayed", "failed", True),
        ("none", "failed", False),
        ("", "failed", False),
    ],
)
def test_a_pair_is_worse_when_theory_promises_more(
    expected: str, outcome: str, worse: bool
) -> None:
    pair = Pair(client="c", resource="r", expected=expected, outcome=outcome)  # type: ignore[arg-type]
    assert is_worse(pair) is worse


# --- the page -------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """The tags of a page, in order; fails where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "br", "hr"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name


def reports() -> list[Report]:
    many = merge(*(run_of(seed, text=NASTY, held=seed % 3 != 0) for seed in range(1, 9)))
    many.description = NASTY
    many.lost.append(merged.Lost(seed=99, why=NASTY))
    return [
        many,
        merge(run_of(1, text=NASTY, held=False)),
        merge(Result(scenario="empty", seed=1)),
        Report(scenario="nothing"),
    ]


@pytest.mark.parametrize("report", reports(), ids=["many", "one", "empty", "nothing"])
def test_the_page_is_sound_and_loads_and_runs_nothing(report: Report) -> None:
    text = page(report)
    parsed = Parsed(text)
    names = {name for name, _ in parsed.tags}
    assert not names & {"script", "iframe", "img", "link", "object", "embed", "form", "base"}
    for _, attributes in parsed.tags:
        assert not {key for key in attributes if key.startswith("on")}
        assert not {"src", "style", "xlink:href", "srcset"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert f'content="{POLICY}"'.replace("'", "&#x27;") in text


def test_the_policy_of_the_page_comes_before_everything_that_a_run_says() -> None:
    text = page(merge(run_of(1, text=NASTY)))
    assert text.index("Content-Security-Policy") < text.index("alert(1)")


@pytest.mark.parametrize("report", reports()[:2], ids=["many", "one"])
def test_whatever_a_run_says_is_text_on_the_page(report: Report) -> None:
    text = page(report)
    assert "<script" not in text
    assert "alert(1)" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("</style>") == 1
    assert text.count("</title></style>") == 0


def test_every_drawing_is_well_formed_and_has_a_name() -> None:
    drawings = re.findall(r'<svg class="chart[ "].*?</svg>', page(reports()[0]), re.DOTALL)
    assert len(drawings) >= 8
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root[0].tag == "title"
        assert root[0].text
        assert root.get("role") == "img"
        for each in root.iter():
            for name in ("x", "y", "width", "height", "x1", "x2", "y1", "y2", "cx", "cy"):
                assert float(each.get(name, "0")) == float(each.get(name, "0")), "not a number"
            assert float(each.get("width", "1")) >= 0


def test_no_label_of_a_drawing_reaches_beyond_it_and_charts_fit_a_telephone() -> None:
    text = page(merge(*(run_of(seed) for seed in range(1, 4))))
    drawings = re.findall(r'<svg class="chart[ "].*?</svg>', text, re.DOTALL)
    assert len(drawings) >= 5
    fitting = 0
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        width = float(root.get("width", "nan"))
        if "fits" in (root.get("class") or ""):
            fitting += 1
            assert width <= 360
        for each in root.iter("text"):
            long, x = CHARACTER * 0.95 * len(each.text or ""), float(each.get("x", "nan"))
            classes = (each.get("class") or "").split()
            before = long if "e" in classes else long / 2 if "m" in classes else 0
            assert x - before >= 0, (root[0].text, each.text)
            assert x - before + long <= width, (root[0].text, each.text)
    assert fitting >= 3


def test_headings_tables_and_links_are_there_for_who_hears_the_page() -> None:
    parsed = Parsed(page(reports()[0]))
    ids = {attributes["id"] for _, attributes in parsed.tags if "id" in attributes}
    links = {attributes["href"] for name, attributes in parsed.tags if name == "a"}
    assert links == {f"#{key}" for key in ids}
    assert [name for name, _ in parsed.tags].count("h1") == 1
    assert ("html", {"lang": "en"}) in parsed.tags
    headings = [attributes for name, attributes in parsed.tags if name == "th"]
    assert headings
    assert all(attributes.get("scope") in ("row", "col") for attributes in headings)
    scrolled = [each for name, each in parsed.tags if name == "div" and "tabindex" in each]
    assert scrolled
    assert all(each["aria-label"] for each in scrolled)


def test_the_page_is_written_in_one_step(tmp_path: Path) -> None:
    write_page(reports()[1], tmp_path / "report.html")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>\n<html")


@given(text=st.text(), value=st.text())
def test_text_and_attributes_come_out_as_they_went_in(text: str, value: str) -> None:
    parsed = Parsed(render(tag("p", text, title=value)))
    [(name, attributes)] = parsed.tags
    assert name == "p"
    assert set(attributes) == {"title"}


# --- drawings -------------------------------------------------------------------------------------


def test_steps_of_one_packet_become_one_arrow_from_end_to_end() -> None:
    found = flights(run_of(1).timeline)
    assert found[0].hops == ["laptop", "home", "office"]
    assert (found[0].kind, found[0].why, found[0].over_ns) == ("drop", "nat filter", 9)
    assert found[-1].hops == []


def test_packets_alike_are_told_apart_by_where_they_were_just_seen() -> None:
    def step(at: int, where: str, peer: str, verb: str) -> Step:
        return Step(at_ns=at, kind="stun", where=where, peer=peer, text=f"{verb} x", size=9)

    steps = [
        step(1, "laptop", "relay:1", "sent"),
        step(1, "home", "relay:1", "translated"),
        step(5, "gateway", "10.0.0.1:2", "sent"),
        step(5, "office", "192.0.2.9:2", "translated"),
        step(8, "relay", "relay:1", "delivered"),
        step(9, "laptop", "192.0.2.9:2", "delivered"),
    ]
    assert [each.hops for each in flights(steps)] == [
        ["laptop", "home", "relay"],
        ["gateway", "office", "laptop"],
    ]


def test_a_large_topology_is_drawn_by_kind() -> None:
    nodes = [Node(name="portal", kind="portal")]
    for i in range(300):
        nodes.append(Node(name=f"n{i}", kind="network", label="EI/APD" if i % 3 else "APD/APD"))
        nodes.append(Node(name=f"c{i}", kind="client", behind=f"n{i}"))
    drawn = render(topology(nodes))
    assert "200 × EI/APD" in drawn
    assert "100 × APD/APD" in drawn
    assert "portal" in drawn
    assert drawn.count("<rect") == 3  # the internet, and the two kinds


# --- the terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("report", reports(), ids=["many", "one", "empty", "nothing"])
def test_nothing_that_a_run_says_steers_the_terminal(report: Report) -> None:
    written = io.StringIO()
    show(report, Console(file=written, width=100, force_terminal=False))
    text = written.getvalue()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_terminal_tells_what_did_not_hold_and_by_which_seed() -> None:
    written = io.StringIO()
    report = merge(*(run_of(seed, held=seed != 5) for seed in range(1, 9)))
    show(report, Console(file=written, width=120))
    text = written.getvalue()
    assert "1 run of 8 did NOT hold" in text
    assert "FAIL plain is reached (7 of 8 runs)" in text
    assert "BROKEN plain, 1 time in 1 run" in text
    assert "seed 5 did not hold: plain" in text
