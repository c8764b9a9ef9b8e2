"""What must be in the end, when faults have healed: everybody who may has access, and directly
wherever the oracle says so. A pure reading of a `Result`.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from simulations.result import Pair, Result, Violation

RULE = "liveness"
AS_GOOD = {"direct": ("direct",), "relayed": ("direct", "relayed")}
"""Which outcomes satisfy what the oracle expects: a pair may do better than theory says."""


def judged(result: Result) -> Result:
    """The result with a violation for each pair that has not what it should in the end."""
    found = tuple(_misses(result))
    return attrs.evolve(result, violations=(*result.violations, *found))


def _misses(result: Result) -> Iterator[Violation]:
    for pair in result.pairs:
        wanted = AS_GOOD.get(pair.expected)
        if wanted is not None and pair.asked and pair.outcome not in wanted:
            yield Violation(at_ns=result.virtual_ns, rule=RULE, detail=_sentence(pair))


def _sentence(pair: Pair) -> str:
    way = f"{pair.client_nat or 'no NAT'} to {pair.gateway_nat or 'no NAT'}"
    return (
        f"{pair.client} to {pair.resource} ({way}): {pair.outcome}, not {pair.expected}"
        f" ({pair.why or 'no reason given'}); {pair.answered} of {pair.asked} answered"
    )
