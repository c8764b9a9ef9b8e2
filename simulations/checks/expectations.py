"""What the scenario file says must hold: every kind of check, read from the questions and answers.

Instants of the file count from the moment at which the run begins (`Zero`); a bound that is empty
is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import attrs

from simulations.result import Checked, Outcome
from simulations.scenario import schema
from simulations.scenario.units import PPM, duration_ns, share_ppm
from simulations.traffic import Pair

MS: Final = 10**6
SHOWN: Final = 5
LOOK_NS: Final = 50 * MS
GOOD: Final[dict[str, tuple[Outcome, ...]]] = {
    "direct": ("direct",),
    "relayed": ("relayed",),
    "any": ("direct", "relayed"),
    "none": ("denied", "failed", "unasked"),
}


@attrs.frozen(kw_only=True)
class Zero:
    """When the run began, and when it ended, on the world's clock."""

    begin: int
    end: int

    def at(self, written: str) -> int:
        return self.begin + duration_ns(written)

    def until(self, written: str) -> int:
        return self.begin + duration_ns(written) if written else self.end


class Traffic(Protocol):
    """The pairs of a run, in virtual time or on the kernel."""

    def select(self, clients: Sequence[str], resources: Sequence[str], /) -> list[Pair]:
        """Those of these names; all where none are given."""
        ...


