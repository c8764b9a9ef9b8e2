"""Many runs as one report, in bounded memory: each result is taken in and let go.

What a report keeps of single runs is bounded by name: so many failures, pairs, examples. The one
whole `Result` in it is the example that the page draws: the first run that did not hold, or else
the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs
import msgspec

from simulations.report.distribution import Distribution
from simulations.result import Backend, Outcome, Pair, Result

MAX_FAILURES: Final = 1_000
MAX_PAIRS: Final = 20_000
MAX_NAT_PAIRS: Final = 2_000
MAX_EXAMPLES: Final = 5
MAX_REASONS: Final = 8
"""Of one failed run, in its row."""

OUTCOMES: Final[tuple[Outcome, ...]] = ("direct", "relayed", "failed", "denied", "unasked")
PATHS: Final = ("direct", "relayed")
REPORT_KIND: Final = "holloway simulation report"


@attrs.frozen(kw_only=True)
class Failure:
    """A run that did not hold. `reasons`: what was wrong, shortened."""

    seed: int
    reasons: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Lost:
    """A seed that gave no result, and why: its workers died again and again, say."""

    seed: int
    why: str


@attrs.define(kw_only=True)
class PairRow:
    """One pair over all runs. `worse`: runs in which the path was worse than the oracle's."""

    client: str
    resource: str
    client_nat: str = ""
    gateway_nat: str = ""
    expected: str = ""
    outcomes: dict[str, int] = attrs.Factory(dict)
    worse: int = 0
    first_answer: Distribution = attrs.Factory(Distribution)


@attrs.define(kw_only=True)
class NatRow:
    """All pairs of which the client is behind one NAT and the gateway behind another."""

    client_nat: str
    gateway_nat: str
    outcomes: dict[str, int] = attrs.Factory(dict)
    expected: dict[str, int] = attrs.Factory(dict)
    worse: int = 0

    @property
    def reached(self) -> int:
        """Pairs that were meant to reach one another: direct, relayed and failed."""
        return sum(self.outcomes.get(each, 0) for each in ("direct", "relayed", "failed"))

    def share(self, outcome: str) -> float:
        """Of those that were meant to reach one another."""
        return self.outcomes.get(outcome, 0) / self.reached if self.reached else 0.0


@attrs.define(kw_only=True)
class RecoveryRow:
    """All faults of a kind. `never`: not recovered by the end; `undisturbed`: nobody felt it."""

    kind: str
    happened: int = 0
    never: int = 0
    undisturbed: int = 0
    times: Distribution = attrs.Factory(Distribution)


@attrs.frozen(kw_only=True)
class Example:
    """What was seen in one run."""

    seed: int
    text: str


@attrs.define(kw_only=True)
class CheckRow:
    number: int
    text: str
    held: int = 0
    failed: int = 0
    examples: list[Example] = attrs.Factory(list)


@attrs.define(kw_only=True)
class RuleRow:
    """A rule of safety or liveness that was broken, how often, and in how many runs."""

    rule: str
    count: int = 0
    runs: int = 0
    examples: list[Example] = attrs.Factory(list)


@attrs.define(kw_only=True)
class Report:
    """See the module. Times in ns of virtual time; `cost` is summed over the runs."""

    kind: Literal["holloway simulation report"] = REPORT_KIND
    format: Literal[1] = 1
    scenario: str = ""
    description: str = ""
    chaos: dict[str, str] = attrs.Factory(dict)
    """The budget by which faults were drawn, every option."""
    backend: Backend = "virtual"
    runs: int = 0
    held: int = 0
    first_seed: int = 0
    last_seed: int = 0
    virtual_ns: int = 0
    outcomes: dict[str, int] = attrs.Factory(dict)
    nat_pairs: list[NatRow] = attrs.Factory(list)
    pairs: list[PairRow] = attrs.Factory(list)
    pairs_left_out: int = 0
    first_answer: dict[str, Distribution] = attrs.Factory(dict)
    round_trip: dict[str, Distribution] = attrs.Factory(dict)
    recovery: list[RecoveryRow] = attrs.Factory(list)
    checks: list[CheckRow] = attrs.Factory(list)
    rules: list[RuleRow] = attrs.Factory(list)
    failures: list[Failure] = attrs.Factory(list)
    failures_left_out: int = 0
    lost: list[Lost] = attrs.Factory(list)
    counters: dict[str, int] = attrs.Factory(dict)
    cost: dict[str, float] = attrs.Factory(dict)
    example: Result | None = None

    @property
    def all_held(self) -> bool:
        """Whether every seed was run and every run held."""
        return self.held == self.runs > 0 and not self.lost


