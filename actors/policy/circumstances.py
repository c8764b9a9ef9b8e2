"""All circumstances of a request, divided into classes that some policies cannot tell apart.

What a policy asks of a request falls into independent questions (*axes*): the instant, the
country, the address, the provider, whether the device is verified, and each reported fact. The
policies in question divide each axis into finitely many classes. `Space` takes one value for each
class (the unknown first), so a policy becomes a *box*: on each axis the set of classes that it
admits, a bit mask. What one set of policies allows and another does not is then a subtraction of
boxes, and is exact: every circumstance is in a class, and each class has an example.

The axes are taken to be independent. That an address lies in one country only is not known here.

Instants are divided from now until the last expiry of a policy in question and `MAX_HORIZON`
after it, in which every weekly window comes once; what follows is taken to go on in that way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from itertools import count, islice
from typing import Any
from uuid import UUID

import attrs

from actors.model import Fact, FactTest, FactValue
from actors.policy.conditions import (
    Condition,
    Countries,
    Networks,
    Providers,
    Reported,
    Verified,
    meets,
    parse_version,
)
from actors.policy.engine import CompiledPolicy, Request
from actors.policy.windows import MAX_HORIZON

MAX_SPANS_EXAMINED = 2_000
"""How many openings of one time window are looked at; what comes after is not."""
MAX_PIECES = 5_000
"""Into how many boxes a difference may fall apart before it is no longer worked out."""

Box = tuple[int, ...]
"""For each axis the classes that are in it, as bits."""


@attrs.frozen(kw_only=True)
class Circumstances:
    """What a request can depend on besides who asks for what. None is unknown."""

    instant: datetime
    remote_ip: str | None = None
    region: str | None = None
    auth_provider_id: UUID | None = None
    client_verified: bool | None = None
    posture: tuple[Fact, ...] = ()

    def request(self, principal_id: UUID, resource_id: UUID) -> Request:
        """The question whether a principal may reach a resource so."""
        return Request(
            principal_id=principal_id,
            resource_id=resource_id,
            remote_ip=self.remote_ip,
            region=self.region,
            auth_provider_id=self.auth_provider_id,
            client_verified=self.client_verified,
            posture=self.posture,
        )


@attrs.frozen(kw_only=True)
class Span:
    """From `start` up to, not including, `until`; None: no end was found."""

    start: datetime
    until: datetime | None


@attrs.frozen
class _Axis:
    """One question: an example of each class, and which policies admit it."""

    name: str
    examples: Sequence[Any]
    admits: Callable[[CompiledPolicy, Any], bool]

    def mask(self, policy: CompiledPolicy) -> int:
        bits = 0
        for place, example in enumerate(self.examples):
            if self.admits(policy, example):
                bits |= 1 << place
        return bits


class Space:
    """The circumstances from an instant on, as far as these policies tell them apart.

    `exact` is false if a time window opens more often than is looked at.
    """

    def __init__(self, policies: Collection[CompiledPolicy], instant: datetime) -> None:
        starts, self.exact = _divide_time(policies, instant)
        conditions = [each for policy in policies for each in policy.conditions]
        self._axes = [
            _Axis("instant", starts, _admits_instant),
            *_axes_of_conditions(conditions),
            *_axes_of_facts(conditions),
        ]

    def box(self, policy: CompiledPolicy) -> Box:
        """The circumstances in which a policy, which must not be disabled, allows."""
        return tuple(axis.mask(policy) for axis in self._axes)

    def now(self, policy: CompiledPolicy) -> Box:
        """The circumstances at the first instant in which a policy allows."""
        box = self.box(policy)
        return (box[0] & 1, *box[1:])

    def all_now(self) -> Box:
        """All circumstances at the first instant."""
        return (1, *((1 << len(axis.examples)) - 1 for axis in self._axes[1:]))

    def spans(self, boxes: Iterable[Box]) -> Iterator[Span]:
        """When one of the boxes is not empty, in order, none touching the next."""
        bits = 0
        for box in boxes:
            bits |= box[0]
        starts = self._axes[0].examples
        place = 0
        while bits >> place:
            if not bits >> place & 1:
                place += 1
                continue
            first = place
            while bits >> place & 1:
                place += 1
            until = starts[place] if place < len(starts) else None
            yield Span(start=starts[first], until=until)

    def example(self, box: Box) -> Circumstances:
        """The first circumstances in a box, with as little known as can be."""
        chosen: dict[str, Any] = {}
        posture: list[Fact] = []
        for axis, bits in zip(self._axes, box, strict=True):
            value = axis.examples[(bits & -bits).bit_length() - 1]
            if axis.name in _CIRCUMSTANCES:
                chosen[axis.name] = value
            elif value is not None:
                posture.append(Fact(name=axis.name.removeprefix(_FACT), value=value))
        return Circumstances(**chosen, posture=tuple(posture))


def subtract(box: Box, others: Iterable[Box], *, max_pieces: int = MAX_PIECES) -> list[Box] | None:
    """What of a box is in none of the others: disjoint boxes. None if they are too many."""
    left = [box] if all(box) else []
    for other in others:
        pieces: list[Box] = []
        for piece in left:
            pieces.extend(_without(piece, other))
        left = pieces
        if len(left) > max_pieces:
            return None
    return left


# --- helpers ---

_FACT = "fact "
_CIRCUMSTANCES = {field.name for field in attrs.fields(Circumstances)} - {"posture"}
_AFTER_MAPPED = 0x1_0000_0000_0000
"""The first IPv6 address after the IPv4-mapped ones (RFC 4291, section 2.5.5.2)."""


def _without(box: Box, other: Box) -> Iterator[Box]:
    """The parts of a box outside another: one for each axis on which it stands out."""
    if not all(mine & its for mine, its in zip(box, other, strict=True)):
        yield box
        return
    for place, its in enumerate(other):
        outside = box[place] & ~its
        if outside:
            yield (*box[:place], outside, *box[place + 1 :])
        box = (*box[:place], box[place] & its, *box[place + 1 :])


def _divide_time(
    policies: Collection[CompiledPolicy], instant: datetime
) -> tuple[list[datetime], bool]:
    """Starts of the classes of instants, the last of which has no end; and whether all that
    should be looked at was."""
    expiries = {
        policy.policy.expires_at
        for policy in policies
        if policy.policy.expires_at is not None and policy.policy.expires_at > instant
    }
    starts = {instant} | expiries
    horizon = max(starts) + MAX_HORIZON
    exact = True
    for windows in {policy.windows for policy in policies if policy.windows is not None}:
        spans = list(islice(windows.spans(instant, horizon), MAX_SPANS_EXAMINED + 1))
        if len(spans) > MAX_SPANS_EXAMINED:
            horizon = spans.pop()[0]
            exact = False
        for start, end in spans:
            starts |= {start, end}
    return sorted(start for start in starts if start < horizon), exact


def _admits_instant(policy: CompiledPolicy, instant: datetime) -> bool:
    expires_at = policy.policy.expires_at
    if expires_at is not None and expires_at <= instant:
        return False
    return policy.windows is None or policy.windows.contains(instant)


def _axes_of_conditions(conditions: Iterable[Condition]) -> Iterator[_Axis]:
    countries: set[str] = set()
    networks: list[Networks] = []
    providers: set[UUID] = set()
    kinds: set[type[Condition]] = set()
    for condition in conditions:
        kinds.add(type(condition))
        match condition:
            case Countries():
                countries |= condition.values
            case Networks():
                networks.append(condition)
            case Providers():
                providers |= condition.values
            case _:
                pass
    if Countries in kinds:
        codes = [None, *sorted(countries), _another_country(countries)]
        yield _Axis("region", codes, _asks(Countries))
    if Networks in kinds:
        yield _Axis("remote_ip", [None, *_addresses(networks)], _asks(Networks))
    if Providers in kinds:
        another = next(id for id in map(_provider, count()) if id not in providers)
        examples = [None, *sorted(providers), another]
        yield _Axis("auth_provider_id", examples, _asks(Providers))
    if Verified in kinds:
        yield _Axis("client_verified", [None, False, True], _asks(Verified))


def _axes_of_facts(conditions: Iterable[Condition]) -> Iterator[_Axis]:
    tests: dict[str, list[FactTest]] = {}
    for condition in conditions:
        for test in condition.tests if isinstance(condition, Reported) else ():
            tests.setdefault(test.name, []).append(test)
    for name in sorted(tests):
        yield _Axis(_FACT + name, [None, *_values(tests[name])], _asks_fact(name))


def _asks(kind: type[Countries | Networks | Providers | Verified]) -> Any:
    def admits(policy: CompiledPolicy, value: Any) -> bool:
        return all(each.admits(value) for each in policy.conditions if isinstance(each, kind))

    return admits


def _asks_fact(name: str) -> Callable[[CompiledPolicy, Any], bool]:
    def admits(policy: CompiledPolicy, value: FactValue | None) -> bool:
        return all(
            meets(test, value)
            for each in policy.conditions
            if isinstance(each, Reported)
            for test in each.tests
            if test.name == name
        )

    return admits


def _provider(number: int) -> UUID:
    return UUID(int=number)


def _another_country(named: Collection[str]) -> str:
    """A code that is not named; those of X and ZZ are nobody's (ISO 3166-1, user-assigned)."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    codes = ["ZZ", *(one + other for one in reversed(letters) for other in letters)]
    return next((code for code in codes if code not in named), "ZZ")


