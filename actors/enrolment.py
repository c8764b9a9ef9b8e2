"""Who may join, and as what: rules of admission that need no channel and no store."""

from __future__ import annotations

from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Protocol, TypeVar
from uuid import UUID

import attrs

from actors.devices import Devices
from actors.limits import limit_of
from actors.messages import EnrolDevice
from actors.model import Account, Client, Gateway, Token
from actors.policy.engine import Snapshot, in_networks, sign_in_violation
from actors.services import Limits
from channel.messages import (
    Disconnect,
    DoorAddress,
    Interface,
    RefusalCode,
)
from channel.versions import SPOKEN, Spoken
from runtime.randomness import Randomness

RESOLVER_RANGE = IPv4Network("100.100.111.0/24")
"""Never given to a device: the resolver of clients answers here."""
MAX_DRAWS = 64
"""Random addresses that are tried before the range is searched in order."""
MAX_SEARCHED = 1 << 22

_S = 10**9
_RETRY: dict[RefusalCode, int | None] = {
    "invalid_token": None,
    "token_expired": None,
    "invalid_signature": None,
    "version_unsupported": None,
    "account_disabled": 60 * _S,
    "limits_exceeded": 30 * _S,
    "awaiting_approval": 10 * _S,
    "superseded": None,
    "protocol_error": 5 * _S,
    "unavailable": 1 * _S,
    "draining": 1 * _S,
    "shutting_down": 2 * _S,
}
"""After how long to dial again; None: not at all, since another try would end the same."""

OCCUPIED_RETRY_NS = 10 * _S

_D = TypeVar("_D", Client, Gateway)


class Used(Protocol):
    """Tunnel addresses that are taken."""

    def __contains__(self, address: IPv4Address | IPv6Address, /) -> bool: ...


class RangeExhausted(Exception):
    """A tunnel range of the account has no address left."""


def refusal(
    reason: RefusalCode, detail: str = "", *, randomness: Randomness | None = None
) -> Disconnect:
    """The `Disconnect` of a reason. With randomness its delay is spread over once to twice."""
    after_ns = _RETRY[reason]
    if after_ns is None:
        return Disconnect(reason=reason, detail=detail, retry=False)
    if randomness is not None:
        after_ns += randomness.integer(after_ns + 1)
    return Disconnect(reason=reason, detail=detail, retry=True, retry_after_ns=after_ns)


def occupied(randomness: Randomness) -> Disconnect:
    """Refuses a gateway whose older connection is alive: a copy of its key, or one that is about
    to notice a loss. It is to come again, later with each time."""
    return Disconnect(
        reason="superseded",
        detail="another connection with this device key is alive",
        retry=True,
        retry_after_ns=OCCUPIED_RETRY_NS + randomness.integer(OCCUPIED_RETRY_NS),
    )


def sent_on(door: DoorAddress, randomness: Randomness) -> Disconnect:
    """Sends an agent to the node of its account, which this one does not reach. Agents that do not
    know what a door is here try the others by themselves."""
    unavailable = refusal(
        "unavailable", "its account's node is out of reach", randomness=randomness
    )
    return attrs.evolve(unavailable, door=door)


def version_refusal(versions: tuple[int, int], spoken: Spoken = SPOKEN) -> Disconnect | None:
    """Refuses an agent that speaks no protocol version of this portal."""
    if spoken.agreed(versions) is not None:
        return None
    detail = f"this portal speaks versions {spoken.oldest} to {spoken.newest}"
    return refusal("version_unsupported", detail)


def token_refusal(token: Token, remote: str, instant: datetime) -> Disconnect | None:
    """Refuses a known token that has expired, or is used from where it may not be."""
    if token.expires_at is not None and token.expires_at <= instant:
        return refusal("token_expired")
    if token.allowed_sources and not in_networks(token.allowed_sources, remote):
        return refusal("invalid_token", "not from this address")
    return None


def owner_refusal(
    snapshot: Snapshot, token_id: UUID, remote: str, instant: datetime
) -> Disconnect | None:
    """Refuses whoever comes with a token that the account does not bear (any more)."""
    if snapshot.account is None:
        return refusal("invalid_token")
    if snapshot.account.disabled:
        return refusal("account_disabled")
    token = snapshot.tokens.get(token_id)
    if token is None:
        return refusal("invalid_token")
    if token.kind == "client":
        principal = None if token.principal_id is None else snapshot.principals[token.principal_id]
        if principal is None:
            return refusal("invalid_token")
        if principal.disabled:
            return refusal("account_disabled", "the principal is disabled")
        match sign_in_violation(snapshot, token):
            case "auth_provider_disabled":
                return refusal("account_disabled", "the provider of the sign-in is disabled")
            case "identity":
                return refusal("invalid_token", "the identity of the sign-in is gone")
    return token_refusal(token, remote, instant)


