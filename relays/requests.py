"""What an authenticated TURN request does (RFC 8656, sections 7 to 12).

One method for each request, with the error codes in the order of the RFC's sections. A `Requests`
object changes the table of allocations and says what to answer; who asked, and whether he may,
was settled before (see `relays.authentication`).
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import attrs

from relays.allocations import Allocation, AllocationTable, Channel, Permission, Relayed
from relays.fastpath import FastPath
from relays.peers import LOWEST_PEER_PORT, PeerPolicy
from relays.stun import (
    Attribute,
    MessageClass,
    Method,
    StunError,
    StunMessage,
    address_value,
    error_value,
    xor_address_value,
)
from relays.turn import (
    CHANNEL_LIFETIME_NS,
    DEFAULT_LIFETIME_S,
    FAMILY_IPV4,
    FAMILY_IPV6,
    FIRST_CHANNEL,
    LAST_CHANNEL_OF_RFC_5766,
    MAX_LIFETIME_S,
    NS,
    PERMISSION_LIFETIME_NS,
    RESERVATION_TOKEN_BYTES,
    TRANSPORT_UDP,
)
from runtime.net.address import Address

Attributes = tuple[tuple[int, bytes], ...]

# As plain numbers: naming a member of an enum costs more than looking its value up (Python 3.11).
_LIFETIME: Final = int(Attribute.LIFETIME)
_TRANSPORT: Final = int(Attribute.REQUESTED_TRANSPORT)
_FAMILY: Final = int(Attribute.REQUESTED_ADDRESS_FAMILY)
_ADDITIONAL_FAMILY: Final = int(Attribute.ADDITIONAL_ADDRESS_FAMILY)
_EVEN_PORT: Final = int(Attribute.EVEN_PORT)
_TOKEN: Final = int(Attribute.RESERVATION_TOKEN)
_RELAYED: Final = int(Attribute.XOR_RELAYED_ADDRESS)
_MAPPED: Final = int(Attribute.XOR_MAPPED_ADDRESS)

MAX_UNKNOWN_ATTRIBUTES: Final = 16
SOFTWARE: Final[Attributes] = ((Attribute.SOFTWARE, b"Holloway"),)
"""In every answer that has room for it. It names no version: an attacker would read it first."""

# Comprehension-required attributes that are understood in every request.
_UNDERSTOOD: Final = frozenset(
    {
        Attribute.MAPPED_ADDRESS,
        Attribute.USERNAME,
        Attribute.ERROR_CODE,
        Attribute.UNKNOWN_ATTRIBUTES,
        Attribute.CHANNEL_NUMBER,
        Attribute.LIFETIME,
        Attribute.XOR_PEER_ADDRESS,
        Attribute.DATA,
        Attribute.REALM,
        Attribute.NONCE,
        Attribute.XOR_RELAYED_ADDRESS,
        Attribute.REQUESTED_ADDRESS_FAMILY,
        Attribute.EVEN_PORT,
        Attribute.REQUESTED_TRANSPORT,
        Attribute.DONT_FRAGMENT,
        Attribute.PASSWORD_ALGORITHM,
        Attribute.USERHASH,
        Attribute.XOR_MAPPED_ADDRESS,
        Attribute.RESERVATION_TOKEN,
    }
)


@attrs.frozen(kw_only=True)
class ServerLimits:
    """What one relay gives, at most. 486 answers for the first two, 508 for the rest."""

    allocations_per_username: int = 64
    allocations_per_source: int = 4096
    allocations: int = 20_000
    permissions_per_allocation: int = 1024
    channels_per_allocation: int = 1024
    unauthenticated_per_second: int = 100
    unauthenticated_burst: int = 200
    unanswered_per_host: int = 200
    source_prefixes: int = 65_536


class Requests:
    """See the head of this file. `counters` counts error codes and allocations made."""

    def __init__(
        self,
        *,
        table: AllocationTable,
        limits: ServerLimits,
        peers: PeerPolicy,
        own_addresses: frozenset[str],
        alternate_servers: dict[int, Address],
        counters: Counter[str],
        fast_path: FastPath,
    ) -> None:
        self.draining = False
        self._table = table
        self._limits = limits
        self._peers = peers
        self._own_addresses = own_addresses
        self._alternate_servers = alternate_servers
        self._counters = counters
        self._fast_path = fast_path

    def answer(
        self,
        listener: int,
        message: StunMessage,
        source: tuple[str, int],
        username: str,
        now: int,
    ) -> StunMessage:
        """Do what the request of `username` asks for; the answer, whether success or error."""
        try:
            return self._perform(listener, message, source, username, now)
        except StunError as error:
            refusal = _Refusal(400, str(error))
        except _Refusal as raised:
            refusal = raised
        self._counters[f"errors_{refusal.code}"] += 1
        attributes = (*refusal.attributes, *SOFTWARE)
        return error_response(message, refusal.code, refusal.reason, attributes)

    def _perform(
        self,
        listener: int,
        message: StunMessage,
        source: tuple[str, int],
        username: str,
        now: int,
    ) -> StunMessage:
        """The answer to an authenticated request. Raises Refusal and StunError."""
        unknown = unknown_attributes(message)
        if unknown:
            raise _Refusal(420, "Unknown Attribute", (unknown,))
        allocation = self._table.by_client[listener].get(source)
        if allocation is not None and self._table.drop_ended(allocation, now):
            allocation = None
        if message.method == Method.ALLOCATE:
            return self._allocate(listener, message, source, username, allocation, now)
        if allocation is None:
            raise _Refusal(437, "Allocation Mismatch")
        if allocation.username != username and not _gives_back(message):
            raise _Refusal(441, "Wrong Credentials")
        if message.method == Method.REFRESH:
            return self._refresh(message, allocation, now)
        if message.method == Method.CREATE_PERMISSION:
            return self._create_permission(message, allocation, now)
        return self._bind_channel(message, allocation, now)

    def _allocate(
        self,
        listener: int,
        message: StunMessage,
        source: tuple[str, int],
        username: str,
        existing: Allocation | None,
        now: int,
    ) -> StunMessage:
        """RFC 8656, section 7.2."""
        if existing is not None:
            raise _Refusal(437, "Allocation Mismatch")
        transport = message.integer(_TRANSPORT, 4)
        if transport is None:
            raise _Refusal(400, "REQUESTED-TRANSPORT is missing")
        if transport >> 24 != TRANSPORT_UDP:
            raise _Refusal(442, "Unsupported Transport Protocol")
        lifetime_s = _lifetime_s(message)
        families = self._wanted_families(message)
        self._check_quotas(families[0], username, source[0])
        relayed, extra = self._take_ports(message, families, now)
        for one in relayed:
            one.expires_ns = now + lifetime_s * NS
        self._table.add(
            Allocation(
                relayed=tuple(relayed),
                listener=listener,
                client=source,
                username=username,
                transaction_id=message.transaction_id,
            )
        )
        self._counters["allocations_made"] += 1
        transaction_id = message.transaction_id
        attributes: list[tuple[int, bytes]] = [
            (_RELAYED, xor_address_value(one.address, transaction_id)) for one in relayed
        ]
        attributes += [
            (_LIFETIME, lifetime_s.to_bytes(4, "big")),
            (_MAPPED, xor_address_value(source, transaction_id)),
        ]
        return success_response(message, (*attributes, *extra, *SOFTWARE))

    def _wanted_families(self, message: StunMessage) -> tuple[int, ...]:
        """The checks 5 to 9 of section 7.2. Two families are both wanted, though one may do."""
        has_token = _TOKEN in message
        family = message.integer(_FAMILY, 4)
        additional = message.integer(_ADDITIONAL_FAMILY, 4)
        even_port = message.integer(_EVEN_PORT, 1)
        if has_token and (even_port, family, additional) != (None, None, None):
            raise _Refusal(400, "RESERVATION-TOKEN stands alone")
        if family is not None and additional is not None:
            raise _Refusal(400, "REQUESTED- with ADDITIONAL-ADDRESS-FAMILY")
        if additional is not None:
            if additional >> 24 != FAMILY_IPV6:
                raise _Refusal(400, "ADDITIONAL-ADDRESS-FAMILY is IPv6 or not there")
            if even_port is not None and even_port & 0x80:
                raise _Refusal(400, "a reserved port with ADDITIONAL-ADDRESS-FAMILY")
            return FAMILY_IPV4, FAMILY_IPV6
        wanted = FAMILY_IPV4 if family is None else family >> 24
        if not has_token and wanted not in self._table.relay_addresses:
            raise _Refusal(440, "Address Family not Supported")
        return (wanted,)

    def _check_quotas(self, family: int, username: str, host: str) -> None:
        if self.draining:
            alternate = self._alternate_servers.get(family)
            if alternate is None:
                raise _Refusal(508, "Insufficient Capacity")
            value = (Attribute.ALTERNATE_SERVER, address_value(alternate))
            raise _Refusal(300, "Try Alternate", (value,))
        of_username = self._table.count_of_username(username)
        if of_username >= self._limits.allocations_per_username:
            raise _Refusal(486, "Allocation Quota Reached")
        if self._table.count_of_source(host) >= self._limits.allocations_per_source:
            raise _Refusal(486, "Allocation Quota Reached")
        if len(self._table) >= self._limits.allocations:
            raise _Refusal(508, "Insufficient Capacity")

    def _take_ports(
        self, message: StunMessage, families: tuple[int, ...], now: int
    ) -> tuple[list[Relayed], Attributes]:
        """A relayed address for each family, or at least for one of two; and what the answer says
        beside them: a RESERVATION-TOKEN, or why a family is missing (section 18.12)."""
        token = message.value(_TOKEN)
        if token is not None:
            if len(token) != RESERVATION_TOKEN_BYTES:
                raise _Refusal(400, "RESERVATION-TOKEN has a wrong length")
            reserved = self._table.take_reserved(token, now)
            if reserved is None:
                raise _Refusal(508, "Insufficient Capacity")
            return [reserved], ()
        even_port = message.integer(_EVEN_PORT, 1)
        taken: list[Relayed] = []
        extra: list[tuple[int, bytes]] = []
        refusals: list[_Refusal] = []
        for family in families:
            try:
                relayed, new_token = self._take_port(family, even_port, now)
            except _Refusal as refusal:
                refusals.append(refusal)
                value = bytes((family,)) + error_value(refusal.code, refusal.reason)[1:]
                extra.append((Attribute.ADDRESS_ERROR_CODE, value))
                continue
            taken.append(relayed)
            if new_token is not None:
                extra.append((_TOKEN, new_token))
        if not taken:
            raise refusals[0]
        return taken, tuple(extra)

    def _take_port(
        self, family: int, even_port: int | None, now: int
    ) -> tuple[Relayed, bytes | None]:
        """A port and, where the next one was reserved too, the token for that."""
        if family not in self._table.relay_addresses:
            raise _Refusal(440, "Address Family not Supported")
        reserve = bool((even_port or 0) & 0x80)
        if reserve and self._table.reservations >= self._limits.allocations:
            raise _Refusal(508, "Insufficient Capacity")
        if even_port is not None:
            pair = self._table.take_even_port(family, now, reserve=reserve)
        else:
            taken = self._table.take_port(family)
            pair = None if taken is None else (taken, None)
        if pair is None:
            raise _Refusal(508, "Insufficient Capacity")
        return pair

    def _refresh(self, message: StunMessage, allocation: Allocation, now: int) -> StunMessage:
        """RFC 8656, section 8.2. With REQUESTED-ADDRESS-FAMILY it is about that address alone."""
        concerned = allocation.relayed
        family = message.integer(_FAMILY, 4)
        if family is not None:
            of_family = allocation.of_family(family >> 24)
            if of_family is None:
                raise _Refusal(443, "Peer Address Family Mismatch")
            concerned = (of_family,)
        lifetime_s = 0 if _gives_back(message) else _lifetime_s(message)
        if lifetime_s:
            allocation.purge(now)
        for relayed in concerned:
            if lifetime_s:
                self._table.refresh(relayed, now + lifetime_s * NS)
            else:
                self._table.drop(allocation, relayed)
        if allocation.relayed:
            self._fast_path.channels_changed(allocation, now)
        lifetime = (_LIFETIME, lifetime_s.to_bytes(4, "big"))
        return success_response(message, (lifetime, *SOFTWARE))

    def _create_permission(
        self, message: StunMessage, allocation: Allocation, now: int
    ) -> StunMessage:
        """RFC 8656, section 10.2: all of the addresses, or none."""
        if Attribute.XOR_PEER_ADDRESS not in message:
            raise _Refusal(400, "XOR-PEER-ADDRESS is missing")
        peers = message.xor_addresses(Attribute.XOR_PEER_ADDRESS)
        for peer in peers:
            self._check_peer(peer.host, allocation)
        hosts = {peer.host for peer in peers}
        self._make_room_for_permissions(hosts, allocation, now)
        for host in hosts:
            self._permit(host, allocation, now)
            self._fast_path.channels_changed(allocation, now, host)
        return success_response(message, SOFTWARE)

    def _bind_channel(self, message: StunMessage, allocation: Allocation, now: int) -> StunMessage:
        """RFC 8656, section 12.2."""
        field = message.integer(Attribute.CHANNEL_NUMBER, 4)
        peer = message.xor_address(Attribute.XOR_PEER_ADDRESS)
        if field is None or peer is None:
            raise _Refusal(400, "CHANNEL-NUMBER or XOR-PEER-ADDRESS is missing")
        number = field >> 16
        if not FIRST_CHANNEL <= number <= LAST_CHANNEL_OF_RFC_5766:
            raise _Refusal(400, "not a channel number")
        self._check_binding(allocation, number, peer, now)
        self._check_peer(peer.host, allocation)
        if peer.port < LOWEST_PEER_PORT:
            raise _Refusal(403, "Forbidden")
        self._make_room_for_permissions({peer.host}, allocation, now)
        channel = allocation.channel_by_number.get(number)
        if channel is None:
            self._make_room_for_a_channel(allocation, now)
        permission = self._permit(peer.host, allocation, now)
        if channel is None:
            channel = Channel(number, peer, 0, permission)
            allocation.channel_by_number[number] = channel
            allocation.channel_by_peer[peer] = channel
        channel.expires_ns = now + CHANNEL_LIFETIME_NS
        self._fast_path.channels_changed(allocation, now, peer.host)
        return success_response(message, SOFTWARE)

    def _check_binding(self, allocation: Allocation, number: int, peer: Address, now: int) -> None:
        """Neither number nor peer may be bound otherwise; bindings that ended are dropped."""
        for bound in {
            allocation.channel_by_number.get(number),
            allocation.channel_by_peer.get(peer),
        }:
            if bound is None:
                continue
            if bound.expires_ns <= now:
                allocation.drop_channel(bound)
            elif bound.number != number or bound.peer != peer:
                raise _Refusal(400, "the channel or the peer is bound otherwise")

    # --- peers -----------------------------------------------------------------------------------

    def _check_peer(self, host: str, allocation: Allocation) -> None:
        family = _family_of(host)
        if allocation.of_family(family) is None:
            raise _Refusal(443, "Peer Address Family Mismatch")
        is_relay = host == self._table.relay_addresses[family]
        if not is_relay and (host in self._own_addresses or not self._peers.allows(host)):
            raise _Refusal(403, "Forbidden")

    def _permit(self, host: str, allocation: Allocation, now: int) -> Permission:
        permission = allocation.permission_by_host.get(host)
        if permission is None:
            relayed = allocation.of_family(_family_of(host))
            assert relayed is not None  # see _check_peer
            permission = Permission(0, relayed, host in self._own_addresses)
            allocation.permission_by_host[host] = permission
        elif permission.expires_ns <= now:
            permission.answered = False
        permission.expires_ns = now + PERMISSION_LIFETIME_NS
        return permission

    def _make_room_for_permissions(self, hosts: set[str], allocation: Allocation, now: int) -> None:
        held = allocation.permission_by_host
        limit = self._limits.permissions_per_allocation
        if len(held) + len(hosts - held.keys()) > limit:
            allocation.purge(now)
            if len(held) + len(hosts - held.keys()) > limit:
                raise _Refusal(508, "Insufficient Capacity")

    def _make_room_for_a_channel(self, allocation: Allocation, now: int) -> None:
        if len(allocation.channel_by_number) >= self._limits.channels_per_allocation:
            allocation.purge(now)
            if len(allocation.channel_by_number) >= self._limits.channels_per_allocation:
                raise _Refusal(508, "Insufficient Capacity")


def unknown_attributes(
    message: StunMessage, also: frozenset[int] = frozenset()
) -> tuple[int, bytes] | None:
    """UNKNOWN-ATTRIBUTES for an answer 420, None when all that must be understood is. `also` are
    those that are understood here beside the usual ones."""
    kinds = [kind for kind in message.kinds() - _UNDERSTOOD if kind < 0x8000 and kind not in also]
    if not kinds:
        return None
    listed = sorted(kinds)[:MAX_UNKNOWN_ATTRIBUTES]
    return Attribute.UNKNOWN_ATTRIBUTES, b"".join(kind.to_bytes(2, "big") for kind in listed)


def success_response(request: StunMessage, attributes: Attributes) -> StunMessage:
    return StunMessage(
        method=request.method,
        message_class=MessageClass.SUCCESS,
        transaction_id=request.transaction_id,
        attributes=attributes,
    )


def error_response(
    request: StunMessage, code: int, reason: str, attributes: tuple[tuple[int, bytes], ...]
) -> StunMessage:
    return StunMessage(
        method=request.method,
        message_class=MessageClass.ERROR,
        transaction_id=request.transaction_id,
        attributes=((Attribute.ERROR_CODE, error_value(code, reason)), *attributes),
    )


class _Refusal(Exception):
    """A request is answered with this error."""

    def __init__(
        self, code: int, reason: str, attributes: tuple[tuple[int, bytes], ...] = ()
    ) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason
        self.attributes = attributes


def _gives_back(message: StunMessage) -> bool:
    """Whether it ends an allocation. Any user may who is at the other end of its 5-tuple, as his
    nonce shows: nobody else receives there any more, and it stands in the way of a new one."""
    return message.method == Method.REFRESH and message.integer(_LIFETIME, 4) == 0


def _family_of(host: str) -> int:
    return FAMILY_IPV6 if ":" in host else FAMILY_IPV4


def _lifetime_s(message: StunMessage) -> int:
    """RFC 8656, section 7.2: not below the default, not above the maximum."""
    wanted_s = message.integer(_LIFETIME, 4)
    if wanted_s is None:
        return DEFAULT_LIFETIME_S
    return max(DEFAULT_LIFETIME_S, min(wanted_s, MAX_LIFETIME_S))