def _addresses(networks: Iterable[Networks]) -> Iterator[str]:
    """The first address of each stretch that the networks tell apart."""
    edges = {(4, 0), (6, 0), (6, _AFTER_MAPPED)}
    for each in networks:
        edges.update(each.edges())
    for version, value in sorted(edges):
        if version == 4 and value < 1 << 32:
            yield str(IPv4Address(value))
        elif version == 6 and value < 1 << 128 and not 0xFFFF_0000_0000 <= value < _AFTER_MAPPED:
            yield str(IPv6Address(value))


def _values(tests: Collection[FactTest]) -> Iterator[FactValue]:
    """A value of each class of a fact. Values of a type that no test names fail as if there were
    none, and are left out."""
    wanted = [test.value for test in tests]
    if any(isinstance(value, bool) for value in wanted):
        yield from (False, True)
    numbers = {value for value in wanted if type(value) is int}
    yield from sorted({value + step for value in numbers for step in (-1, 0, 1)})
    texts = {value for value in wanted if isinstance(value, str)}
    if texts:
        yield from _texts(texts)


def _texts(texts: set[str]) -> Iterator[str]:
    """The texts themselves; one that is none of them and no version; and of versions: one equal
    to each but written otherwise, one between each and the next, and one below all."""
    yield from sorted(texts)
    yield "-" * (max(map(len, texts)) + 1)
    versions = {version for version in map(parse_version, texts) if version is not None}
    depth = max(text.count(".") for text in texts) + 2  # more parts than any has
    for version in sorted({(), *versions}):
        written = ".".join(map(str, version or (0,)))
        yield written + ".0" * depth
        yield ".".join(map(str, (*version, *(0,) * depth, 1)))
