"""Rules within one value: what an entity, a log row or an answer may hold, and in which form.

The limits of single fields stand in the model (`msgspec.Meta`); here is what the fields of one
value owe each other. What entities owe each other (references, uniqueness) is the store's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import urlsplit

import attrs
import msgspec

from actors.logs import FlowLog, Log, Seen
from actors.model import (
    KIND_OF,
    Account,
    Authorization,
    AuthProvider,
    Client,
    Conditions,
    Directory,
    DnsUpstream,
    Entity,
    EntityKind,
    Fact,
    FactTest,
    FactValue,
    Group,
    Identity,
    Policy,
    PolicyTest,
    Principal,
    Relay,
    Resource,
    SealedSecret,
    TimeRange,
    Token,
)
from actors.store.codec import from_json, to_json
from actors.store.interface import Answer, Invalid
from channel.messages import Filter
from runtime.net.address import Address

Value = Entity | Authorization | Relay | Log | Seen | Answer

MAX_USES = 2**31 - 1
MAX_YEAR = 9998
MIN_BOX = 40
"""The nonce (24 B) and the tag (16 B) of a sealed secret."""
RESERVED_PREFIX: Final = 24
"""The network of this length around an account's resolver is no tunnel's and no name's."""

SECRETS: Final[dict[EntityKind, str]] = {
    "auth_provider": "client_secret",
    "directory": "credentials",
}
"""The field of a kind that is sealed."""

DNS_PATTERN: Final = (
    r"(\*\*\.|([a-z0-9_*?]([a-z0-9_*?-]{0,61}[a-z0-9_*?])?\.))*"
    r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
)
DNS_NAME: Final = r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"

UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")
_DNS_PATTERN = re.compile(DNS_PATTERN)
_DNS_NAME = re.compile(DNS_NAME)
_ILL_PLACED_STARS = re.compile(r"[^.]\*\*|\*\*[^.]")
_NUMERIC_TOP = re.compile(r"(^|\.)[0-9]+$")
_DOH_URL = re.compile(r"https://[^/?#@\s]+([/?][^#]*)?")
_ISSUER = re.compile(r"https://[^/?#@\s]+(/[^?#]*)?")
_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,7}")
_FIELD = re.compile(r"\$\.(\w+)")
_OWNED_TOKENS = {"client": "principal_id", "api": "principal_id", "gateway": "site_id"}


def kind_of(value: Value) -> str:
    """The name under which errors speak of a value."""
    entity_type: object = type(value)
    if entity_type in KIND_OF:
        return KIND_OF[entity_type]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(value).__name__).lower()


def validate(value: Value) -> None:
    """Raises Invalid, naming the field, for whatever the model does not allow."""
    kind = kind_of(value)
    try:
        from_json(to_json(value), type(value))
    except (
        msgspec.ValidationError,
        UnicodeEncodeError,
        NotImplementedError,
        OverflowError,
    ) as error:
        raise Invalid(kind, _field_of(value, error)) from None
    for field in _bad_fields(value):
        raise Invalid(kind, field)


def is_dns_pattern(text: str) -> bool:
    """Whether this may be the address of a `dns` resource: labels in lower case, with `*` (any
    characters of one label), `?` (one of them) and, as a whole label, `**` (any labels at all);
    the top-level label is literal and no number. No final dot."""
    return (
        0 < len(text) <= 253
        and _DNS_PATTERN.fullmatch(text) is not None
        and _ILL_PLACED_STARS.search(text) is None
        and _NUMERIC_TOP.search(text) is None
    )


def is_canonical(text: str, *, network: bool) -> bool:
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


# --- kinds ---------------------------------------------------------------------------------------


