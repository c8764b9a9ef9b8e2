"""`TurnClient`: one allocation on one relay over one 5-tuple, as a core.

How it works. The constructor sends an Allocate request; the relay answers 401 with realm and
nonce, the request is repeated with credentials (SHA-256 where the relay offers it, MD5 with an old
one; RFC 8489, section 9.2), and `Allocated` is reported. From then on the client keeps alive what
it has: the allocation a minute before its end, permissions every 4 minutes (they live 5), channels
every 9 (they live 10). Requests go again after 100 ms, 200 ms, 400 ms and so on (RFC 8489, section
6.2.1, from a shorter start), seven times in all; when none is answered, or the relay says that
there is no such allocation, `Lost` is the last event and the client is to be thrown away.
Over a reliable transport (`reliable`: TCP, TLS, a QUIC stream) a request is sent once and waited
for as long as over UDP, 79 initial timeouts: RFC 8489, section 6.2.2, has 39.5 s, which is the same
with its start of 500 ms, but whoever waits for a relay has another one to go to, and 7.9 s leave
room for three retransmissions of TCP. Whoever owns the client frames what it sends, and pads it.
An allocation that the relay holds for this 5-tuple already (437) is one that nobody uses any more,
of this agent before it crashed or thought it lost, or of whoever had this port of a NAT before: it
is given back (Refresh with a lifetime of 0), and Allocate is sent once more.

    client = TurnClient(server=…, username=…, password=…, family="ipv4", randomness=…, now=now)
    for datagram in client.drain_datagrams(): socket.send(datagram, server)
    client.receive(datagram, now)          # what came from the server's address
    for event in client.drain_events(): …
    client.handle_timeout(now)             # at client.poll_timeout()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import attrs

from relays.authentication import ClientCredentials
from relays.stun import (
    Attribute,
    MessageClass,
    Method,
    StunError,
    StunMessage,
    is_stun,
    xor_address_value,
)
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
    channel_data,
    is_channel_data,
    is_data_indication,
    read_channel_data,
    read_indication,
    send_indication,
)
from runtime.net.address import Address
from runtime.randomness import Randomness

INITIAL_RTO_NS: Final = 100 * 10**6
MAX_SENDS: Final = 7
LAST_WAIT_RTOS: Final = 16
RELIABLE_WAIT_RTOS: Final = 79
MAX_CHALLENGES: Final = 3
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
    """The relay listens for us at `relayed`, and sees us at `reflexive`."""

    relayed: Address
    reflexive: Address


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
class Lost:
    """The last event: there is no allocation (any more). `code` is the STUN error, or 0 when the
    relay did not answer."""

    code: ErrorCode
    reason: str


Event = Allocated | Permitted | Refused | Received | Lost
State = Literal["allocating", "allocated", "closing", "over"]


@attrs.define(kw_only=True)
class _Transaction:
    method: Method
    attributes: tuple[tuple[int, bytes], ...]
    peer: Address | None
    challenges: int
    key: bytes | None = attrs.field(repr=False)
    datagram: bytes
    rto_ns: int
    sends: int
    resend_at_ns: int


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

    `family` is that of the relayed address; the 5-tuple may be of the other one. `reliable`: what
    is sent arrives or the connection breaks, so nothing is sent twice. The password and what is
    made from it never leave this object.
    """

    def __init__(
        self,
        *,
        server: Address,
        username: str,
        password: str,
        family: Literal["ipv4", "ipv6"],
        randomness: Randomness,
        now: int,
        initial_rto_ns: int = INITIAL_RTO_NS,
        reliable: bool = False,
    ) -> None:
        self.server = server
        self.family = family
        self.relayed: Address | None = None
        self.reflexive: Address | None = None
        self._randomness = randomness
        self._initial_rto_ns = initial_rto_ns
        self._reliable = reliable
        self._max_sends = 1 if reliable else MAX_SENDS
        self._last_wait_ns = initial_rto_ns * (RELIABLE_WAIT_RTOS if reliable else LAST_WAIT_RTOS)
        self._state: State = "allocating"
        self._credentials = ClientCredentials(username=username, password=password)
        self._transaction_by_id: dict[bytes, _Transaction] = {}
        self._permission_by_host: dict[str, _Permission] = {}
        self._channel_by_peer: dict[Address, _Channel] = {}
        self._peer_by_channel: dict[int, Address] = {}
        self._next_channel = FIRST_CHANNEL
        self._resting_channels: deque[tuple[int, int]] = deque()
        self._refresh_at_ns: int | None = None
        self._deadline_ns: int | None = None
        self._gave_back = False
        self._datagrams: list[bytes] = []
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

    def send(self, peer: Address, data: bytes | memoryview, now: int) -> bool:
        """Queue one datagram for `peer`. False: no permission (yet), or more than 65,000 bytes."""
        if self._state != "allocated" or len(data) > MAX_DATA_BYTES:
            return False
        channel = self._channel_by_peer.get(peer)
        if channel is not None and channel.bound:
            self._datagrams.append(channel_data(channel.number, data))
            return True
        permission = self._permission_by_host.get(peer.host)
        if permission is None or not permission.granted:
            return False
        self._datagrams.append(send_indication(peer, data, self._randomness.bytes(12)))
        return True

    def probe(self, now: int) -> None:
        """Refresh the allocation at once, to learn within eight seconds whether it still stands.

        `Lost` follows if it does not, nothing if it does.
        """
        if self._state != "allocated":
            return
        for transaction in self._transaction_by_id.values():
            if transaction.method is Method.REFRESH:
                if not self._reliable:
                    transaction.sends, transaction.rto_ns = 0, self._initial_rto_ns
                    self._transmit(transaction, now)
                break
        else:
            self._request(Method.REFRESH, (), now)
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
            self._request(Method.REFRESH, _NO_LIFETIME, now)
        self._reschedule()

    # --- what comes from outside -------------------------------------------------------------

    def receive(self, data: bytes | memoryview, now: int) -> bool:
        """A datagram that came from the server's address to our socket. False: not ours."""
        view = memoryview(data)
        if is_channel_data(view):
            return self._receive_channel_data(view)
        if is_data_indication(view):
            return self._receive_indication(view)
        if not is_stun(view) or bytes(view[8:20]) not in self._transaction_by_id:
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
        for transaction_id, transaction in list(self._transaction_by_id.items()):
            if transaction.resend_at_ns > now:
                continue
            if transaction.sends >= self._max_sends:
                del self._transaction_by_id[transaction_id]
                self._lose(NO_ANSWER, "the relay does not answer")
                break
            self._transmit(transaction, now)
        if self._state == "allocated":
            self._refresh_what_is_due(now)
        self._reschedule()

    def drain_datagrams(self) -> list[bytes]:
        """What is to be sent to the server, in order."""
        drained, self._datagrams = self._datagrams, []
        return drained

    def drain_events(self) -> list[Event]:
        drained, self._events = self._events, []
        return drained

    def statistics(self) -> dict[str, int]:
        """Present sizes, and the number of datagrams dropped as malformed or forged."""
        return {
            "transactions": len(self._transaction_by_id),
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
        if unpacked is None or unpacked[0][0] not in self._permission_by_host:
            return False
        self._deliver(Address(*unpacked[0]), unpacked[1])
        return True

    def _deliver(self, peer: Address, data: memoryview) -> None:
        if len(self._events) >= MAX_RECEIVED_QUEUE:
            self._dropped += 1
            return
        self._events.append(Received(peer, bytes(data)))

    # --- responses ---------------------------------------------------------------------------

    def _receive_response(self, message: StunMessage, now: int) -> None:
        if message.message_class not in (MessageClass.SUCCESS, MessageClass.ERROR):
            return
        transaction = self._transaction_by_id[message.transaction_id]
        if message.method != transaction.method:
            return
        error = message.error() if message.message_class is MessageClass.ERROR else None
        if message.message_class is MessageClass.ERROR and error is None:
            raise StunError("an error response without ERROR-CODE")
        code = 0 if error is None else error[0]
        is_challenge = code in (401, 438)
        if (
            transaction.key is not None
            and not is_challenge
            and not message.verify(transaction.key, self._credentials.integrity)
        ):
            self._dropped += 1
            return
        if error is None and transaction.method is Method.ALLOCATE:
            self._read_allocation(message)
        lifetime_s = message.integer(Attribute.LIFETIME, 4)
        if is_challenge:
            self._answer_challenge(message, transaction, code, now)
            return
        del self._transaction_by_id[message.transaction_id]
        if error is not None:
            self._fail(transaction, *error, now)
        else:
            self._succeed(transaction, lifetime_s, now)

    def _read_allocation(self, message: StunMessage) -> None:
        relayed = message.xor_address(Attribute.XOR_RELAYED_ADDRESS)
        reflexive = message.xor_address(Attribute.XOR_MAPPED_ADDRESS)
        if relayed is None or reflexive is None:
            raise StunError("an allocation without its addresses")
        self.relayed, self.reflexive = relayed, reflexive

    def _answer_challenge(
        self, message: StunMessage, transaction: _Transaction, code: int, now: int
    ) -> None:
        algorithm_known = self._credentials.learn(message)
        del self._transaction_by_id[message.transaction_id]
        repeated = code == 401 and transaction.key is not None
        if repeated or transaction.challenges >= MAX_CHALLENGES:
            self._lose(code, "the relay does not accept the credentials")
            return
        if not algorithm_known:
            self._lose(code, "the relay offers no password algorithm that is known")
            return
        self._request(
            transaction.method,
            transaction.attributes,
            now,
            peer=transaction.peer,
            challenges=transaction.challenges + 1,
        )

    def _succeed(self, transaction: _Transaction, lifetime_s: int | None, now: int) -> None:
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
            self._grant(transaction.peer.host, now)

    def _begin(self, now: int) -> None:
        assert self.relayed is not None
        assert self.reflexive is not None
        self._state = "allocated"
        self._events.append(Allocated(relayed=self.relayed, reflexive=self.reflexive))
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
        self._events.extend(Permitted(peer=peer) for peer in sorted(permission.asking))
        permission.asking.clear()

    def _fail(self, transaction: _Transaction, code: int, reason: str, now: int) -> None:
        if self._state == "closing":
            self._state = "over"
            return
        if self._state == "allocating" and code == 437 and not self._gave_back:
            self._gave_back = True
            self._request(Method.REFRESH, _NO_LIFETIME, now)
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
        self._transaction_by_id.clear()
        self._permission_by_host.clear()
        self._channel_by_peer.clear()
        self._peer_by_channel.clear()
        self._refresh_at_ns = None

    # --- requests ----------------------------------------------------------------------------

    def _allocate(self, now: int) -> None:
        attributes = [(int(Attribute.REQUESTED_TRANSPORT), bytes((TRANSPORT_UDP, 0, 0, 0)))]
        if self.family == "ipv6":
            attributes.append((Attribute.REQUESTED_ADDRESS_FAMILY, bytes((FAMILY_IPV6, 0, 0, 0))))
        self._request(Method.ALLOCATE, attributes, now)

    def _ask_permission(self, host: str, now: int) -> None:
        self._permission_by_host[host].refresh_at_ns = None
        peer = Address(host, 0)
        self._request(Method.CREATE_PERMISSION, ((Attribute.XOR_PEER_ADDRESS, b""),), now, peer)

    def _ask_channel(self, peer: Address, now: int) -> None:
        channel = self._channel_by_peer[peer]
        channel.refresh_at_ns = None
        number = channel.number.to_bytes(2, "big") + b"\0\0"
        attributes = ((Attribute.CHANNEL_NUMBER, number), (Attribute.XOR_PEER_ADDRESS, b""))
        self._request(Method.CHANNEL_BIND, attributes, now, peer)

    def _request(
        self,
        method: Method,
        attributes: Iterable[tuple[int, bytes]],
        now: int,
        peer: Address | None = None,
        challenges: int = 0,
    ) -> None:
        """Start a transaction. An empty XOR-PEER-ADDRESS is filled in with `peer`."""
        attributes = tuple(attributes)
        transaction_id = self._randomness.bytes(12)
        body = [
            (kind, xor_address_value(peer, transaction_id))
            if peer is not None and kind == Attribute.XOR_PEER_ADDRESS
            else (kind, value)
            for kind, value in attributes
        ]
        body += self._credentials.attributes()
        message = StunMessage(
            method=method,
            message_class=MessageClass.REQUEST,
            transaction_id=transaction_id,
            attributes=tuple(body),
        )
        transaction = _Transaction(
            method=method,
            attributes=attributes,
            peer=peer,
            challenges=challenges,
            key=self._credentials.key,
            datagram=message.encode(
                key=self._credentials.key, integrity=self._credentials.integrity
            ),
            rto_ns=self._initial_rto_ns,
            sends=0,
            resend_at_ns=0,
        )
        self._transaction_by_id[transaction_id] = transaction
        self._transmit(transaction, now)

    def _transmit(self, transaction: _Transaction, now: int) -> None:
        self._datagrams.append(transaction.datagram)
        transaction.sends += 1
        last = transaction.sends >= self._max_sends
        wait_ns = self._last_wait_ns if last else transaction.rto_ns
        transaction.resend_at_ns = now + wait_ns
        transaction.rto_ns *= 2

    # --- time --------------------------------------------------------------------------------

    def _schedule_refresh(self, lifetime_s: int | None, now: int) -> None:
        granted_s = DEFAULT_LIFETIME_S if lifetime_s is None else lifetime_s
        granted_ns = min(granted_s, MAX_LIFETIME_S) * NS
        self._refresh_at_ns = now + max(granted_ns - ALLOCATION_MARGIN_NS, granted_ns // 2)

    def _refresh_what_is_due(self, now: int) -> None:
        if self._refresh_at_ns is not None and self._refresh_at_ns <= now:
            self._refresh_at_ns = None
            self._request(Method.REFRESH, (), now)
        for host, permission in list(self._permission_by_host.items()):
            if permission.refresh_at_ns is not None and permission.refresh_at_ns <= now:
                self._ask_permission(host, now)
        for peer, channel in list(self._channel_by_peer.items()):
            if channel.refresh_at_ns is not None and channel.refresh_at_ns <= now:
                self._ask_channel(peer, now)

    def _reschedule(self) -> None:
        deadlines = [t.resend_at_ns for t in self._transaction_by_id.values()]
        refreshes = [self._refresh_at_ns]
        refreshes += [p.refresh_at_ns for p in self._permission_by_host.values()]
        refreshes += [c.refresh_at_ns for c in self._channel_by_peer.values()]
        deadlines += [at_ns for at_ns in refreshes if at_ns is not None]
        self._deadline_ns = min(deadlines, default=None)

    def _free_channel(self, now: int) -> int | None:
        if self._resting_channels and self._resting_channels[0][0] <= now:
            return self._resting_channels.popleft()[1]
        if self._next_channel > LAST_CHANNEL:
            return None
        self._next_channel += 1
        return self._next_channel - 1
