"""What every store refuses: values outside the model, and values that must be unique.

The database states the same rules once more as constraints, so that no other door to it (a
restore, a hand at the console) lets a bad state in. `validate` comes first because its errors can
name the field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network

import attrs
import msgspec

from actors.model import (
    ENTITIES,
    KIND_OF,
    REFERENCES,
    Authorization,
    Conditions,
    Entity,
    EntityKind,
    Policy,
    Principal,
    Relay,
    Resource,
    TimeRange,
    Token,
)
from actors.store.codec import from_json, to_json
from actors.store.interface import MAX_MUTATIONS, MAX_PAGE, Invalid, Mutation, Put
from channel.messages import Filter
from runtime.cluster.leases import MAX_NODE_LEASE_NS
from runtime.cluster.membership import check_node_name
from runtime.net.address import split_host_port

MAX_WHO = 255
MAX_USES = 2**31 - 1
MAX_YEAR = 9998

UNIQUE: dict[EntityKind, tuple[tuple[str, ...], ...]] = {
    "account": (("slug",),),
    "group": (("name",),),
    "membership": (("group_id", "principal_id"),),
    "site": (("name",),),
    "resource": (("name",),),
    "client": (("device_key",),),
    "gateway": (("device_key",),),
}
"""The fields that are unique together: within the installation for accounts, else within the
account. The last field of each names the conflict. Beside these: at most one group of the kind
`everyone`, and a tunnel address belongs to one client or gateway of an account."""

REMOVAL_ORDER: tuple[EntityKind, ...] = tuple(reversed(ENTITIES))
"""Every kind before the kinds that it refers to: the order in which an account is emptied."""

REFERRERS: dict[EntityKind, tuple[tuple[EntityKind, str], ...]] = {
    kind: tuple(
        (referrer, field)
        for referrer, fields in REFERENCES.items()
        for field, target in fields.items()
        if target == kind
    )
    for kind in ENTITIES
}
"""For each kind, the (kind, field) pairs that refer to it: `REFERENCES` read backwards."""

_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_FIELD = re.compile(r"\$\.(\w+)")
_OWNED_TOKENS = {"client": "principal_id", "api": "principal_id", "gateway": "site_id"}


def kind_of(value: Entity | Authorization | Relay) -> str:
    """The name under which errors speak of a value."""
    if isinstance(value, Authorization | Relay):
        return type(value).__name__.lower()
    return KIND_OF[type(value)]


def validate(value: Entity | Authorization | Relay) -> None:
    """Raises Invalid, naming the field, for whatever the model does not allow."""
    kind = kind_of(value)
    try:
        from_json(to_json(value), type(value))
    except (msgspec.ValidationError, UnicodeEncodeError, NotImplementedError) as error:
        raise Invalid(kind, _field_of(value, error)) from None
    for field in _bad_fields(value):
        raise Invalid(kind, field)


def check_mutations(mutations: Iterable[Mutation], *, who: str, at: datetime) -> None:
    """Checks what `apply` is given, as far as that needs no database.

    Raises Invalid for a bad entity, ValueError for a mistake of the caller.
    """
    mutations = tuple(mutations)
    if len(mutations) > MAX_MUTATIONS:
        raise ValueError(f"at most {MAX_MUTATIONS} mutations in one transaction")
    check_name(who)
    if at.tzinfo is None:
        raise ValueError("`at` must be aware")
    for mutation in mutations:
        if isinstance(mutation, Put):
            validate(mutation.entity)


def check_name(who: str) -> None:
    """Raises ValueError unless `who` (a writer, an owner) has 1 to MAX_WHO printable characters."""
    if not 0 < len(who) <= MAX_WHO or _UNPRINTABLE.search(who):
        raise ValueError(f"1 to {MAX_WHO} printable characters are needed")


def check_limit(limit: int) -> None:
    """Raises ValueError unless the page's size lies within 1 and MAX_PAGE."""
    if not 1 <= limit <= MAX_PAGE:
        raise ValueError(f"a page has 1 to {MAX_PAGE} entries")


