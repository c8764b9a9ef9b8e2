"""Faults for tests: one object of options, and the dice that are thrown by it.

    Faults(seed=7, shuffles_turns=True, crash_before_per_million=2_000)

Everything follows from the seed: a run that fails is run again by its printed options. As it is
made, nothing ever goes wrong. `runtime.testing` says how to run a system under it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import attrs

from runtime.actor import Actor
from runtime.randomness import SeededRandomness

MILLION: Final = 1_000_000


class InjectedCrash(Exception):
    """What an actor crashes with that crashes by chance."""


class InjectedFailure(Exception):
    """What an effect raises that fails by chance, unless `Faults.effect_error` says otherwise."""


def _rate(instance: Faults, attribute: attrs.Attribute[int], value: int) -> None:
    if not 0 <= value <= MILLION:
        raise ValueError(f"{attribute.name} is 0 to {MILLION}")


def _span(instance: Faults, attribute: attrs.Attribute[tuple[int, int]], value: Any) -> None:
    least, most = value
    if not 0 <= least <= most:
        raise ValueError(f"{attribute.name} is (least, most)")


def _never() -> int:
    field: int = attrs.field(default=0, validator=_rate)
    return field


def _between(least_ns: int, most_ns: int) -> tuple[int, int]:
    field: tuple[int, int] = attrs.field(default=(least_ns, most_ns), validator=_span)
    return field


@attrs.frozen(kw_only=True)
class Faults:
    """What may go wrong in a run, and how often. Rates are chances in a million, each thrown anew
    at every occasion; times are drawn from (least, most) in nanoseconds, both ends possible."""

    seed: int = 0
    shuffles_turns: bool = False
    """Actors that have mail are run in a drawn order, for a drawn number of messages, and calls go
    on the spot or through the mailbox as it is drawn. Only orders that are legal: everyone queued
    has a turn before anybody has two, and what one sends another arrives in order."""

    crash_before_per_million: int = _never()
    """A handler raises InjectedCrash before it has done anything."""
    crash_after_per_million: int = _never()
    """So it does when it has done everything, but nobody is answered yet."""
    crash_waiting_per_million: int = _never()
    """So it does where it awaits something that has come."""
    crash_start_per_million: int = _never()
    """`started` raises InjectedCrash (of those that have one)."""
    crash_spares: tuple[type[Actor], ...] = ()
    """Actors of these classes, and below them, never crash by chance."""

    effect_names: tuple[str, ...] = ()
    """Names of the functions whose effects are subject to what follows; none: all of them."""
    effect_fail_before_per_million: int = _never()
    """An effect raises `effect_error()` and has done nothing."""
    effect_fail_after_per_million: int = _never()
    """An effect is carried out, and then raises `effect_error()`: as a commit that is not
    confirmed."""
    effect_error: Callable[[], Exception] = InjectedFailure
    effect_lost_per_million: int = _never()
    """An effect is not carried out and never comes back; only a deadline ends the wait."""
    effect_delay_per_million: int = _never()
    effect_delay_ns: tuple[int, int] = _between(1, 10**9)
    """How much later than it would an effect is carried out that is delayed."""

    wire_drop_per_million: int = _never()
    """What is sent by a `Wire` does not arrive. Inside a node nothing is ever lost."""
    wire_double_per_million: int = _never()
    """It arrives twice."""
    wire_delay_per_million: int = _never()
    wire_delay_ns: tuple[int, int] = _between(1, 10**9)
    """How much later it arrives that is delayed; what was sent after it does not overtake it."""

    wall_jump_per_million: int = _never()
    """When time has passed, the wall clock is set, forward or back; monotonic time is not."""
    wall_jump_ns: tuple[int, int] = _between(1, 10**10)
    stall_per_million: int = _never()
    """When something is due, the host is away for a while, as if the process were stopped: whatever
    falls into that time is late."""
    stall_ns: tuple[int, int] = _between(1, 10**10)

    def swarm(self, seed: int) -> Faults:
        """Options for one run of many: by `seed`, half of the faults never happen in it, and the
        others at a rate of at most that of this object. (With all of them in every run, the common
        ones would hide the rare ones.)"""
        chance = SeededRandomness(seed, "swarm")
        rates: dict[str, Any] = {
            field.name: chance.integer(2) and chance.integer(getattr(self, field.name) + 1)
            for field in attrs.fields(Faults)
            if field.name.endswith("_per_million")
        }
        return attrs.evolve(self, seed=seed, **rates)


@attrs.frozen(kw_only=True)
class FaultStatistics:
    """How often what was injected, since the start."""

    crashes_before: int
    crashes_after: int
    crashes_waiting: int
    crashes_at_start: int
    effects_failed_before: int
    effects_failed_after: int
    effects_lost: int
    effects_delayed: int
    wires_dropped: int
    wires_doubled: int
    wires_delayed: int
    wall_jumps: int
    stalls: int
    turns_shuffled: int
    """Turns that were drawn from more than one actor."""


class FaultInjector:
    """Throws the dice of one run. Every kind of fault has a stream of its own."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self._chance = SeededRandomness(faults.seed, "faults")
        self._chance_by_kind: dict[str, SeededRandomness] = {}
        self._counts: Counter[str] = Counter()
        self._healed = False

    def heal(self) -> None:
        """From now on nothing goes wrong, until `resume`. Turns are shuffled all the same."""
        self._healed = True

    def resume(self) -> None:
        """From now on things go wrong again."""
        self._healed = False

    def strikes(self, kind: str) -> bool:
        """Whether the fault of `<kind>_per_million` happens now; if so, it is counted."""
        rate: int = 0 if self._healed else getattr(self.faults, f"{kind}_per_million")
        if rate == 0 or self.stream(kind).integer(MILLION) >= rate:
            return False
        self._counts[kind] += 1
        return True

    def spares(self, actor: Actor) -> bool:
        """Whether this actor never crashes by chance."""
        return isinstance(actor, self.faults.crash_spares)

    def concerns(self, function: Callable[..., Any]) -> bool:
        """Whether effects of this function can fail."""
        names = self.faults.effect_names
        return not names or getattr(function, "func", function).__name__ in names

    def duration_ns(self, kind: str) -> int:
        """A time drawn from `<kind>_ns`."""
        least, most = getattr(self.faults, f"{kind}_ns")
        drawn: int = least + self.stream(kind).integer(most - least + 1)
        return drawn

    def stream(self, kind: str) -> SeededRandomness:
        """The randomness that belongs to this kind of fault alone."""
        stream = self._chance_by_kind.get(kind)
        if stream is None:
            stream = self._chance_by_kind[kind] = self._chance.child(kind)
        return stream

    def count(self, kind: str) -> None:
        """Note that something of this kind was done."""
        self._counts[kind] += 1

    def statistics(self) -> FaultStatistics:
        counts = self._counts
        return FaultStatistics(
            crashes_before=counts["crash_before"],
            crashes_after=counts["crash_after"],
            crashes_waiting=counts["crash_waiting"],
            crashes_at_start=counts["crash_start"],
            effects_failed_before=counts["effect_fail_before"],
            effects_failed_after=counts["effect_fail_after"],
            effects_lost=counts["effect_lost"],
            effects_delayed=counts["effect_delay"],
            wires_dropped=counts["wire_drop"],
            wires_doubled=counts["wire_double"],
            wires_delayed=counts["wire_delay"],
            wall_jumps=counts["wall_jump"],
            stalls=counts["stall"],
            turns_shuffled=counts["turn"],
        )
