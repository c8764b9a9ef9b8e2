"""What one run of a scenario gave: the same for a run in virtual time and on the kernel.

Plain data, all of it determined by scenario and seed, but for `cost`. It goes to JSON and back
(`to_json`, `from_json`), and is what reports, comparison, shrinking and the exit status look at.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import attrs
import msgspec

RESULT_FORMAT: Final = 1

Outcome = Literal["direct", "relayed", "denied", "failed", "unasked"]
"""How the last exchange of a pair went; `denied` is a refusal by policy, `failed` silence."""
Expected = Literal["direct", "relayed", "none", ""]
Backend = Literal["virtual", "kernel"]


@attrs.frozen(kw_only=True)
class Pair:
    """One client and one resource. `client_nat` and `gateway_nat` name the NATs on the way, from
    the host outwards; `expected` is the oracle's word (empty where policy forbids). Times in ns of
    the run; `first_answer_ns` counts from the first question after access was allowed."""

    client: str
    resource: str
    gateway: str = ""
    client_nat: str = ""
    gateway_nat: str = ""
    expected: Expected = ""
    why: str = ""
    outcome: Outcome = "unasked"
    first_answer_ns: int | None = None
    round_trip_ns: int | None = None
    asked: int = 0
    answered: int = 0
    longest_gap_ns: int = 0


@attrs.frozen(kw_only=True)
class Injected:
    """A fault that happened, and after what time of virtual time from it (from its end, where it
    has one) all pairs that may had answers again; None where they had not by the end, and 0 where
    none was disturbed."""

    at_ns: int
    kind: str
    targets: tuple[str, ...]
    duration_ns: int | None = None
    recovery_ns: int | None = None
    text: str = ""


@attrs.frozen(kw_only=True)
class Checked:
    """A check of the file (its number, from 1) and how it went."""

    number: int
    kind: str = ""
    text: str
    held: bool
    detail: str = ""


@attrs.frozen(kw_only=True)
class Violation:
    """Something that must never be was. `rule` is a name of `checks.safety`, or `liveness`."""

    at_ns: int
    rule: str
    detail: str


@attrs.frozen(kw_only=True)
class Step:
    """One event of the chosen session's timeline. `where` is a host or NAT, `peer` the other end;
    `kind` such as "stun", "wireguard", "turn", "channel", "fault", "drop"."""

    at_ns: int
    kind: str
    where: str
    peer: str
    text: str
    size: int = 0


@attrs.frozen(kw_only=True)
class Node:
    """A network or host, for the drawing. `behind`: the network that it is attached to."""

    name: str
    kind: Literal["network", "portal", "relay", "gateway", "client", "service"]
    behind: str = ""
    label: str = ""


@attrs.frozen(kw_only=True)
class Result:
    """See the module. `trace` is the hash (hex) of all that happened, empty on the kernel; `cost`
    has `wall_s`, `cpu_s` and `memory_bytes`, and alone differs between runs of one seed."""

    format: Literal[1] = 1
    scenario: str
    seed: int
    backend: Backend = "virtual"
    trace: str = ""
    virtual_ns: int = 0
    pairs: tuple[Pair, ...] = ()
    faults: tuple[Injected, ...] = ()
    checks: tuple[Checked, ...] = ()
    violations: tuple[Violation, ...] = ()
    nodes: tuple[Node, ...] = ()
    timeline: tuple[Step, ...] = ()
    counters: dict[str, int] = attrs.Factory(dict)
    error: str = ""
    """What ended the run early, if anything did."""
    cost: dict[str, float] = attrs.Factory(dict)

    @property
    def held(self) -> bool:
        """Whether nothing was wrong: every check held, no rule was broken, no error."""
        return not self.error and not self.violations and all(each.held for each in self.checks)


def to_json(result: Result) -> bytes:
    """The result as JSON."""
    return msgspec.json.encode(result)


def from_json(data: bytes | str) -> Result:
    """The inverse of `to_json`. Raises msgspec.ValidationError with the place that is wrong."""
    return msgspec.json.decode(data, type=Result)


def to_builtins(result: Result) -> Any:
    """The result as dictionaries, lists and numbers."""
    return msgspec.to_builtins(result)
