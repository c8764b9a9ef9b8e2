"""The STUN and TURN server as a core (RFC 8489, RFC 8656), for UDP on both sides.

Datagrams come in by `receive` (from clients, at a listener) and `receive_from_peer` (at the socket
of an allocation), ICMP errors about what left there by `receive_icmp`; what is to be sent lies in
`transmits`: tuples of socket number, data, destination. A negative number means that socket too,
and a datagram that nobody on the way may fragment (DONT-FRAGMENT). Data may be a view into the
datagram that was passed in, so the owner sends it before that buffer is used again. A train
(`relays.trains`) comes in by `receive_train` and `receive_train_from_peer`, and leaves in `trains`
where it can be passed on as one. The relaying of data stands first, since it is nearly all of the
work: dictionary look-ups, no object but the tuple. What an authenticated request does is in
`relays.requests`.

Beyond the RFCs: answers to requests without valid credentials are never more than twice the size
of the request on the wire, and limited for each source prefix; an IP address that never sent
anything gets few and small packets (20 a second of each allocation, 200 of all of them, so that
many allocations together flood nobody); the relay's own addresses are reached inside of the core,
on relayed ports only. `revoke_user` ends what a user has, `drain` refuses new allocations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

import attrs

from relays import trains
from relays.allocations import Allocation, AllocationTable, Permission, Sockets
from relays.authentication import Authenticator, Credentials
from relays.binding import (
    Answer,
    Place,
    answer_binding,
    answer_classic,
    is_classic_request,
    places,
)
from relays.fastpath import FastPath, NoFastPath
from relays.peers import LOWEST_PEER_PORT, PeerPolicy, RateLimiter, source_prefix
from relays.processes import siblings
from relays.requests import SOFTWARE, Attributes, Requests, ServerLimits, error_response
from relays.stun import (
    MAX_MESSAGE_BYTES,
    MessageClass,
    Method,
    StunError,
    StunMessage,
    is_stun,
)
from relays.turn import (
    MAX_DATA_BYTES,
    NS,
    RELAYED_ICMP,
    IcmpError,
    channel_data,
    data_indication,
    icmp_indication,
    is_send_indication,
    read_channel_data,
    read_indication,
    read_unfragmented_indication,
)
from runtime.net.address import Address
from runtime.randomness import Randomness

Transmit = tuple[int, bytes | memoryview, tuple[str, int]]

UNANSWERED_INTERVAL_NS: Final = NS // 20
UNANSWERED_BURST_NS: Final = 19 * UNANSWERED_INTERVAL_NS
UNANSWERED_BYTES: Final = 200
UNANSWERED_HOSTS: Final = 65_536

_TURN_METHODS: Final = frozenset(
    {Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND}
)


class Server:
    """See the head of this file.

    `relay_addresses` maps a family (1: IPv4, 2: IPv6) to the address that clients are told,
    `own_addresses` are all IP addresses of this machine and those under which it is known outside.
    `alternate_servers` maps a family to where a draining relay sends newcomers. `fast_path` is told
    of channels, and may carry their data. Listeners are announced by `add_listener`. `synchronise`
    tells the wall clock, against which the expiry of user names is checked; call it now and then.
    """

    def __init__(
        self,
        *,
        credentials: Credentials,
        realm: str,
        relay_addresses: dict[int, str],
        own_addresses: frozenset[str],
        sockets: Sockets,
        randomness: Randomness,
        peers: PeerPolicy | None = None,
        limits: ServerLimits | None = None,
        first_port: int = 49_152,
        last_port: int = 65_535,
        alternate_servers: dict[int, Address] | None = None,
        fast_path: FastPath | None = None,
        now: int,
        unix_s: int,
    ) -> None:
        self.limits = limits or ServerLimits()
        self.transmits: list[Transmit] = []
        self.trains: list[trains.TrainTransmit] = []
        self.counters: Counter[str] = Counter()
        self._own_addresses = own_addresses | frozenset(relay_addresses.values())
        self._randomness = randomness
        self._fast_path = fast_path or NoFastPath()
        self._table = AllocationTable(
            relay_addresses=relay_addresses,
            first_port=first_port,
            last_port=last_port,
            sockets=sockets,
            randomness=randomness,
            fast_path=self._fast_path,
        )
        self._requests = Requests(
            table=self._table,
            limits=self.limits,
            peers=peers or PeerPolicy.of(),
            own_addresses=self._own_addresses,
            alternate_servers=alternate_servers or {},
            counters=self.counters,
            fast_path=self._fast_path,
        )
        self._authenticator = Authenticator(
            credentials=credentials,
            realm=realm,
            nonce_key=randomness.bytes(32),
            software=SOFTWARE,
        )
        self._unauthenticated = RateLimiter(
            per_second=self.limits.unauthenticated_per_second,
            burst=self.limits.unauthenticated_burst,
            max_keys=self.limits.source_prefixes,
        )
        self._strangers = RateLimiter(
            per_second=self.limits.unanswered_per_host,
            burst=self.limits.unanswered_per_host,
            max_keys=UNANSWERED_HOSTS,
        )
        self._reliable_listeners: set[int] = set()
        self._places: dict[int, Place] = {}
        self._siblings: int | None = None
        self._ports = range(first_port, last_port + 1)
        self._unix_offset_s = 0
        self.relayed_packets = 0
        self.relayed_bytes = 0
        self.dropped_packets = 0
        self.synchronise(now, unix_s)

    # --- the owner's side ----------------------------------------------------------------------

    def add_listener(self, listener: int, *, reliable: bool = False) -> None:
        """The socket `listener` takes requests of clients. `reliable`: each has a connection, so
        that its address is proved and an answer without credentials floods nobody."""
        self._table.add_listener(listener)
        if reliable:
            self._reliable_listeners.add(listener)

    def client_moved(self, listener: int, before: tuple[str, int], after: tuple[str, int]) -> None:
        """The connection of a client at a reliable listener goes on from another address, as its
        transport has proved. Nobody may hold an allocation there."""
        self._table.move(listener, before, after)

    def offer_discovery(self, addresses: Mapping[int, Address]) -> int:
        """The addresses under which listeners are known: those at two IP addresses and the same two
        ports of each offer NAT behaviour discovery (RFC 5780) from now on. How many those are."""
        self._places = places(addresses)
        return len(self._places)

    def use_siblings(self, number: int) -> None:
        """Other processes have relayed ports of the same address: data for such ports is sent to
        `number` (see `relays.processes.siblings`)."""
        self._siblings = number

    def client_gone(self, listener: int, client: tuple[str, int]) -> None:
        """The connection of a client at a reliable listener ended, and with it its allocation
        (RFC 8656, section 7: TCP is part of the 5-tuple)."""
        allocation = self._table.by_client[listener].get(client)
        if allocation is not None:
            self._table.remove(allocation)

    def holds_allocation(self, listener: int, client: tuple[str, int]) -> bool:
        return client in self._table.by_client[listener]

    def allocations_at(self, listener: int) -> int:
        """How many allocations were made at this listener and are there still."""
        return len(self._table.by_client[listener])

    def synchronise(self, now: int, unix_s: int) -> None:
        self._unix_offset_s = unix_s - now // NS

    def drain(self) -> None:
        """Refuse new allocations from now on; what stands may be refreshed and used."""
        self._requests.draining = True

    def revoke_user(self, user: str) -> int:
        """End all allocations of this user: of the user name `user`, or of stamped user names
        that end in it. How many there were."""
        revoked = self._table.of_user(user)
        for allocation in revoked:
            self._table.remove(allocation)
        return len(revoked)

    @property
    def draining(self) -> bool:
        return self._requests.draining

    @property
    def allocations(self) -> int:
        return len(self._table)

    @property
    def load(self) -> float:
        """0.0 (empty) to 1.0 (no allocation left)."""
        return min(1.0, self.allocations / max(1, self.limits.allocations))

    def poll_timeout(self) -> int | None:
        return self._table.next_deadline()

    def handle_timeout(self, now: int) -> None:
        self.counters["allocations_expired"] += self._table.expire(now)

    def drain_transmits(self) -> list[Transmit]:
        drained = self.transmits[:]
        self.transmits.clear()
        return drained

    def statistics(self) -> dict[str, int]:
        """Present sizes and counts since the start; what a fast path relayed is counted in."""
        packets, size = self._fast_path.relayed()
        return {
            "allocations": self.allocations,
            "reservations": self._table.reservations,
            "source_prefixes": len(self._unauthenticated),
            "relayed_packets": self.relayed_packets + packets,
            "relayed_bytes": self.relayed_bytes + size,
            "dropped_packets": self.dropped_packets,
            **self.counters,
            **self._fast_path.statistics(),
        }

    # --- data ------------------------------------------------------------------------------------

    def receive(self, listener: int, data: memoryview, source: tuple[str, int], now: int) -> None:
        """A datagram of a client. Nothing is raised, whatever it holds."""
        if not data:
            return
        if 0x40 <= data[0] <= 0x7F:
            self._receive_channel_data(listener, data, source, now)
        elif is_send_indication(data):
            self._receive_send_indication(listener, data, source, now)
        elif is_stun(data):
            self._receive_message(listener, data, source, now)
        elif is_classic_request(data):
            self._answer_classic(listener, data, source, now)
        else:
            self.dropped_packets += 1

    def receive_from_peer(
        self, socket: int, data: memoryview, peer: tuple[str, int], now: int
    ) -> None:
        """A datagram that came to a relayed address (RFC 8656, sections 11.3 and 12.7)."""
        allocation = self._table.by_socket.get(socket)
        if allocation is None or peer[0] in self._own_addresses:
            self.dropped_packets += 1
            return
        self._deliver(allocation, data, peer, now)

    def receive_icmp(self, socket: int, peer: tuple[str, int], error: IcmpError, now: int) -> None:
        """An ICMP error about a datagram that left from a relayed address for `peer`. The client
        hears of it if it may talk to that peer (RFC 8656, section 11.5), whoever sent the error."""
        allocation = self._table.by_socket.get(socket)
        permission = None if allocation is None else allocation.permission_by_host.get(peer[0])
        if (
            allocation is not None
            and permission is not None
            and permission.expires_ns > now
            and error.kind in RELAYED_ICMP[permission.relayed.family]
        ):
            self.counters["icmp_relayed"] += 1
            packet = icmp_indication(peer, error, self._randomness.bytes(12))
            self.transmits.append((allocation.listener, packet, allocation.client))
        else:
            self.counters["icmp_dropped"] += 1

    def receive_train(
        self,
        listener: int,
        data: memoryview,
        segment_bytes: int,
        source: tuple[str, int],
        now: int,
    ) -> None:
        """Datagrams of `segment_bytes` each (the last may be shorter) of one client, in order; the
        outcome is that of `receive` for each."""
        allocation = self._table.by_client[listener].get(source)
        if allocation is not None:
            passed = trains.from_client(allocation, data, segment_bytes, now)
            if passed is not None:
                self._pass_on(passed)
                return
        for at in range(0, len(data), segment_bytes):
            self.receive(listener, data[at : at + segment_bytes], source, now)

    def receive_train_from_peer(
        self, socket: int, data: memoryview, segment_bytes: int, peer: tuple[str, int], now: int
    ) -> None:
        """Datagrams of one peer, like `receive_from_peer` for each."""
        allocation = self._table.by_socket.get(socket)
        if (
            allocation is not None
            and peer[0] not in self._own_addresses
            and allocation.listener not in self._reliable_listeners
        ):
            passed = trains.from_peer(allocation, data, segment_bytes, peer, now)
            if passed is not None:
                if not passed.permission.answered:
                    self._heard_from(peer[0], allocation, passed.permission, now)
                self._pass_on(passed)
                return
        for at in range(0, len(data), segment_bytes):
            self.receive_from_peer(socket, data[at : at + segment_bytes], peer, now)

    def _pass_on(self, passed: trains.Passed) -> None:
        self.relayed_packets += passed.datagrams
        self.relayed_bytes += passed.data_bytes
        self.trains += passed.transmits

    def _heard_from(
        self, host: str, allocation: Allocation, permission: Permission, now: int
    ) -> None:
        """A peer's address answered: it is a stranger no more."""
        permission.answered = True
        self._fast_path.channels_changed(allocation, now, host)

    def receive_from_sibling(self, packet: memoryview, now: int) -> None:
        """Data that a client of another process of this relay has for one of ours."""
        family, source_port, port, data = siblings.unwrap(packet)
        host = self._table.relay_addresses.get(family, "")
        target = self._table.by_relayed.get((host, port))
        if target is None:
            self.dropped_packets += 1
        else:
            self._deliver(target, data, (host, source_port), now)

    def _receive_channel_data(
        self, listener: int, data: memoryview, source: tuple[str, int], now: int
    ) -> None:
        allocation = self._table.by_client[listener].get(source)
        unpacked = read_channel_data(data)
        if allocation is None or unpacked is None:
            self.dropped_packets += 1
            return
        channel = allocation.channel_by_number.get(unpacked[0])
        if channel is None or channel.expires_ns <= now:
            self.dropped_packets += 1
            return
        self._relay(channel.permission, unpacked[1], channel.peer, now)

    def _receive_send_indication(
        self, listener: int, data: memoryview, source: tuple[str, int], now: int
    ) -> None:
        allocation = self._table.by_client[listener].get(source)
        if allocation is None:
            self.dropped_packets += 1
            return
        unpacked, is_whole = read_indication(data), False
        if unpacked is None:
            unpacked, is_whole = read_unfragmented_indication(data), True
        if unpacked is None or unpacked[0][1] < LOWEST_PEER_PORT:
            self.dropped_packets += 1
            return
        permission = allocation.permission_by_host.get(unpacked[0][0])
        if permission is None:
            self.dropped_packets += 1
            return
        before = len(self.transmits)
        self._relay(permission, unpacked[1], unpacked[0], now)
        if is_whole and len(self.transmits) > before and not permission.is_own:
            socket, payload, peer = self.transmits.pop()
            self.transmits.append((-socket, payload, peer))

    def _relay(
        self, permission: Permission, data: memoryview, peer: tuple[str, int], now: int
    ) -> None:
        if permission.expires_ns <= now:
            self.dropped_packets += 1
        elif permission.is_own:
            target = self._table.by_relayed.get(peer)
            if target is not None:
                self._deliver(target, data, permission.relayed.address, now)
            elif self._siblings is not None and peer[1] not in self._ports:
                packet = siblings.wrap(permission.relayed.address, peer, data)
                self.transmits.append((self._siblings, packet, peer))
            else:
                self.dropped_packets += 1
        elif permission.answered or (
            _is_within_allowance(permission, len(data), now) and self._strangers.take(peer[0], now)
        ):
            self.relayed_packets += 1
            self.relayed_bytes += len(data)
            self.transmits.append((permission.relayed.socket, data, peer))
        else:
            self.dropped_packets += 1

    def _deliver(
        self, allocation: Allocation, data: memoryview, peer: tuple[str, int], now: int
    ) -> None:
        permission = allocation.permission_by_host.get(peer[0])
        if permission is None or permission.expires_ns <= now or len(data) > MAX_DATA_BYTES:
            self.dropped_packets += 1
            return
        if not permission.answered:
            self._heard_from(peer[0], allocation, permission, now)
        channel = allocation.channel_by_peer.get(peer)
        if channel is not None and channel.expires_ns > now:
            packet = channel_data(channel.number, data)
        else:
            packet = data_indication(peer, data, self._randomness.bytes(12))
        self.relayed_packets += 1
        self.relayed_bytes += len(data)
        self.transmits.append((allocation.listener, packet, allocation.client))

    # --- requests --------------------------------------------------------------------------------

    def _receive_message(
        self, listener: int, data: memoryview, source: tuple[str, int], now: int
    ) -> None:
        try:
            message = StunMessage.decode(data)
        except StunError:
            self.counters["malformed_messages"] += 1
            return
        if message.message_class is not MessageClass.REQUEST:
            self.dropped_packets += 1
        elif message.method == Method.BINDING:
            self._answer_binding(listener, message, source, now, len(data))
        elif message.method in _TURN_METHODS:
            self._answer_turn(listener, message, source, now, len(data))
        else:
            self.counters["unknown_methods"] += 1

    def _answer_binding(
        self, listener: int, message: StunMessage, source: tuple[str, int], now: int, size: int
    ) -> None:
        answer = answer_binding(self._places, listener, message, source)
        self.counters["binding_requests"] += 1
        self._send_unauthenticated(message, answer, source, now, size)

    def _answer_classic(
        self, listener: int, data: memoryview, source: tuple[str, int], now: int
    ) -> None:
        answer = answer_classic(self._places, listener, data, source)
        if answer is None:
            self.counters["malformed_messages"] += 1
            return
        self.counters["classic_requests"] += 1
        room = self._room_for_a_stranger(listener, source, len(data))
        encoded = answer.encode(room)
        if self._may_answer(listener, len(encoded), room, source, now):
            self.transmits.append((answer.listener, encoded, source))

    def _answer_turn(
        self, listener: int, message: StunMessage, source: tuple[str, int], now: int, size: int
    ) -> None:
        unix_s = now // NS + self._unix_offset_s
        try:
            identity = self._authenticator.judge(message, source, now, unix_s)
        except StunError:
            identity = 400
        if isinstance(identity, int):
            self.counters[f"errors_{identity}"] += 1
            self._refuse(listener, message, identity, source, now, size)
            return
        by_client = self._table.by_client[listener]
        if message.method == Method.ALLOCATE:
            existing = by_client.get(source)
            if existing is not None and existing.transaction_id == message.transaction_id:
                self.transmits.append((listener, existing.answer, source))
                return
        answer = self._requests.answer(listener, message, source, identity.username, now)
        encoded = answer.encode(
            key=identity.key, integrity=identity.integrity, fingerprint=message.has_fingerprint
        )
        if message.method == Method.ALLOCATE and answer.message_class is MessageClass.SUCCESS:
            by_client[source].answer = encoded
        self.transmits.append((listener, encoded, source))

    def _refuse(
        self,
        listener: int,
        message: StunMessage,
        code: int,
        source: tuple[str, int],
        now: int,
        size: int,
    ) -> None:
        """Answer a TURN request whose credentials are missing or no good."""
        if code not in (401, 438):
            refusal = error_response(message, code, "", ())
            unproved = Answer(listener=listener, destination=source, message=refusal)
            self._send_unauthenticated(message, unproved, source, now, size)
            return
        room = self._room_for_a_stranger(listener, source, size)
        challenge = self._authenticator.challenge(message, code, source, now, room=room)
        if self._may_answer(listener, len(challenge), room, source, now):
            self.transmits.append((listener, challenge, source))

    # --- answers without credentials -------------------------------------------------------------

    def _send_unauthenticated(
        self,
        request: StunMessage,
        answer: Answer,
        source: tuple[str, int],
        now: int,
        size: int,
    ) -> None:
        """Send unless the prefix of the source had enough, or the answer would amplify."""
        fingerprint = request.has_fingerprint
        room = self._room_for_a_stranger(answer.listener, source, size)
        message = _with_wishes(answer.message, answer.wishes, room, fingerprint=fingerprint)
        encoded = message.encode(fingerprint=fingerprint)
        if self._may_answer(answer.listener, len(encoded), room, source, now):
            self.transmits.append((answer.listener, encoded, answer.destination))

    def _room_for_a_stranger(self, listener: int, source: tuple[str, int], size: int) -> int:
        """How long an answer to a request of `size` bytes may be: twice that, headers counted."""
        if listener in self._reliable_listeners:
            return MAX_MESSAGE_BYTES
        headers = 48 if ":" in source[0] else 28
        return 2 * (size + headers) - headers

    def _may_answer(
        self, listener: int, size: int, room: int, source: tuple[str, int], now: int
    ) -> bool:
        if size > room:
            self.counters["answers_too_large"] += 1
            return False
        if listener in self._reliable_listeners:
            return True
        if not self._unauthenticated.take(source_prefix(source[0]), now):
            self.counters["answers_rate_limited"] += 1
            return False
        return True


def _with_wishes(
    message: StunMessage, wishes: Attributes, room: int, *, fingerprint: bool
) -> StunMessage:
    """`message` with as many of `wishes` as there is room for, the first ones first."""
    size = message.size(fingerprint=fingerprint)
    attributes = list(message.attributes)
    for kind, value in wishes:
        wish = 4 + len(value) + -len(value) % 4
        if size + wish <= room:
            attributes.append((kind, value))
            size += wish
    return attrs.evolve(message, attributes=tuple(attributes))


def _is_within_allowance(permission: Permission, size: int, now: int) -> bool:
    """20 packets/s of 200 B for an address that never sent anything."""
    paid_at_ns = max(permission.paid_at_ns, now)
    if size > UNANSWERED_BYTES or paid_at_ns - now > UNANSWERED_BURST_NS:
        return False
    permission.paid_at_ns = paid_at_ns + UNANSWERED_INTERVAL_NS
    return True