def _bad_fields(value: Value) -> Iterator[str]:
    for field in attrs.fields(type(value)):
        content = getattr(value, field.name)
        if isinstance(content, datetime) and not _is_instant(content):
            yield field.name
        if isinstance(content, SealedSecret) and len(content.box) < MIN_BOX:
            yield field.name
    match value:
        case Account():
            yield from _bad_account_fields(value)
        case Principal(email=str(email)) if UNPRINTABLE.search(email) or "@" not in email:
            yield "email"
        case AuthProvider():
            yield from _bad_auth_provider_fields(value)
        case Directory() if UNPRINTABLE.search(value.last_error):
            yield "last_error"
        case Identity():
            yield from _unprintable(value, "issuer", "subject")
        case Group():
            for name in ("directory_id", "external_id"):
                if (getattr(value, name) is not None) != (value.kind == "synced"):
                    yield name
            yield from _unprintable(value, "external_id")
        case Resource():
            yield from _bad_resource_fields(value)
        case Policy() if not _are_conditions(value.conditions):
            yield "conditions"
        case PolicyTest() | Client() if not _are_facts(value.posture):
            yield "posture"
        case Token():
            yield from _bad_token_fields(value)
        case Authorization():
            if value.expires_at < value.created_at:
                yield "expires_at"
            if value.ended_at is None and value.end_reason:
                yield "ended_at"
            if UNPRINTABLE.search(value.end_reason):
                yield "end_reason"
        case Relay():
            yield from _unprintable(value, "region", "failure_domain")
        case FlowLog() if value.ended_at < value.started_at:
            yield "ended_at"


def _unprintable(value: Value, *names: str) -> Iterator[str]:
    for name in names:
        if UNPRINTABLE.search(getattr(value, name) or ""):
            yield name


def _field_of(value: Value, error: Exception) -> str:
    """The field that the codec did not like: named in the error, or else it cannot be written."""
    if named := _FIELD.search(str(error)):
        return named.group(1)
    for field in attrs.fields(type(value)):
        try:
            to_json(getattr(value, field.name))
        except (UnicodeEncodeError, NotImplementedError, OverflowError):
            return str(field.name)
    return "value"


def _bad_account_fields(account: Account) -> Iterator[str]:
    resolver = account.resolver_ipv4
    reserved = IPv4Network((int(resolver) >> 8 << 8, RESERVED_PREFIX))
    if account.names_ipv4.overlaps(account.range_ipv4) or account.names_ipv4.subnet_of(reserved):
        yield "names_ipv4"
    if account.names_ipv6.overlaps(account.range_ipv6):
        yield "names_ipv6"
    if (
        reserved.overlaps(account.range_ipv4)
        or resolver.is_multicast
        or resolver.is_loopback
        or resolver.is_unspecified
        or resolver.is_reserved
    ):
        yield "resolver_ipv4"
    if account.search_domain is not None and not _is_dns_name(account.search_domain):
        yield "search_domain"
    upstreams = account.dns_upstreams
    if not _are_distinct(upstreams) or not all(map(_is_upstream, upstreams)):
        yield "dns_upstreams"
    if any(each is not None and each > MAX_USES for each in attrs.astuple(account.limits)):
        yield "limits"


def _bad_auth_provider_fields(provider: AuthProvider) -> Iterator[str]:
    is_oidc = provider.kind != "email"
    for name in ("issuer", "client_id"):
        if (getattr(provider, name) is not None) != is_oidc:
            yield name
    if provider.client_secret is not None and not is_oidc:
        yield "client_secret"
    # OpenID Connect Discovery 1.0, section 3: no query, no fragment.
    if provider.issuer is not None and not _is_url(provider.issuer, _ISSUER):
        yield "issuer"
    yield from _unprintable(provider, "client_id")


def _bad_resource_fields(resource: Resource) -> Iterator[str]:
    is_pool = resource.kind == "device_pool"
    if (
        is_pool == bool(resource.site_ids)
        or not _are_distinct(resource.site_ids)
        or (resource.kind == "internet" and len(resource.site_ids) > 1)
    ):
        yield "site_ids"
    if (resource.device_ids and not is_pool) or not _are_distinct(resource.device_ids):
        yield "device_ids"
    if resource.ip_stack != "dual" and resource.kind != "dns":
        yield "ip_stack"
    match resource.kind:
        case "cidr" | "ip":
            good = is_canonical(resource.address, network=resource.kind == "cidr")
        case "dns":
            good = is_dns_pattern(resource.address)
        case _:
            good = resource.address == ""
    if not good:
        yield "address"
    if not all(_is_filter(rule) for rule in resource.filters):
        yield "filters"