def check_node(name: str, *, link_address: str, door_address: str, version: str) -> None:
    """Raises ValueError unless a node may say this of itself."""
    check_node_name(name)
    for address in (link_address, door_address):
        check_name(address)
        split_host_port(address)
    check_name(version)


def check_ttl(ttl_ns: int) -> None:
    """Raises ValueError unless a node's lease may be that long."""
    if not 0 <= ttl_ns <= MAX_NODE_LEASE_NS:
        raise ValueError(f"a lease has 0 to {MAX_NODE_LEASE_NS} ns")


# --- rules between and within fields -------------------------------------------------------------


def _bad_fields(value: Entity | Authorization | Relay) -> Iterator[str]:
    for field in attrs.fields(type(value)):
        content = getattr(value, field.name)
        if isinstance(content, datetime) and not _is_instant(content):
            yield field.name
    match value:
        case Principal(email=str(email)) if _UNPRINTABLE.search(email) or "@" not in email:
            yield "email"
        case Resource():
            if not _is_canonical(value.address, network=value.kind == "cidr"):
                yield "address"
            if not all(_is_filter(rule) for rule in value.filters):
                yield "filters"
        case Policy() if not _are_conditions(value.conditions):
            yield "conditions"
        case Token():
            yield from _bad_token_fields(value)
        case Authorization():
            if value.expires_at < value.created_at:
                yield "expires_at"
            if value.ended_at is None and value.end_reason:
                yield "ended_at"
            if _UNPRINTABLE.search(value.end_reason):
                yield "end_reason"
        case Relay() if _UNPRINTABLE.search(value.region):
            yield "region"


def _field_of(value: Entity | Authorization | Relay, error: Exception) -> str:
    """The field that the codec did not like: named in the error, or else it is half a surrogate."""
    if named := _FIELD.search(str(error)):
        return named.group(1)
    for field in attrs.fields(type(value)):
        content = getattr(value, field.name)
        if isinstance(content, str) and _UNPRINTABLE.search(content):
            return str(field.name)
    return "value"


def _bad_token_fields(token: Token) -> Iterator[str]:
    owner = _OWNED_TOKENS.get(token.kind)
    if (token.account_id is None) != (owner is None):
        yield "account_id"
    for field in ("principal_id", "site_id"):
        if (getattr(token, field) is not None) != (field == owner):
            yield field
    if not all(_is_canonical(source, network=True) for source in token.allowed_sources):
        yield "allowed_sources"
    if token.max_uses is not None and token.max_uses > MAX_USES:
        yield "max_uses"


def _is_instant(instant: datetime) -> bool:
    """Aware, and far enough from the ends of the calendar for every time zone."""
    return instant.tzinfo is not None and 1 < instant.year <= MAX_YEAR


def _is_canonical(text: str, *, network: bool) -> bool:
    """Whether an address or network is written in the one form that we keep.

    IPv4 addresses inside IPv6 ones are refused: they are two names for one host.
    """
    try:
        address = ip_network(text) if network else ip_address(text)
    except ValueError:
        return False
    first = address.network_address if isinstance(address, IPv6Network) else address
    if isinstance(first, IPv6Address) and (first.ipv4_mapped or first.scope_id):
        return False
    return str(address) == text


def _is_filter(rule: Filter) -> bool:
    if rule.protocol == "icmp":
        return (rule.port_start, rule.port_end) == (0, 65_535)
    return rule.port_start <= rule.port_end


def _are_conditions(conditions: Conditions) -> bool:
    remote_ip, current_time = conditions.remote_ip, conditions.current_time
    if remote_ip and not all(_is_canonical(value, network=True) for value in remote_ip.values):
        return False
    if current_time is None:
        return True
    days = [window.day for window in current_time.windows]
    return (
        _ZONE.fullmatch(current_time.zone) is not None
        and len(days) == len(set(days))
        and all(_is_range(each) for window in current_time.windows for each in window.ranges)
    )


def _is_range(each: TimeRange) -> bool:
    naive = each.start.tzinfo is None and each.end.tzinfo is None
    midnight = each.end.hour == each.end.minute == each.end.second == each.end.microsecond == 0
    return naive and (midnight or each.start < each.end)
