"""How long each fault kept those from their resources who may reach them."""

from __future__ import annotations

from collections.abc import Sequence

from simulations.checks.expectations import Zero
from simulations.faults import Struck
from simulations.result import Injected
from simulations.traffic import SHOWS_NS, Pair


def injected(
    struck: Struck, pairs: Sequence[Pair], zero: Zero, everything: Sequence[Struck]
) -> Injected:
    """A fault of a run, as its result has it; `everything`: all of them."""
    over_at = struck.at if struck.over_at is None else min(struck.over_at, zero.end)
    shows_until = _shows_until(over_at, everything)
    recoveries = [
        pair.recovered_ns(struck.at, over_at, zero.end, shows_until)
        for pair in pairs
        if pair.may_throughout(struck.at, min(shows_until, zero.end))
        and pair.worked_before(struck.at)
    ]
    known = [each for each in recoveries if each is not None]
    duration = None if struck.over_at is None else struck.over_at - struck.at
    return Injected(
        at_ns=struck.at - zero.begin,
        kind=struck.fault.kind,
        targets=struck.fault.targets or struck.fault.subject,
        duration_ns=duration,
        recovery_ns=None if len(known) < len(recoveries) else max(known, default=0),
        text=struck.text,
    )


def _shows_until(over_at: int, everything: Sequence[Struck]) -> int:
    """What is lost after a fault is blamed on it until the next one begins or ends."""
    instants = [at for each in everything for at in (each.at, each.over_at)]
    later = [at for at in instants if at is not None and at > over_at]
    return min([over_at + SHOWS_NS, *later])