class Merger:
    """Takes in results one by one, in any order of their seeds, and gives one report.

    The order makes no difference but for which examples are kept, so a merger is given results in
    the order of the seeds (`farm` does that)."""

    def __init__(
        self,
        scenario: str = "",
        description: str = "",
        chaos: Mapping[str, object] | None = None,
    ) -> None:
        budget = {
            name: " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            for name, value in (chaos or {}).items()
        }
        self._report = Report(scenario=scenario, description=description, chaos=budget)
        self._pairs: dict[tuple[str, str], PairRow] = {}
        self._nat_pairs: dict[tuple[str, str], NatRow] = {}
        self._recovery: dict[str, RecoveryRow] = {}
        self._checks: dict[int, CheckRow] = {}
        self._rules: dict[str, RuleRow] = {}
        self._example_failed = False

    def add(self, result: Result) -> None:
        """Take in one run."""
        report = self._report
        report.scenario = report.scenario or result.scenario
        report.backend = result.backend
        seeds = (result.seed,) if not report.runs else (report.first_seed, result.seed)
        report.first_seed, report.last_seed = min(seeds), max(*seeds, report.last_seed)
        report.runs += 1
        report.held += result.held
        report.virtual_ns += result.virtual_ns
        for pair in result.pairs:
            self._add_pair(pair)
        self._add_faults(result)
        self._add_checks(result)
        _sum(report.counters, result.counters)
        _sum(report.cost, result.cost)
        if report.example is None or (not result.held and not self._example_failed):
            report.example = result
            self._example_failed = not result.held
        if not result.held:
            if len(report.failures) < MAX_FAILURES:
                report.failures.append(Failure(seed=result.seed, reasons=reasons(result)))
            else:
                report.failures_left_out += 1

    def lose(self, seed: int, why: str) -> None:
        """Note a seed that gave no result."""
        self._report.lost.append(Lost(seed=seed, why=why))

    @property
    def failed(self) -> int:
        """Runs that did not hold, and seeds without a result."""
        return self._report.runs - self._report.held + len(self._report.lost)

    def report(self) -> Report:
        """All that was taken in. To be read only; a later `add` may change it."""
        it = self._report
        it.pairs = [self._pairs[key] for key in sorted(self._pairs)]
        it.nat_pairs = [self._nat_pairs[key] for key in sorted(self._nat_pairs)]
        it.recovery = [self._recovery[key] for key in sorted(self._recovery)]
        it.checks = [self._checks[key] for key in sorted(self._checks)]
        it.rules = [self._rules[key] for key in sorted(self._rules)]
        return it

    # --- the parts of a result ----------------------------------------------------------------

    def _add_pair(self, pair: Pair) -> None:
        report, worse = self._report, is_worse(pair)
        _sum(report.outcomes, {pair.outcome: 1})
        key = (pair.client_nat, pair.gateway_nat)
        if key not in self._nat_pairs and len(self._nat_pairs) < MAX_NAT_PAIRS:
            self._nat_pairs[key] = NatRow(client_nat=key[0], gateway_nat=key[1])
        if (nats := self._nat_pairs.get(key)) is not None:
            _sum(nats.outcomes, {pair.outcome: 1})
            _sum(nats.expected, {pair.expected: 1})
            nats.worse += worse
        row = self._pair_row(pair)
        if row is not None:
            _sum(row.outcomes, {pair.outcome: 1})
            row.worse += worse
        if pair.outcome in PATHS:
            if pair.first_answer_ns is not None:
                report.first_answer.setdefault(pair.outcome, Distribution()).add(
                    pair.first_answer_ns
                )
                if row is not None:
                    row.first_answer.add(pair.first_answer_ns)
            if pair.round_trip_ns is not None:
                report.round_trip.setdefault(pair.outcome, Distribution()).add(pair.round_trip_ns)

    def _pair_row(self, pair: Pair) -> PairRow | None:
        key = (pair.client, pair.resource)
        if key not in self._pairs:
            if len(self._pairs) >= MAX_PAIRS:
                self._report.pairs_left_out += 1
                return None
            self._pairs[key] = PairRow(
                client=pair.client,
                resource=pair.resource,
                client_nat=pair.client_nat,
                gateway_nat=pair.gateway_nat,
                expected=pair.expected,
            )
        return self._pairs[key]

    def _add_faults(self, result: Result) -> None:
        for fault in result.faults:
            row = self._recovery.setdefault(fault.kind, RecoveryRow(kind=fault.kind))
            row.happened += 1
            if fault.recovery_ns is None:
                row.never += 1
            elif fault.recovery_ns == 0:
                row.undisturbed += 1
            else:
                row.times.add(fault.recovery_ns)

    def _add_checks(self, result: Result) -> None:
        for checked in result.checks:
            row = self._checks.setdefault(
                checked.number, CheckRow(number=checked.number, text=checked.text)
            )
            row.held += checked.held
            row.failed += not checked.held
            if not checked.held:
                _example(row.examples, result.seed, checked.detail or checked.text)
        for violation in result.violations:
            rule = self._rules.setdefault(violation.rule, RuleRow(rule=violation.rule))
            rule.count += 1
            _example(rule.examples, result.seed, f"{_seconds(violation.at_ns)}: {violation.detail}")
        for name in {violation.rule for violation in result.violations}:
            self._rules[name].runs += 1


