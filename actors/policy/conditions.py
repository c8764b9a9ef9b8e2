"""The conditions of a policy, made ready to be asked, and the facts that they are asked about.

One rule for all: what is unknown fails, in a negated condition too. An address that was not
observed, a country that the region database does not give, a session of no provider, a device that
nobody named and a fact that was not reported satisfy nothing.

Each condition `admits` a value of its own kind (pure, so that `circumstances` can ask it about
values of its choice), and `holds` for the `Facts` of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Protocol
from uuid import UUID

from actors.model import (
    AuthProviderCondition,
    ClientPostureCondition,
    ClientVerifiedCondition,
    Conditions,
    CurrentTimeCondition,
    Fact,
    FactTest,
    FactValue,
    RegionCondition,
    RemoteIpCondition,
)
from actors.policy.windows import Windows

MAX_KEPT_CONDITIONS = 4_096
"""How many networks and windows are kept compiled; policies with equal ones share them."""

Posture = Mapping[str, FactValue]


class Regions(Protocol):
    """Says in which country an address is. Its answers may change when its database does."""

    def country(self, address: str) -> str | None:
        """The country of an IPv4 or IPv6 address, by ISO 3166-1 alpha-2; None if unknown."""
        ...


class Nowhere:
    """The regions of an installation without a region database: every country is unknown."""

    def country(self, address: str) -> str | None:
        """None."""
        return None


NOWHERE = Nowhere()


class Facts:
    """What is known of a request and its instant. What a policy does not ask is not computed."""

    __slots__ = (
        "_posture",
        "_region",
        "_regions",
        "auth_provider_id",
        "client_verified",
        "instant",
        "remote_ip",
        "reported",
    )

    def __init__(
        self,
        instant: datetime,
        *,
        remote_ip: str | None = None,
        region: str | None = None,
        regions: Regions = NOWHERE,
        auth_provider_id: UUID | None = None,
        client_verified: bool | None = None,
        posture: tuple[Fact, ...] = (),
    ) -> None:
        self.instant = instant
        self.remote_ip = remote_ip
        self.auth_provider_id = auth_provider_id
        self.client_verified = client_verified
        self.reported = posture
        self._region = region
        self._regions = regions
        self._posture: Posture | None = None

    @property
    def region(self) -> str | None:
        """The country of the request, looked up unless the request names it."""
        if self._region is None and self.remote_ip is not None:
            self._region = self._regions.country(self.remote_ip)
        return self._region

    @property
    def posture(self) -> Posture:
        """The reported facts by name."""
        if self._posture is None:
            self._posture = {fact.name: fact.value for fact in self.reported}
        return self._posture


class Countries:
    """A `remote_ip_location_region` condition, compiled."""

    __slots__ = ("_is_in", "values")
    property = "remote_ip_location_region"

    def __init__(self, condition: RegionCondition) -> None:
        self._is_in = condition.operator == "is_in"
        self.values = frozenset(condition.values)

    def admits(self, region: str | None) -> bool:
        """Whether the condition holds for this country; None fails."""
        return region is not None and (region in self.values) == self._is_in

    def holds(self, facts: Facts) -> bool:
        """Whether it holds for a request."""
        return self.admits(facts.region)


class Networks:
    """A `remote_ip` condition, compiled. A value that is no network makes it hold for nobody."""

    __slots__ = ("_is_in", "_prefixes")
    property = "remote_ip"

    def __init__(self, condition: RemoteIpCondition) -> None:
        self._is_in = condition.operator == "is_in"
        self._prefixes = _prefixes(condition.values)

    def admits(self, remote_ip: str | None) -> bool:
        """Whether the condition holds for this address; an unknown or malformed one fails."""
        address = None if remote_ip is None else parse_address(remote_ip)
        if address is None or self._prefixes is None:
            return False
        return _contains(self._prefixes, address) == self._is_in

    def holds(self, facts: Facts) -> bool:
        """Whether it holds for a request."""
        return self.admits(facts.remote_ip)

    def edges(self) -> Iterable[tuple[int, int]]:
        """(IP version, value) of the first address of every network, and of the one after it."""
        for version, parts_by_host_bits in (self._prefixes or {}).items():
            for host_bits, parts in parts_by_host_bits.items():
                for part in parts:
                    yield version, part << host_bits
                    yield version, (part + 1) << host_bits


class Providers:
    """An `auth_provider` condition, compiled."""

    __slots__ = ("_is_in", "values")
    property = "auth_provider"

    def __init__(self, condition: AuthProviderCondition) -> None:
        self._is_in = condition.operator == "is_in"
        self.values = frozenset(condition.values)

    def admits(self, provider_id: UUID | None) -> bool:
        """Whether it holds for a session by this provider; one of no provider fails."""
        return provider_id is not None and (provider_id in self.values) == self._is_in

    def holds(self, facts: Facts) -> bool:
        """Whether it holds for a request."""
        return self.admits(facts.auth_provider_id)


class Hours:
    """A `current_time` condition, compiled."""

    __slots__ = ("windows",)
    property = "current_time"

    def __init__(self, condition: CurrentTimeCondition) -> None:
        self.windows = Windows(condition)

    def admits(self, instant: datetime) -> bool:
        """Whether the instant lies in one of the windows."""
        return self.windows.contains(instant)

    def holds(self, facts: Facts) -> bool:
        """Whether it holds for a request."""
        return self.windows.contains(facts.instant)


class Verified:
    """A `client_verified` condition, compiled."""

    __slots__ = ("_value",)
    property = "client_verified"

    def __init__(self, condition: ClientVerifiedCondition) -> None:
        self._value = condition.value

    def admits(self, verified: bool | None) -> bool:
        """Whether it holds for a device that was, or was not, verified; an unknown one fails."""
        return verified is self._value

    def holds(self, facts: Facts) -> bool:
        """Whether it holds for a request."""
        return facts.client_verified is self._value


class Reported:
    """A `client_posture` condition, compiled: all of its tests have to be met."""

    __slots__ = ("tests",)
    property = "client_posture"

    def __init__(self, condition: ClientPostureCondition) -> None:
        self.tests = condition.facts

    def admits(self, posture: Posture) -> bool:
        """Whether it holds for a device that reports this."""
        return all(meets(test, posture.get(test.name)) for test in self.tests)

    def holds(self, facts: Facts) -> bool:
        """Whether it holds for a request."""
        return self.admits(facts.posture)


Condition = Countries | Networks | Providers | Hours | Verified | Reported


class CompiledConditions:
    """The conditions of a policy in the order of `engine.PROPERTIES`. Immutable."""

    __slots__ = ("all", "windows")

    def __init__(self, conditions: Conditions) -> None:
        found: list[Condition] = []
        self.windows: Windows | None = None
        if conditions.remote_ip_location_region is not None:
            found.append(Countries(conditions.remote_ip_location_region))
        if conditions.remote_ip is not None:
            found.append(_networks(conditions.remote_ip))
        if conditions.auth_provider is not None:
            found.append(Providers(conditions.auth_provider))
        if conditions.current_time is not None:
            hours = _hours(conditions.current_time)
            self.windows = hours.windows
            found.append(hours)
        if conditions.client_verified is not None:
            found.append(Verified(conditions.client_verified))
        if conditions.client_posture is not None:
            found.append(Reported(conditions.client_posture))
        self.all = tuple(found)


def meets(test: FactTest, value: FactValue | None) -> bool:
    """Whether a reported value is what a test asks for; None was not reported, and fails.

    Values of different types are never compared, and truth values have no order. `at_least` and
    `at_most` of texts compare dotted versions of decimal numbers, of which 14 and 14.0 are equal;
    a text that is none fails.
    """
    if value is None or type(value) is not type(test.value):
        return False
    if test.operator == "is":
        return value == test.value
    if test.operator == "is_not":
        return value != test.value
    one, other = _ordinal(value), _ordinal(test.value)
    if one is None or other is None:
        return False
    return one >= other if test.operator == "at_least" else one <= other


def parse_version(text: str) -> tuple[int, ...] | None:
    """The numbers of a dotted version without zeros at its end, or None if it is none."""
    parts = text.split(".")
    if not text.isascii() or not all(part.isdigit() for part in parts):
        return None
    numbers = [int(part) for part in parts]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def in_networks(networks: Iterable[str], remote_ip: str) -> bool:
    """Whether the address is in one of the networks, as `remote_ip` conditions read them."""
    prefixes, address = _prefixes(tuple(networks)), parse_address(remote_ip)
    return prefixes is not None and address is not None and _contains(prefixes, address)


# --- helpers ---


# Conditions on posture are not shared: one that asks for 1 equals one that asks for True.
@lru_cache(maxsize=MAX_KEPT_CONDITIONS)
def _networks(condition: RemoteIpCondition) -> Networks:
    return Networks(condition)


@lru_cache(maxsize=MAX_KEPT_CONDITIONS)
def _hours(condition: CurrentTimeCondition) -> Hours:
    return Hours(condition)


_Address = tuple[int, int]
"""IP version and value."""
_Prefixes = dict[int, dict[int, set[int]]]
"""Per IP version, per count of host bits: the network parts."""


def _ordinal(value: FactValue) -> tuple[int, ...] | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return (value,)
    return parse_version(value)


@lru_cache(maxsize=4096)
def parse_address(text: str) -> _Address | None:
    """Version and value of an address, IPv4-mapped ones as IPv4 (RFC 4291, section 2.5.5.2)."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return 4, int(address.ipv4_mapped)
    return address.version, int(address)


_MAPPED = IPv6Network("::ffff:0:0/96")


def _prefixes(values: tuple[str, ...]) -> _Prefixes | None:
    prefixes: _Prefixes = {4: {}, 6: {}}
    for value in values:
        try:
            network = ip_network(value, strict=False)
        except ValueError:
            return None
        if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
            low = int(network.network_address) & 0xFFFF_FFFF
            network = IPv4Network((low, network.prefixlen - 96))
        host_bits = network.max_prefixlen - network.prefixlen
        parts = prefixes[network.version].setdefault(host_bits, set())
        parts.add(int(network.network_address) >> host_bits)
    return prefixes


def _contains(prefixes: _Prefixes, address: _Address) -> bool:
    version, value = address
    return any(value >> host_bits in parts for host_bits, parts in prefixes[version].items())