class Expectations:
    """The checks of one run. `judge` at its end."""

    def __init__(self, checks: Iterable[schema.Check], traffic: Traffic) -> None:
        self._checks = tuple(checks)
        self._traffic = traffic
        self._online_at: dict[int, dict[str, int]] = {}

    def judge(self, zero: Zero) -> tuple[Checked, ...]:
        """How each went, in the order of the file."""
        return tuple(
            self._judge_one(number, check, zero) for number, check in enumerate(self._checks, 1)
        )

    # --- what has to be looked at while it runs --------------------------------------------------

    def watch(
        self, after: Callable[..., None], is_online: Callable[[str], bool], now: Callable[[], int]
    ) -> None:
        """Begin to look at who comes online, where a check asks for it."""
        for number, check in enumerate(self._checks, 1):
            if check.kind == "online":
                self._online_at[number] = {}
                after(duration_ns(check.at), self._look, number, after, is_online, now, 0)

    def _look(
        self,
        number: int,
        after: Callable[..., None],
        is_online: Callable[[str], bool],
        now: Callable[[], int],
        waited: int,
    ) -> None:
        check, found = self._checks[number - 1], self._online_at[number]
        for name in check.targets:
            if name not in found and is_online(name):
                found[name] = now()
        limit = duration_ns(check.within) if check.within else None
        missing = len(found) < len(set(check.targets))
        if missing and (limit is None or waited < limit):
            after(LOOK_NS, self._look, number, after, is_online, now, waited + LOOK_NS)

    # --- judging ---------------------------------------------------------------------------------

    def _judge_one(self, number: int, check: schema.Check, zero: Zero) -> Checked:
        judge: Callable[[schema.Check, Zero, int], list[str]] = getattr(self, f"_{check.kind}")
        problems = judge(check, zero, number)
        detail = "; ".join(problems[:SHOWN])
        if len(problems) > SHOWN:
            detail += f"; and {len(problems) - SHOWN} more"
        return Checked(
            number=number,
            kind=check.kind,
            text=sentence_of(check),
            held=not problems,
            detail=detail,
        )

    def _pairs(self, check: schema.Check) -> list[Pair]:
        return self._traffic.select(check.source, check.to)

    def _reach(self, check: schema.Check, zero: Zero, number: int) -> list[str]:
        at = zero.at(check.at)
        until = zero.end if at == zero.begin else at
        problems = [] if self._pairs(check) else ["nobody asked"]
        for pair in self._pairs(check):
            outcome = pair.outcome(until)
            if outcome not in GOOD[check.path]:
                problems.append(f"{_name(pair)} is {outcome}")
            first = pair.first_answer_ns()
            if check.within and (first is None or first > duration_ns(check.within)):
                problems.append(f"{_name(pair)} had its first answer after {_ms(first)}")
        return problems

    def _denied(self, check: schema.Check, zero: Zero, number: int) -> list[str]:
        return self._passes(check, zero.at(check.at), zero.until(check.until), zero)

    def _cut(self, check: schema.Check, zero: Zero, number: int) -> list[str]:
        within = duration_ns(check.within) if check.within else 0
        return self._passes(check, zero.at(check.at) + within, zero.until(check.until), zero)

    def _passes(self, check: schema.Check, since: int, until: int, zero: Zero) -> list[str]:
        problems = []
        for pair in self._pairs(check):
            answers = pair.answered_within(since, until + 1)
            if answers:
                after = _ms(answers[-1] - zero.begin)
                problems.append(f"{_name(pair)} had {len(answers)} answers, the last at {after}")
        return problems

    def _recovered(self, check: schema.Check, zero: Zero, number: int) -> list[str]:
        at = zero.at(check.at)
        limit = duration_ns(check.within) if check.within else None
        problems = []
        for pair in self._pairs(check):
            took = pair.recovered_ns(at, at, zero.until(check.until))
            if took is None:
                problems.append(f"{_name(pair)} had no answer again")
            elif limit is not None and took > limit:
                problems.append(f"{_name(pair)} had its next answer after {_ms(took)}")
        return problems

    def _uninterrupted(self, check: schema.Check, zero: Zero, number: int) -> list[str]:
        since, until = zero.at(check.at), zero.until(check.until)
        limit = duration_ns(check.within) if check.within else 0
        problems = []
        for pair in self._pairs(check):
            gap = pair.longest_gap_ns(since, until)
            if not pair.answered_within(since, until):
                problems.append(f"{_name(pair)} had no answer")
            elif gap > limit:
                problems.append(f"{_name(pair)} had a gap of {_ms(gap)}")
        return problems

    def _online(self, check: schema.Check, zero: Zero, number: int) -> list[str]:
        found = self._online_at.get(number, {})
        return [f"{name} was not online" for name in check.targets if name not in found]

    def _share(self, check: schema.Check, zero: Zero, number: int) -> list[str]:
        pairs = [pair for pair in self._pairs(check) if pair.may() and len(pair.asked)]
        if not pairs:
            return ["no pair that may asked"]
        wanted = {outcome for path in check.paths for outcome in GOOD[path]}
        good = sum(pair.outcome(zero.end) in wanted for pair in pairs)
        if good * PPM >= share_ppm(check.least) * len(pairs):
            return []
        return [f"{good} of {len(pairs)}: {100 * good / len(pairs):.1f} %"]


def sentence_of(check: schema.Check) -> str:
    """A check in words."""
    who = " ".join(check.targets or check.source) or "everybody"
    what = " ".join(check.to) or "what they may"
    at = f" at {check.at}" if check.at != "0s" else ""
    within = f" within {check.within}" if check.within else ""
    until = f" until {check.until}" if check.until else ""
    match check.kind:
        case "reach":
            return f"{who} reaches {what} ({check.path}){at}{within}"
        case "denied":
            return f"{who} is denied {what}{at}{until}"
        case "cut":
            return f"{who} is cut from {what}{at}{within}"
        case "recovered":
            return f"{who} reaches {what} again after the fault{at}{within}"
        case "uninterrupted":
            return f"{who} reaches {what} without a gap above {check.within or '0s'}{at}{until}"
        case "online":
            return f"{who} is online{at}{within}"
        case "share":
            return f"at least {check.least} of all pairs are {' or '.join(check.paths)}"


def _name(pair: Pair) -> str:
    return f"{pair.client} to {pair.resource}"


def _ms(duration_ns: int | None) -> str:
    return "never" if duration_ns is None else f"{duration_ns / MS:.0f} ms"