def merge(*results: Result) -> Report:
    """The report of some runs."""
    merger = Merger()
    for result in results:
        merger.add(result)
    return merger.report()


def is_worse(pair: Pair) -> bool:
    """Whether the outcome is worse than what theory promises for the pair's NATs."""
    if pair.expected == "direct":
        return pair.outcome in ("relayed", "failed")
    return pair.expected == "relayed" and pair.outcome == "failed"


def reasons(result: Result) -> tuple[str, ...]:
    """Why a run did not hold, shortened."""
    found = [result.error] if result.error else []
    found += [f"{each.rule}: {each.detail}" for each in result.violations]
    found += [
        f"check {each.number}: {each.text}: {each.detail}"
        for each in result.checks
        if not each.held
    ]
    shown = [text if len(text) <= 300 else text[:297] + "..." for text in found[:MAX_REASONS]]
    if len(found) > MAX_REASONS:
        shown.append(f"and {len(found) - MAX_REASONS} more")
    return tuple(shown)


# --- JSON -----------------------------------------------------------------------------------------


def report_to_json(report: Report) -> bytes:
    """The report as JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def report_from_json(data: bytes) -> Report:
    """The inverse; the JSON of a single `Result` is taken too. Raises msgspec.ValidationError (or
    DecodeError), which are ValueErrors."""
    raw: Any = msgspec.json.decode(data)
    if isinstance(raw, dict) and "kind" not in raw and "seed" in raw:
        return merge(msgspec.convert(raw, Result))
    if not isinstance(raw, dict) or raw.get("kind") != REPORT_KIND:
        raise ValueError(f"its `kind` is not {REPORT_KIND!r}")
    # Keys of objects are text in JSON; those of `bins` become numbers again.
    return msgspec.json.decode(data, type=Report, strict=True)


def _sum(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        into[name] = into.get(name, 0) + value


def _example(examples: list[Example], seed: int, text: str) -> None:
    if len(examples) < MAX_EXAMPLES and all(each.seed != seed for each in examples):
        examples.append(Example(seed=seed, text=text[:1_000]))


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
