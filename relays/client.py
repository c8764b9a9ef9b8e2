"""`TurnClient`: one allocation on one relay over one 5-tuple, as a core.

How it works. The constructor sends an Allocate request; the relay answers 401 with realm and
nonce, the request is repeated with credentials (SHA-256 where the relay offers it, MD5 with an old
one; RFC 8489, section 9.2), and `Allocated` is reported. From then on the client keeps alive what
it has: the allocation a minute before its end, permissions every 4 minutes (they live 5), channels
every 9 (they live 10). When a request is not answered, or the relay says that there is no such
allocation, `Lost` is the last event and the client is to be thrown away. Requests and their
repetition are in `relays.transactions`; whoever owns a client over a reliable transport frames what
it sends, and pads it.
An allocation that the relay holds for this 5-tuple already (437) is one that nobody uses any more,
of this agent before it crashed or thought it lost, or of whoever had this port of a NAT before: it
is given back (Refresh with a lifetime of 0), and Allocate is sent once more.
A relay that sends its newcomers to another one (300 Try Alternate) is `Lost`, or followed up to
`redirects` times: to an address of the same family that was not asked yet, if the answer was
protected by the credentials, and with the same credentials in the same realm only.

    client = TurnClient(server=…, username=…, password=…, family="ipv4", randomness=…, now=now)
    for datagram in client.drain_datagrams(): socket.send(datagram, server)
    client.receive(datagram, now)          # what came from the server's address
    for event in client.drain_events(): …
    client.handle_timeout(now)             # at client.poll_timeout()
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal, NamedTuple

import attrs

from relays.authentication import ClientCredentials
from relays.stun import Attribute, Method, StunError, StunMessage, is_stun
from relays.transactions import INITIAL_RTO_NS, Transaction, Transactions, Unacceptable
from relays.turn import (
    CHANNEL_LIFETIME_NS,
    DEFAULT_LIFETIME_S,
    FAMILY_IPV6,
    FIRST_CHANNEL,
    LAST_CHANNEL,
    MAX_DATA_BYTES,
    MAX_LIFETIME_S,
    NS,
    TRANSPORT_UDP,
    IcmpError,
    channel_data,
    is_channel_data,
    is_data_indication,
    read_channel_data,
    read_icmp_indication,
    read_indication,
    send_indication,
)
from runtime.clock import earliest
from runtime.net.address import Address
from runtime.randomness import Randomness

PERMISSION_REFRESH_NS: Final = 240 * NS
CHANNEL_REFRESH_NS: Final = 540 * NS
ALLOCATION_MARGIN_NS: Final = 60 * NS
CHANNEL_REST_NS: Final = CHANNEL_LIFETIME_NS + 300 * NS
MAX_PEERS: Final = 4096
MAX_RECEIVED_QUEUE: Final = 4096

ErrorCode = int
NO_ANSWER: Final[ErrorCode] = 0
_NO_LIFETIME: Final = ((Attribute.LIFETIME, bytes(4)),)


@attrs.frozen(kw_only=True)
class Allocated:
    """The relay listens for us at `relayed`, and sees us at `reflexive`. `additional` is the second
    relayed address, of IPv6, where both families were wanted and given."""

    relayed: Address
    reflexive: Address
    additional: Address | None = None


@attrs.frozen(kw_only=True)
class Redirected:
    """The relay sent us to another one; what is to be sent goes to `server` from now on."""

    server: Address


@attrs.frozen(kw_only=True)
class Permitted:
    """Data may now be sent to `peer` and is let through from its IP address."""

    peer: Address


@attrs.frozen(kw_only=True)
class Refused:
    """The relay will not let us talk to `peer` (403: a forbidden address, 443: other family)."""

    peer: Address
    code: ErrorCode


class Received(NamedTuple):
    """Data from `peer` that came through the relay (a tuple: this one is made for each packet)."""

    peer: Address
    data: bytes


@attrs.frozen(kw_only=True)
class Unreachable:
    """An ICMP error came to the relay about a datagram from the relayed address to `peer`. Anybody
    can forge one."""

    peer: Address
    error: IcmpError


@attrs.frozen(kw_only=True)
class Lost:
    """The last event: there is no allocation (any more). `code` is the STUN error, or 0 when the
    relay did not answer."""

    code: ErrorCode
    reason: str


Event = Allocated | Redirected | Permitted | Refused | Received | Unreachable | Lost
Family = Literal["ipv4", "ipv6", "both"]
State = Literal["allocating", "allocated", "closing", "over"]


@attrs.define(kw_only=True)
class _Permission:
    """Of one IP address; `asking` are the peers to tell about it when it is granted."""

    asking: set[Address]
    peers: set[Address]
    granted: bool
    refresh_at_ns: int | None


@attrs.define(kw_only=True)
class _Channel:
    number: int
    bound: bool
    refresh_at_ns: int | None


class TurnClient:
    """See the head of this file. Times are nanoseconds of one monotonic clock.

    `family` is that of the relayed address, or `both` (then a relay may still give but one); the
    5-tuple may be of the other one. `reliable`: what is sent arrives or the connection breaks, so
    nothing is sent twice. The password and what is made from it never leave this object.
    """

    def __init__(
        self,
        *,
        server: Address,
        username: str,
        password: str,
        family: Family,
        randomness: Randomness,
        now: int,
        initial_rto_ns: int = INITIAL_RTO_NS,
        reliable: bool = False,
        redirects: int = 0,
    ) -> None:
        self.server = server
        self.family: Family = family
        self.relayed: Address | None = None
        self.additional: Address | None = None
        self.reflexive: Address | None = None
        self._randomness = randomness
        self._state: State = "allocating"
        self._redirects = redirects
        self._asked_servers = {server}
        self._credentials = ClientCredentials(username=username, password=password)
        self._transactions = Transactions(
            credentials=self._credentials,
            randomness=randomness,
            initial_rto_ns=initial_rto_ns,
            reliable=reliable,
        )
        self._datagrams = self._transactions.datagrams
        self._permission_by_host: dict[str, _Permission] = {}
        self._channel_by_peer: dict[Address, _Channel] = {}
        self._peer_by_channel: dict[int, Address] = {}
        self._next_channel = FIRST_CHANNEL
        self._resting_channels: deque[tuple[int, int]] = deque()
        self._refresh_at_ns: int | None = None
        # No later than the first refresh of a permission or channel.
        self._peers_refresh_at_ns: int | None = None
        self._deadline_ns: int | None = None
        self._gave_back = False
        self._events: list[Event] = []
        self._dropped = 0
        self._allocate(now)
        self._reschedule()

    @property
    def state(self) -> State:
        return self._state

    # --- what the owner wants ----------------------------------------------------------------

    def permit(self, peer: Address, now: int) -> None:
        """Ask the relay to let `peer` through, and keep it so; `Permitted` or `Refused` follows.

        A permission is for the IP address, so for a second port of it nothing is sent. Before
        `Allocated` the wish is kept.
        """
        if self._state in ("closing", "over"):
            return
        permission = self._permission_by_host.get(peer.host)
        if permission is None:
            if len(self._permission_by_host) >= MAX_PEERS:
                self._events.append(Refused(peer=peer, code=508))
                return
            permission = _Permission(asking={peer}, peers={peer}, granted=False, refresh_at_ns=None)
            self._permission_by_host[peer.host] = permission
            if self._state == "allocated":
                self._ask_permission(peer.host, now)
        elif permission.granted:
            permission.peers.add(peer)
            self._events.append(Permitted(peer=peer))
        else:
            permission.peers.add(peer)
            permission.asking.add(peer)
        self._reschedule()

    def bind(self, peer: Address, now: int) -> None:
        """Permit `peer` and bind a channel to it: four bytes of overhead instead of 36.

        Until the relay has confirmed the channel, and if it refuses it, Send indications serve.
        """
        if self._state in ("closing", "over") or peer in self._channel_by_peer:
            return
        self.permit(peer, now)
        if peer.host not in self._permission_by_host:
            return
        number = self._free_channel(now)
        if number is None:
            return
        self._channel_by_peer[peer] = _Channel(number=number, bound=False, refresh_at_ns=None)
        self._peer_by_channel[number] = peer
        if self._state == "allocated":
            self._ask_channel(peer, now)
        self._reschedule()

    def forget(self, peer: Address, now: int) -> None:
        """Refresh neither permission nor channel of `peer` any longer: the relay lets them end."""
        channel = self._channel_by_peer.pop(peer, None)
        if channel is not None:
            del self._peer_by_channel[channel.number]
            self._resting_channels.append((now + CHANNEL_REST_NS, channel.number))
        permission = self._permission_by_host.get(peer.host)
        if permission is not None:
            permission.peers.discard(peer)
            permission.asking.discard(peer)
            if not permission.peers:
                del self._permission_by_host[peer.host]
        self._reschedule()

    def send(
        self, peer: Address, data: bytes | memoryview, now: int, *, dont_fragment: bool = False
    ) -> bool:
        """Queue one datagram for `peer`. False: no permission (yet), or more than 65,000 bytes.

        `dont_fragment`: from the relay on it goes whole or not at all (`Unreachable` may tell).
        """
        if self._state != "allocated" or len(data) > MAX_DATA_BYTES:
            return False
        channel = self._channel_by_peer.get(peer)
        if channel is not None and channel.bound and not dont_fragment:
            self._datagrams.append(channel_data(channel.number, data))
            return True
        permission = self._permission_by_host.get(peer.host)
        if permission is None or not permission.granted:
            return False
        transaction_id = self._randomness.bytes(12)
        self._datagrams.append(
            send_indication(peer, data, transaction_id, dont_fragment=dont_fragment)
        )
        return True

    def probe(self, now: int) -> None:
        """Refresh the allocation at once, to learn within eight seconds whether it still stands.

        `Lost` follows if it does not, nothing if it does.
        """
        if self._state != "allocated":
            return
        if not self._transactions.begin_again(Method.REFRESH, now):
            self._transactions.begin(Method.REFRESH, (), now)
        self._reschedule()

    def close(self, now: int) -> None:
        """Give the allocation back (Refresh with a lifetime of 0). No event follows."""
        if self._state in ("closing", "over"):
            return
        was_allocated = self._state == "allocated"
        self._forget_everything()
        self._state = "over"
        if was_allocated:
            self._state = "closing"
            self._transactions.begin(Method.REFRESH, _NO_LIFETIME, now)
        self._reschedule()

    # --- what comes from outside -------------------------------------------------------------

    def receive(self, data: bytes | memoryview, now: int) -> bool:
        """A datagram that came from the server's address to our socket. False: not ours."""
        view = memoryview(data)
        if is_channel_data(view):
            return self._receive_channel_data(view)
        if is_data_indication(view):
            return self._receive_indication(view)
        if not is_stun(view) or bytes(view[8:20]) not in self._transactions:
            return False
        try:
            self._receive_response(StunMessage.decode(view), now)
        except StunError:
            self._dropped += 1
        self._reschedule()
        return True

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due; None: never."""
        return self._deadline_ns

    def handle_timeout(self, now: int) -> None:
        if self._deadline_ns is None or now < self._deadline_ns:
            return
        if not self._transactions.handle_timeout(now):
            self._lose(NO_ANSWER, "the relay does not answer")
        if self._state == "allocated":
            self._refresh_what_is_due(now)
        self._reschedule()

    def drain_datagrams(self) -> list[bytes]:
        """What is to be sent to the server, in order."""
        drained = self._datagrams[:]
        self._datagrams.clear()
        return drained

    def drain_events(self) -> list[Event]:
        drained, self._events = self._events, []
        return drained

    def statistics(self) -> dict[str, int]:
        """Present sizes, and the number of datagrams dropped as malformed or forged."""
        return {
            "transactions": len(self._transactions),
            "permissions": len(self._permission_by_host),
            "channels": len(self._channel_by_peer),
            "dropped": self._dropped,
        }

    # --- data --------------------------------------------------------------------------------

    def _receive_channel_data(self, view: memoryview) -> bool:
        unpacked = read_channel_data(view)
        peer = None if unpacked is None else self._peer_by_channel.get(unpacked[0])
        if unpacked is None or peer is None:
            return False
        self._deliver(peer, unpacked[1])
        return True

    def _receive_indication(self, view: memoryview) -> bool:
        unpacked = read_indication(view)
        if unpacked is None:
            return self._receive_icmp(view)
        if unpacked[0][0] not in self._permission_by_host:
            return False
        self._deliver(Address(*unpacked[0]), unpacked[1])
        return True

    def _receive_icmp(self, view: memoryview) -> bool:
        told = read_icmp_indication(view)
        if told is None or told[0].host not in self._permission_by_host:
            return False
        if len(self._events) < MAX_RECEIVED_QUEUE:
            self._events.append(Unreachable(peer=told[0], error=told[1]))
        return True

    def _deliver(self, peer: Address, data: memoryview) -> None:
        if len(self._events) >= MAX_RECEIVED_QUEUE:
            self._dropped += 1
            return
        self._events.append(Received(peer, bytes(data)))

    # --- responses ---------------------------------------------------------------------------

    def _receive_response(self, message: StunMessage, now: int) -> None:
        try:
            transaction = self._transactions.answered(message, now)
        except Unacceptable as challenge:
            self._lose(challenge.code, challenge.reason)
            return
        if transaction is None:
            return
        error = message.error()
        if error is None and transaction.method is Method.ALLOCATE:
            self._read_allocation(message)
        lifetime_s = message.integer(Attribute.LIFETIME, 4)
        alternate = message.address(Attribute.ALTERNATE_SERVER)
        self._transactions.end(message)
        if error is None:
            self._succeed(transaction, lifetime_s, now)
        elif error[0] == 300 and alternate is not None and self._may_follow(transaction, alternate):
            self._follow(alternate, now)
        else:
            self._fail(transaction, *error, now)

    def _may_follow(self, transaction: Transaction, alternate: Address) -> bool:
        return (
            len(self._asked_servers) <= self._redirects
            and self._state == "allocating"
            and transaction.key is not None
            and alternate.family == self.server.family
            and alternate not in self._asked_servers
        )

    def _follow(self, alternate: Address, now: int) -> None:
        """RFC 8489, section 10: ask there, with the same credentials; challenged anew."""
        self._asked_servers.add(alternate)
        self.server = alternate
        self._credentials.go_elsewhere()
        self._events.append(Redirected(server=alternate))
        self._allocate(now)

    def _read_allocation(self, message: StunMessage) -> None:
        """One relayed address, or two in the order of families. Raises StunError."""
        relayed = sorted(
            message.xor_addresses(Attribute.XOR_RELAYED_ADDRESS), key=lambda one: ":" in one.host
        )
        reflexive = message.xor_address(Attribute.XOR_MAPPED_ADDRESS)
        if not relayed or reflexive is None:
            raise StunError("an allocation without its addresses")
        self.relayed, self.reflexive = relayed[0], reflexive
        is_dual = self.family == "both" and relayed[-1].family != relayed[0].family
        self.additional = relayed[-1] if is_dual else None

    def _succeed(self, transaction: Transaction, lifetime_s: int | None, now: int) -> None:
        if transaction.method is Method.ALLOCATE or transaction.method is Method.REFRESH:
            if self._state == "closing":
                self._state = "over"
                return
            if self._state == "allocating" and transaction.method is Method.REFRESH:
                self._allocate(now)
                return
            self._schedule_refresh(lifetime_s, now)
            if transaction.method is Method.ALLOCATE:
                self._begin(now)
        elif transaction.method is Method.CREATE_PERMISSION and transaction.peer is not None:
            self._grant(transaction.peer.host, now)
        elif transaction.method is Method.CHANNEL_BIND and transaction.peer is not None:
            channel = self._channel_by_peer.get(transaction.peer)
            if channel is not None:
                channel.bound = True
                channel.refresh_at_ns = now + CHANNEL_REFRESH_NS
                self._note_refresh(channel.refresh_at_ns)
            self._grant(transaction.peer.host, now)

    def _begin(self, now: int) -> None:
        assert self.relayed is not None
        assert self.reflexive is not None
        self._state = "allocated"
        self._events.append(
            Allocated(relayed=self.relayed, reflexive=self.reflexive, additional=self.additional)
        )
        for host in list(self._permission_by_host):
            self._ask_permission(host, now)
        for peer in list(self._channel_by_peer):
            self._ask_channel(peer, now)

    def _grant(self, host: str, now: int) -> None:
        permission = self._permission_by_host.get(host)
        if permission is None:
            return
        permission.granted = True
        permission.refresh_at_ns = now + PERMISSION_REFRESH_NS
        self._note_refresh(permission.refresh_at_ns)
        self._events.extend(Permitted(peer=peer) for peer in sorted(permission.asking))
        permission.asking.clear()

    def _fail(self, transaction: Transaction, code: int, reason: str, now: int) -> None:
        if self._state == "closing":
            self._state = "over"
            return
        if self._state == "allocating" and code == 437 and not self._gave_back:
            self._gave_back = True
            self._transactions.begin(Method.REFRESH, _NO_LIFETIME, now)
            return
        peer = transaction.peer
        if peer is None or code in (437, 441):
            self._lose(code, reason or "the relay refused")
        elif transaction.method is Method.CHANNEL_BIND:
            # The channel stays unbound: its number is not tried again, indications serve.
            channel = self._channel_by_peer.get(peer)
            if channel is not None:
                channel.bound, channel.refresh_at_ns = False, None
        else:
            permission = self._permission_by_host.pop(peer.host, None)
            for refused in sorted(permission.peers) if permission is not None else ():
                self._channel_by_peer.pop(refused, None)
                self._events.append(Refused(peer=refused, code=code))
            gone = [n for n, bound in self._peer_by_channel.items() if bound.host == peer.host]
            for number in gone:
                del self._peer_by_channel[number]

    def _lose(self, code: int, reason: str) -> None:
        announce = self._state != "closing"
        self._forget_everything()
        self._state = "over"
        if announce:
            self._events.append(Lost(code=code, reason=reason))

    def _forget_everything(self) -> None:
        self._transactions.clear()
        self._permission_by_host.clear()
        self._channel_by_peer.clear()
        self._peer_by_channel.clear()
        self._refresh_at_ns = self._peers_refresh_at_ns = None

    # --- requests ----------------------------------------------------------------------------

    def _allocate(self, now: int) -> None:
        attributes = [(int(Attribute.REQUESTED_TRANSPORT), bytes((TRANSPORT_UDP, 0, 0, 0)))]
        if self.family == "ipv6":
            attributes.append((Attribute.REQUESTED_ADDRESS_FAMILY, bytes((FAMILY_IPV6, 0, 0, 0))))
        elif self.family == "both":
            attributes.append((Attribute.ADDITIONAL_ADDRESS_FAMILY, bytes((FAMILY_IPV6, 0, 0, 0))))
        self._transactions.begin(Method.ALLOCATE, attributes, now)

    def _ask_permission(self, host: str, now: int) -> None:
        self._permission_by_host[host].refresh_at_ns = None
        peer = Address(host, 0)
        self._transactions.begin(
            Method.CREATE_PERMISSION, ((Attribute.XOR_PEER_ADDRESS, b""),), now, peer
        )

    def _ask_channel(self, peer: Address, now: int) -> None:
        channel = self._channel_by_peer[peer]
        channel.refresh_at_ns = None
        number = channel.number.to_bytes(2, "big") + b"\0\0"
        attributes = ((Attribute.CHANNEL_NUMBER, number), (Attribute.XOR_PEER_ADDRESS, b""))
        self._transactions.begin(Method.CHANNEL_BIND, attributes, now, peer)

    # --- time --------------------------------------------------------------------------------

    def _schedule_refresh(self, lifetime_s: int | None, now: int) -> None:
        granted_s = DEFAULT_LIFETIME_S if lifetime_s is None else lifetime_s
        granted_ns = min(granted_s, MAX_LIFETIME_S) * NS
        self._refresh_at_ns = now + max(granted_ns - ALLOCATION_MARGIN_NS, granted_ns // 2)

    def _refresh_what_is_due(self, now: int) -> None:
        if self._refresh_at_ns is not None and self._refresh_at_ns <= now:
            self._refresh_at_ns = None
            self._transactions.begin(Method.REFRESH, (), now)
        if self._peers_refresh_at_ns is not None and self._peers_refresh_at_ns <= now:
            self._refresh_peers(now)

    def _refresh_peers(self, now: int) -> None:
        for host, permission in list(self._permission_by_host.items()):
            if permission.refresh_at_ns is not None and permission.refresh_at_ns <= now:
                self._ask_permission(host, now)
        for peer, channel in list(self._channel_by_peer.items()):
            if channel.refresh_at_ns is not None and channel.refresh_at_ns <= now:
                self._ask_channel(peer, now)
        self._peers_refresh_at_ns = earliest(
            *[each.refresh_at_ns for each in self._permission_by_host.values()],
            *[each.refresh_at_ns for each in self._channel_by_peer.values()],
        )

    def _note_refresh(self, at_ns: int) -> None:
        self._peers_refresh_at_ns = earliest(self._peers_refresh_at_ns, at_ns)

    def _reschedule(self) -> None:
        """Looks at what is under way, not at all peers: a gateway has thousands."""
        self._deadline_ns = earliest(
            self._transactions.next_deadline(), self._refresh_at_ns, self._peers_refresh_at_ns
        )

    def _free_channel(self, now: int) -> int | None:
        if self._resting_channels and self._resting_channels[0][0] <= now:
            return self._resting_channels.popleft()[1]
        if self._next_channel > LAST_CHANNEL:
            return None
        self._next_channel += 1
        return self._next_channel - 1
