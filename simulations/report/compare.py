"""Two reports side by side: what changed, and whether the second is worse.

Worse is, by measures that are stated and can be set (`Tolerance`):

- a smaller share of the runs held, a check held in a smaller one, a rule was broken in a larger one
- of the pairs between two NATs a smaller share was direct, or a larger one failed
- the median or the 95th percentile of a time (first answer, round trip, recovery) grew
- more faults were never recovered from

Better and different is told, and is no failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import attrs
import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from admin.safety import printable
from simulations.report.distribution import Distribution
from simulations.report.merged import PATHS, Report
from simulations.report.wording import nat, percent, time

Verdict = Literal["worse", "better", "same"]
QUANTILES: Final = ((0.5, "p50"), (0.95, "p95"))
STYLES: Final = {"worse": "bold red", "better": "green", "same": ""}


@attrs.frozen(kw_only=True)
class Tolerance:
    """What is no change: shares within `share` (0 to 1), times within `relative` of the first or
    `absolute_ns`, and distributions of fewer than `least_count` times."""

    share: float = 0.01
    relative: float = 0.10
    absolute_ns: int = 10 * 10**6
    least_count: int = 5


@attrs.frozen(kw_only=True)
class Difference:
    """One figure in both reports, as it is written, and what that means."""

    what: str
    before: str
    after: str
    verdict: Verdict


@attrs.frozen(kw_only=True)
class Comparison:
    """All figures that both have; `worse` is what decides the exit status."""

    differences: tuple[Difference, ...]

    @property
    def worse(self) -> bool:
        return any(each.verdict == "worse" for each in self.differences)

    def to_json(self) -> bytes:
        found = {"worse": self.worse, "differences": self.differences}
        return msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"


def compare(before: Report, after: Report, tolerance: Tolerance | None = None) -> Comparison:
    """Compare two reports, of one run or of many, of one scenario."""
    return Comparison(differences=tuple(_Comparing(before, after, tolerance or Tolerance()).run()))


def tables(comparison: Comparison, *, everything: bool) -> Iterator[RenderableType]:
    """For the terminal: what changed, or all figures."""
    shown = [each for each in comparison.differences if everything or each.verdict != "same"]
    if shown:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        table.add_column("what", overflow="fold")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for each in shown:
            table.add_row(
                Text("" if each.verdict == "same" else each.verdict, style=STYLES[each.verdict]),
                *(Text(printable(text)) for text in (each.what, each.before, each.after)),
            )
        yield table
    same = len(comparison.differences) - sum(
        each.verdict != "same" for each in comparison.differences
    )
    text = "worse than before" if comparison.worse else "not worse than before"
    style = "bold red" if comparison.worse else "bold green"
    yield Text.assemble((text, style), f" ({same:,} figures are the same within the tolerance)")


class _Comparing:
    def __init__(self, before: Report, after: Report, tolerance: Tolerance) -> None:
        self._before = before
        self._after = after
        self._tolerance = tolerance

    def run(self) -> Iterator[Difference]:
        yield self._shares(
            "runs that held", _share(self._before.held, self._before.runs),
            _share(self._after.held, self._after.runs),
        )  # fmt: skip
        yield from self._checks()
        yield from self._rules()
        yield from self._nat_pairs()
        for title in ("first_answer", "round_trip"):
            one, other = getattr(self._before, title), getattr(self._after, title)
            for path in PATHS:
                what = f"{title.replace('_', ' ')}, {path}"
                yield from self._times(what, one.get(path), other.get(path))
        yield from self._recovery()

    def _checks(self) -> Iterator[Difference]:
        after = {row.text: row for row in self._after.checks}
        for one in self._before.checks:
            if (other := after.get(one.text)) is not None:
                yield self._shares(
                    f"check: {one.text}", _share(one.held, one.held + one.failed),
                    _share(other.held, other.held + other.failed),
                )  # fmt: skip

    def _rules(self) -> Iterator[Difference]:
        before = {row.rule: row for row in self._before.rules}
        after = {row.rule: row for row in self._after.rules}
        for rule in sorted({*before, *after}):
            runs = [row.runs if (row := rows.get(rule)) else 0 for rows in (before, after)]
            yield self._shares(
                f"runs that broke: {rule}", _share(runs[0], self._before.runs),
                _share(runs[1], self._after.runs), more_is_worse=True, exact=True,
            )  # fmt: skip

    def _nat_pairs(self) -> Iterator[Difference]:
        after = {(row.client_nat, row.gateway_nat): row for row in self._after.nat_pairs}
        for one in self._before.nat_pairs:
            other = after.get((one.client_nat, one.gateway_nat))
            if other is None or not one.reached or not other.reached:
                continue
            pair = f"{nat(one.client_nat)} - {nat(one.gateway_nat)}"
            yield self._shares(f"{pair}: direct", one.share("direct"), other.share("direct"))
            yield self._shares(
                f"{pair}: failed", one.share("failed"), other.share("failed"), more_is_worse=True
            )

    def _recovery(self) -> Iterator[Difference]:
        after = {row.kind: row for row in self._after.recovery}
        for one in self._before.recovery:
            if (other := after.get(one.kind)) is None:
                continue
            yield self._shares(
                f"{one.kind}: never recovered", _share(one.never, one.happened),
                _share(other.never, other.happened), more_is_worse=True,
            )  # fmt: skip
            yield from self._times(f"recovery from {one.kind}", one.times, other.times)

    # --- single figures ---------------------------------------------------------------------------

    def _shares(
        self,
        what: str,
        before: float,
        after: float,
        *,
        more_is_worse: bool = False,
        exact: bool = False,
    ) -> Difference:
        verdict: Verdict = "same"
        if abs(after - before) > (0 if exact else self._tolerance.share):
            verdict = "worse" if (after > before) == more_is_worse else "better"
        return Difference(what=what, before=percent(before), after=percent(after), verdict=verdict)

    def _times(
        self, what: str, before: Distribution | None, after: Distribution | None
    ) -> Iterator[Difference]:
        if before is None or after is None or not before.count or not after.count:
            return
        tolerance = self._tolerance
        few = min(before.count, after.count) < tolerance.least_count
        for share, title in QUANTILES:
            one, other = before.quantile(share), after.quantile(share)
            assert one is not None
            assert other is not None
            allowed = max(int(one * tolerance.relative), tolerance.absolute_ns)
            verdict: Verdict = "same"
            if not few and abs(other - one) > allowed:
                verdict = "worse" if other > one else "better"
            yield Difference(
                what=f"{what}, {title}", before=time(one), after=time(other), verdict=verdict
            )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