def device_refusal(
    snapshot: Snapshot,
    device: Client | Gateway | None,
    token_id: UUID,
    remote: str,
    instant: datetime,
) -> Disconnect | None:
    """Refuses a device, joining or connected, that the account does not bear (any more)."""
    refused = owner_refusal(snapshot, token_id, remote, instant)
    if refused is not None:
        return refused
    token = snapshot.tokens[token_id]
    match device:
        case Client() if token.kind == "client" and token.principal_id == device.principal_id:
            return None
        case Gateway() if token.kind == "gateway" and token.site_id == device.site_id:
            return None if device.approved else refusal("awaiting_approval")
    return refusal("invalid_token", "the device was removed, or belongs to another")


def has_too_many_devices(
    snapshot: Snapshot, devices: Devices, token: Token, limits: Limits
) -> bool:
    """Whether there is no place for another device by this token."""
    if len(snapshot.clients) + len(snapshot.gateways) >= limits.devices:
        return True
    account = snapshot.account
    if account is None:
        return True
    if token.kind != "client":
        return len(snapshot.gateways) >= limit_of(account, "gateway")
    if len(snapshot.clients) >= limit_of(account, "client"):
        return True
    assert token.principal_id is not None
    return devices.clients_of(token.principal_id) >= limits.clients_per_principal


def known_device(snapshot: Snapshot, devices: Devices, ask: EnrolDevice) -> Client | Gateway | None:
    """The device of this key, if the account knows it."""
    if ask.token.kind == "client":
        id = devices.by_key("client", ask.device_key)
        return None if id is None else snapshot.clients[id]
    id = devices.by_key("gateway", ask.device_key)
    return None if id is None else snapshot.gateways[id]


def renewed_device(device: Client | Gateway, ask: EnrolDevice) -> Client | Gateway:
    """The row of a known device that joins by this token: it follows the token's owner.

    A client that changes hands is verified no more, a gateway that changes site is approved only
    if the token of the new site says so.
    """
    token = ask.token
    if isinstance(device, Client):
        assert token.principal_id is not None
        verified = device.verified and device.principal_id == token.principal_id
        return attrs.evolve(
            device,
            principal_id=token.principal_id,
            token_id=token.id,
            name=ask.name,
            verified=verified,
        )
    assert token.site_id is not None
    approved = device.approved if device.site_id == token.site_id else token.approves_devices
    return attrs.evolve(
        device, site_id=token.site_id, token_id=token.id, name=ask.name, approved=approved
    )


def new_device(
    snapshot: Snapshot,
    devices: Devices,
    ask: EnrolDevice,
    *,
    id: UUID,
    at: datetime,
    randomness: Randomness,
) -> Client | Gateway:
    """The row of a device that was never seen. Raises RangeExhausted."""
    account, token = snapshot.account, ask.token
    assert account is not None
    ipv4, ipv6 = allocate(account, devices, randomness)
    if token.kind == "client":
        assert token.principal_id is not None
        return Client(
            id=id,
            account_id=account.id,
            principal_id=token.principal_id,
            token_id=token.id,
            device_key=ask.device_key,
            name=ask.name,
            ipv4=ipv4,
            ipv6=ipv6,
            created_at=at,
        )
    assert token.site_id is not None
    return Gateway(
        id=id,
        account_id=account.id,
        site_id=token.site_id,
        token_id=token.id,
        device_key=ask.device_key,
        name=ask.name,
        ipv4=ipv4,
        ipv6=ipv6,
        approved=token.approves_devices,
        created_at=at,
    )


def allocate(
    account: Account, used: Used, randomness: Randomness
) -> tuple[IPv4Address, IPv6Address]:
    """A free address of either family, at random. Raises RangeExhausted."""
    ipv4 = _free(account.range_ipv4, used, randomness)
    ipv6 = _free(account.range_ipv6, used, randomness)
    assert isinstance(ipv4, IPv4Address)
    assert isinstance(ipv6, IPv6Address)
    return ipv4, ipv6


def interface_of(account: Account, device: Client | Gateway) -> Interface:
    """What the device's TUN carries."""
    return Interface(
        ipv4=device.ipv4,
        ipv6=device.ipv6,
        range_ipv4=account.range_ipv4,
        range_ipv6=account.range_ipv6,
    )


def _free(
    network: IPv4Network | IPv6Network,
    used: Used,
    randomness: Randomness,
) -> IPv4Address | IPv6Address:
    # Without the first address (network, or subnet-router anycast) and the last (broadcast).
    first = int(network.network_address) + 1
    count = network.num_addresses - 2
    if count < 1:
        raise RangeExhausted(str(network))
    make = IPv4Address if isinstance(network, IPv4Network) else IPv6Address
    offset = 0
    for _ in range(MAX_DRAWS):
        offset = randomness.integer(count)
        address = make(first + offset)
        if _is_free(address, used):
            return address
    for step in range(min(count, MAX_SEARCHED)):
        address = make(first + (offset + step) % count)
        if _is_free(address, used):
            return address
    raise RangeExhausted(str(network))


def _is_free(address: IPv4Address | IPv6Address, used: Used) -> bool:
    return address not in used and address not in RESOLVER_RANGE