def _bad_token_fields(token: Token) -> Iterator[str]:
    owner = _OWNED_TOKENS.get(token.kind)
    if (token.account_id is None) != (owner is None):
        yield "account_id"
    for field in ("principal_id", "site_id"):
        if (getattr(token, field) is not None) != (field == owner):
            yield field
    if token.auth_provider_id is not None and token.kind != "client":
        yield "auth_provider_id"
    if (token.scopes and token.kind != "api") or not _are_distinct(token.scopes):
        yield "scopes"
    if not all(is_canonical(source, network=True) for source in token.allowed_sources):
        yield "allowed_sources"
    if token.max_uses is not None and token.max_uses > MAX_USES:
        yield "max_uses"


# --- parts ---------------------------------------------------------------------------------------


def _is_instant(instant: datetime) -> bool:
    """Aware, and far enough from the ends of the calendar for every time zone."""
    return instant.tzinfo is not None and 1 < instant.year <= MAX_YEAR


def _are_distinct(values: Sequence[object]) -> bool:
    return len(set(values)) == len(values)


def _is_dns_name(text: str) -> bool:
    return _DNS_NAME.fullmatch(text) is not None and _NUMERIC_TOP.search(text) is None


def _is_upstream(upstream: DnsUpstream) -> bool:
    if upstream.kind == "doh":
        return _is_url(upstream.address, _DOH_URL)
    if is_canonical(upstream.address, network=False):
        return True
    try:
        address = Address.parse(upstream.address)
    except ValueError:
        return False
    return (
        str(address) == upstream.address
        and address.port > 0
        and is_canonical(address.host, network=False)
    )


def _is_url(text: str, pattern: re.Pattern[str]) -> bool:
    if pattern.fullmatch(text) is None:
        return False
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_filter(rule: Filter) -> bool:
    if rule.protocol == "icmp":
        return (rule.port_start, rule.port_end) == (0, 65_535)
    return rule.port_start <= rule.port_end


def _are_conditions(conditions: Conditions) -> bool:
    """Each in its one form: canonical networks, no value twice, times that make sense."""
    many = (
        conditions.remote_ip,
        conditions.remote_ip_location_region,
        conditions.auth_provider,
    )
    posture, current_time = conditions.client_posture, conditions.current_time
    if any(each is not None and not _are_distinct(each.values) for each in many):
        return False
    if conditions.remote_ip is not None and not all(
        is_canonical(value, network=True) for value in conditions.remote_ip.values
    ):
        return False
    if posture is not None and not _are_fact_tests(posture.facts):
        return False
    if current_time is None:
        return True
    days = [window.day for window in current_time.windows]
    return (
        _ZONE.fullmatch(current_time.zone) is not None
        and _are_distinct(days)
        and all(_is_range(each) for window in current_time.windows for each in window.ranges)
    )


def _is_range(each: TimeRange) -> bool:
    naive = each.start.tzinfo is None and each.end.tzinfo is None
    midnight = each.end.hour == each.end.minute == each.end.second == each.end.microsecond == 0
    return naive and (midnight or each.start < each.end)


def _are_facts(facts: Sequence[Fact]) -> bool:
    return _are_distinct([each.name for each in facts]) and all(
        _is_fact_value(each.value) for each in facts
    )


def _are_fact_tests(tests: Sequence[FactTest]) -> bool:
    """Bounds are numbers or dotted versions, and each fact has one test of a kind."""
    for test in tests:
        if not _is_fact_value(test.value):
            return False
        if test.operator not in ("at_least", "at_most"):
            continue
        if isinstance(test.value, bool):
            return False
        if isinstance(test.value, str) and not _VERSION.fullmatch(test.value):
            return False
    return _are_distinct([(each.name, each.operator) for each in tests])


def _is_fact_value(value: FactValue) -> bool:
    if isinstance(value, str):
        return UNPRINTABLE.search(value) is None
    return -(2**63) <= value < 2**63


def check_filters(equals: Mapping[str, object], allowed: Iterable[str]) -> None:
    """Raises ValueError for a field by which a log cannot be asked for."""
    for name in equals.keys() - set(allowed):
        raise ValueError(f"logs cannot be asked for by {name[:64]!r}")
