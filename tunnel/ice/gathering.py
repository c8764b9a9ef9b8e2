"""Gathering (RFC 8445, section 5.1.1), for all connections of an engine at once.

For every host socket and every relay a Binding request tells how the relay sees the socket: that
is the server-reflexive candidate, and it proves that the relay can be reached from there. Once
allocations are wanted (`allocate`), one is made per relay and address family over the first such
socket, which is the relayed candidate. Nothing is sent before the first connection starts
(`start`), and with the last one everything is given back (`rest`).

Bindings are repeated every 20 s. So the NAT's binding for the allocation's 5-tuple stays open, and
a NAT that forgot it is noticed: the reflexive address changes. Then, and when an allocation is
lost, the allocation is made anew, and `generation` rises: the peer drops what it knew. What is
merely new is trickled within the generation. `version` changes with every change of either.

A relay that leaves LINK_AFTER_ASKS Binding requests unanswered is reached by a connection instead
(`tunnel.ice.links`), and the allocation is made over that; it has the lowest priority, so that
traffic moves back when UDP works.

A relay that is no longer to be used, since it drains, say, is left without haste: no peer is told
of the allocation any more, those who were are told that it ends, and for LEAVE_NS it goes on
serving, so that both sides can move to other paths before it is given back.

Some 620 lines, since sockets, relays and links change what each other may do; what is decided about
one of them alone stands in `bindings`, `ways` and `links`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

from channel.messages import Candidate, RelayServer
from relays.client import Allocated, Lost, Permitted, Received, Refused, TurnClient
from runtime.clock import NS_PER_MS, NS_PER_S, earliest
from runtime.net.address import Address
from runtime.randomness import Randomness
from tunnel.datagrams import Relayed, Transmit
from tunnel.ice.bindings import Binding, binding_request, read_reflexive
from tunnel.ice.candidates import (
    MAX_LOCAL_PREFERENCE,
    Base,
    IpNetwork,
    local_candidates,
    priority_of,
)
from tunnel.ice.links import LinkCommand, RelayLinks
from tunnel.ice.ways import RelayWay, Way, ways_to

BINDING_INTERVALS_NS: Final = tuple(ms * NS_PER_MS for ms in (100, 200, 400, 800, 1600, 3200))
BINDING_REFRESH_NS: Final = 20 * NS_PER_S
BINDING_RETRY_NS: Final = 10 * NS_PER_S
LEAVE_NS: Final = 10 * NS_PER_S
"""Much longer than the portal takes to tell both sides, and less than a relay drains (60 s)."""
LINK_AFTER_ASKS: Final = 3
"""After 700 ms: more than any round trip that one would call with."""
REVIEW_INTERVAL_NS: Final = 2 * NS_PER_S
RETRY_FIRST_NS: Final = NS_PER_S
RETRY_LAST_NS: Final = 60 * NS_PER_S
MAX_SOCKETS: Final = 16
MAX_AWAITING: Final = 256
MAX_REFUSED_HOSTS: Final = 256


class Gatherer:
    """See the head of this file. `now` is in nanoseconds of one monotonic clock."""

    def __init__(self, *, randomness: Randomness) -> None:
        self.version = 0
        self.generation = 0
        self._randomness = randomness
        self._active = False
        self.allocates = False
        """Whether allocations are wanted."""
        self._suspected_at: int | None = None
        self._review_at: int | None = None
        self._host_base_by_socket: dict[Address, Base] = {}
        self._sockets_added = 0
        self._links = RelayLinks()
        self._server_by_id: dict[UUID, RelayServer] = {}
        self._relays: dict[tuple[UUID, Way], RelayWay] = {}
        self._bindings: dict[tuple[Address, Address], Binding] = {}
        self._awaiting: dict[tuple[Address, Address], bytes] = {}
        self._transmits: list[Transmit] = []
        self._link_messages: list[tuple[int, bytes]] = []
        self._received: list[Relayed] = []

    # --- what there is -------------------------------------------------------------------------

    def add_socket(self, local: Address, network: IpNetwork | None, now: int) -> None:
        """A host socket, bound to `local`. Raises ValueError for more than `MAX_SOCKETS`."""
        if local in self._host_base_by_socket:
            return
        if len(self._host_base_by_socket) >= MAX_SOCKETS:
            raise ValueError(f"at most {MAX_SOCKETS} sockets")
        ipv4 = ":" not in local.host
        preference = max(0, MAX_LOCAL_PREFERENCE - 2 * self._sockets_added - ipv4)
        self._sockets_added += 1
        self._host_base_by_socket[local] = Base(
            address=local,
            socket=local,
            priority=priority_of("host", preference),
            network=network,
        )
        self._changed(regather=False)
        self._sync_bindings(now)

    def remove_socket(self, local: Address, now: int) -> None:
        """The socket is closed: what was gathered from it is gone."""
        if self._host_base_by_socket.pop(local, None) is None:
            return
        for relay in self._relays.values():
            if relay.socket == local:
                self._abandon(relay)
        self._sync_bindings(now)
        self._changed(regather=True)
        self._allocate_where_possible(now)

    def set_relays(self, servers: Sequence[RelayServer], now: int) -> None:
        """All the relays to use. One that stays keeps its allocation; new credentials serve from
        the next allocation on. Allocations on others are left (see the head of this file)."""
        wanted: dict[tuple[UUID, Way], RelayWay] = {}
        for server in servers:
            for key, fresh in ways_to(server, len(wanted)):
                wanted.setdefault(key, self._keep(self._relays.get(key), fresh))
        for key, relay in self._relays.items():
            if key not in wanted and relay.base is not None:
                self._leave(relay, now)
                wanted[key] = relay
            elif wanted.get(key) is not relay:
                self._give_back(relay, now)
        self._relays = wanted
        self._server_by_id |= {server.id: server for server in servers}
        self._keep_servers()
        self._sync_bindings(now)
        self._follow_links(now)
        self._allocate_where_possible(now)

    def start(self, now: int) -> None:
        """A connection begins: gather, or make sure that what was gathered still holds."""
        if self._active:
            self.review(now)
            return
        self._active = True
        self._suspected_at = now
        self._sync_bindings(now)

    def allocate(self, now: int) -> None:
        """Relayed addresses of our own are wanted from now on, until the rest."""
        if not self.allocates:
            self.allocates = True
            self._allocate_where_possible(now)

    def rest(self, now: int) -> None:
        """No connection is left: give allocations back and send nothing any more."""
        self._active = self.allocates = False
        self._review_at = None
        for relay in self._relays.values():
            self._give_back(relay, now)
        self._relays = {k: relay for k, relay in self._relays.items() if relay.leave_at is None}
        self._keep_servers()
        self._bindings.clear()
        self._links.rest()
        self._follow_links(now)

    def review(self, now: int) -> None:
        """Make sure soon that relays still see us as before, at most every 2 s."""
        allowed_at = now if self._suspected_at is None else self._suspected_at + REVIEW_INTERVAL_NS
        if allowed_at <= now:
            self.suspect(now)
        elif self._active:
            self._review_at = allowed_at

    def suspect(self, now: int) -> None:
        """The network may have changed: ask every relay anew, now."""
        self._suspected_at, self._review_at = now, None
        for binding in self._bindings.values():
            binding.attempt = 0
            self._ask(binding, now)
        for relay in self._relays.values():
            if relay.client is not None:
                relay.client.probe(now)
                self._service(relay, now)
        self._links.suspect(now)
        self._ask_by_links()

    def bases(self) -> list[Base]:
        """The places to send from."""
        relayed = [relay.base for relay in self._relays.values() if relay.base is not None]
        return [*self._host_base_by_socket.values(), *relayed]

    def leaving(self) -> frozenset[Address]:
        """The addresses of bases that will soon be gone, in all likelihood."""
        going = (r.base for r in self._relays.values() if r.leave_at is not None or r.ails)
        return frozenset(base.address for base in going if base is not None)

    def host_base(self, local: Address) -> Base | None:
        return self._host_base_by_socket.get(local)

    def candidates(self) -> tuple[Candidate, ...]:
        """What a peer may be told, best first, at most `MAX_CANDIDATES`."""
        hosts, relays = self._host_base_by_socket, self._relays.values()
        return local_candidates(
            hosts.values(),
            [
                (hosts[binding.socket], binding.reflexive, binding.server)
                for binding in self._bindings.values()
                if binding.reflexive is not None
            ],
            [relay.base for relay in relays if relay.base and relay.leave_at is None],
        )

    # --- relayed traffic -----------------------------------------------------------------------

    def send(self, base: Base, peer: Address, data: bytes, now: int) -> None:
        """Send from a base. Through a relay that has no permission for the peer yet, one is asked
        for, and the last datagram waits for it."""
        self.send_all(base, peer, (data,), now)

    def send_all(self, base: Base, peer: Address, datagrams: Sequence[bytes], now: int) -> None:
        """Send datagrams from one base to one peer, in order, as `send` does with each."""
        if base.server is None:
            socket = base.socket
            self._transmits += [Transmit(socket, peer, data) for data in datagrams]
            return
        relay = self._relay_of(base)
        if relay is None or relay.client is None or peer.host in relay.refused_hosts:
            return
        for data in datagrams:
            if not relay.client.send(peer, data, now):
                key = (base.address, peer)
                if key in self._awaiting or len(self._awaiting) < MAX_AWAITING:
                    self._awaiting[key] = data
                relay.client.permit(peer, now)
        self._service(relay, now)

    def bind(self, base: Base, peer: Address, now: int) -> None:
        """Use a channel for `peer`, which costs 4 bytes instead of 36."""
        relay = self._relay_of(base)
        if relay is not None and relay.client is not None:
            relay.client.bind(peer, now)
            self._service(relay, now)

    def forget(self, peer: Address, now: int) -> None:
        """Nobody talks to `peer` any more."""
        for relay in self._relays.values():
            if relay.base is not None:
                self._awaiting.pop((relay.base.address, peer), None)
            if relay.client is not None:
                relay.client.forget(peer, now)

    # --- input, time, output -------------------------------------------------------------------

    def receive(self, local: Address, data: bytes, source: Address, now: int) -> bool:
        """A datagram that may have come from a relay. False: it is not gathering's."""
        binding = self._bindings.get((local, source))
        if binding is None:
            return False
        if binding.transaction_id and data[8:20] == binding.transaction_id:
            self._receive_binding(binding, data, now)
            return True
        for relay in self._relays.values():
            if relay.server != source or relay.socket != local or relay.client is None:
                continue
            if relay.client.receive(data, now):
                self._service(relay, now)
                return True
        return False

    def link_opened(self, link: int, now: int) -> None:
        """A link that `drain_link_commands` asked for stands."""
        self._links.opened(link, now)
        self._follow_links(now)

    def link_closed(self, link: int, now: int) -> None:
        """A link ended, or could not be opened."""
        self._links.closed(link, now)
        self._follow_links(now)

    def receive_from_link(self, link: int, messages: Sequence[bytes], now: int) -> None:
        """STUN messages and ChannelData, in order, as a relay sent them by a link."""
        self._links.heard(link, now)
        self._watch_silence()
        for relay in self._relays.values():
            if relay.link != link or relay.client is None:
                continue
            for message in messages:
                relay.client.receive(message, now)
            self._service(relay, now)

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due; None: nothing is waited for."""
        relays = self._relays.values()
        return earliest(
            self._review_at,
            self._links.poll_timeout(),
            *[binding.due for binding in self._bindings.values()],
            *[relay.retry_at for relay in relays],
            *[relay.leave_at for relay in relays],
            *[relay.client.poll_timeout() for relay in relays if relay.client is not None],
        )

    def handle_timeout(self, now: int) -> None:
        due_at = self.poll_timeout()
        if due_at is None or due_at > now:
            return
        if self._review_at is not None and self._review_at <= now:
            self.suspect(now)
        for binding in self._bindings.values():
            if binding.due is not None and binding.due <= now:
                self._ask(binding, now)
        for relay in self._relays.values():
            if relay.client is not None:
                relay.client.handle_timeout(now)
                self._service(relay, now)
            elif relay.retry_at is not None and relay.retry_at <= now:
                relay.retry_at = None
                self._allocate(relay, now)
        self._leave_what_is_due(now)
        self._links.handle_timeout(now)
        self._ask_by_links()
        self._follow_links(now)

    def drain_transmits(self) -> list[Transmit]:
        drained, self._transmits = self._transmits, []
        return drained

    def drain_link_messages(self) -> list[tuple[int, bytes]]:
        """What is to be sent by links, in order, each before what `drain_link_commands` says."""
        drained, self._link_messages = self._link_messages, []
        return drained

    def drain_link_commands(self) -> list[LinkCommand]:
        return self._links.drain_commands()

    def drain_received(self) -> list[Relayed]:
        drained, self._received = self._received, []
        return drained

    def reached_by(self, relay_id: UUID) -> str | None:
        """The transport of the best allocation on a relay, or "udp" where none is wanted and one
        could be made by it; otherwise None."""
        for way in ("ipv4", "ipv6"):
            relay = self._relays.get((relay_id, way))
            if relay is not None and (relay.base is not None or self._is_in_reserve(relay)):
                return "udp"
        relay, standing = self._relays.get((relay_id, "link")), self._links.standing(relay_id)
        if relay is None or relay.base is None or standing is None:
            return None
        return standing.door.transport

    def statistics(self) -> dict[str, int]:
        """Present sizes."""
        return {
            "sockets": len(self._host_base_by_socket),
            "relays": len({relay_id for relay_id, _ in self._relays}),
            "links": self._links.count,
            "allocations": sum(relay.base is not None for relay in self._relays.values()),
            "generation": self.generation,
        }

    # --- bindings ------------------------------------------------------------------------------

    def _sync_bindings(self, now: int) -> None:
        """One binding per socket and relay of the same family, while active."""
        wanted = {
            (socket, relay.server)
            for socket in self._host_base_by_socket
            for relay in self._relays.values()
            if self._active and relay.way == relay.family
            if (":" in socket.host) == (":" in relay.server.host)
        }
        for key in list(self._bindings):
            if key not in wanted:
                del self._bindings[key]
        for socket, server in sorted(wanted - self._bindings.keys()):
            binding = Binding(socket=socket, server=server)
            self._bindings[socket, server] = binding
            self._ask(binding, now)
        self._watch_udp(now)

    def _ask(self, binding: Binding, now: int) -> None:
        binding.transaction_id = self._randomness.bytes(12)
        data = binding_request(binding.transaction_id)
        self._transmits.append(Transmit(binding.socket, binding.server, data))
        if binding.attempt < len(BINDING_INTERVALS_NS):
            binding.due = now + BINDING_INTERVALS_NS[binding.attempt]
            binding.attempt += 1
        else:
            binding.due = now + BINDING_RETRY_NS
            binding.answered = False

    def _receive_binding(self, binding: Binding, data: bytes, now: int) -> None:
        reflexive = read_reflexive(data)
        if reflexive is None:
            return
        binding.transaction_id = b""
        binding.attempt = 0
        binding.due = now + BINDING_REFRESH_NS
        binding.answered = True
        known, binding.reflexive = binding.reflexive, reflexive
        if known != reflexive:
            self._changed(regather=known is not None)
        for relay in self._relays.values():
            if relay.server == binding.server and relay.socket == binding.socket:
                self._check_rebinding(relay, reflexive, now)
        self._watch_udp(now)
        self._allocate_where_possible(now)

    # --- links ---------------------------------------------------------------------------------

    def _watch_udp(self, now: int) -> None:
        """Say of each relay whether UDP reaches it."""
        for relay_id in {relay_id: None for relay_id, way in self._relays if way == "link"}:
            if not self._active:
                return
            relays = (self._relays.get((relay_id, "ipv4")), self._relays.get((relay_id, "ipv6")))
            servers = {relay.server: relay for relay in relays if relay is not None}
            answering = [
                servers[binding.server]
                for binding in self._bindings.values()
                if binding.server in servers and binding.attempt <= LINK_AFTER_ASKS
            ]
            if not answering:
                self.allocates = True
                self._links.need(relay_id, now)
            elif any(relay.base is not None for relay in answering):
                self._links.spare(relay_id, now)

    def _ask_by_links(self) -> None:
        """Whatever comes back is a sign of life; the answers themselves say nothing new."""
        for link in self._links.drain_asked():
            self._link_messages.append((link, binding_request(self._randomness.bytes(12))))

    def _watch_silence(self) -> None:
        for (relay_id, way), relay in self._relays.items():
            if way == "link" and relay.ails != self._links.is_silent(relay_id):
                relay.ails = not relay.ails
                self._changed(regather=False)

    def _follow_links(self, now: int) -> None:
        """An allocation over a link lives as long as that link."""
        self._watch_udp(now)
        self._watch_silence()
        for (relay_id, _), relay in self._relays.items():
            if relay.way != "link":
                continue
            standing = self._links.standing(relay_id)
            link = None if standing is None else standing.link
            if relay.link == link:
                continue
            was_allocated = relay.base is not None
            self._abandon(relay)
            relay.link = link
            if standing is not None:
                relay.server = standing.door.address
            if was_allocated:
                self._changed(regather=True)
            self._allocate(relay, now)

    # --- allocations ---------------------------------------------------------------------------

    def _allocate_where_possible(self, now: int) -> None:
        for relay in self._relays.values() if self.allocates else ():
            if relay.client is None and relay.retry_at is None:
                self._allocate(relay, now)

    def _allocate(self, relay: RelayWay, now: int) -> None:
        """By the link, or over the first socket from which the relay answered; later, if there is
        none yet."""
        if relay.leave_at is not None:
            return
        if relay.way != "link":
            sockets = (
                socket
                for (socket, server), binding in self._bindings.items()
                if server == relay.server and binding.answered
            )
            relay.socket = next(sockets, None)
        if relay.socket is not None or relay.link is not None:
            relay.begin(self._randomness, now)
            self._service(relay, now)

    def _is_in_reserve(self, relay: RelayWay) -> bool:
        """Whether the relay answers, and no allocation on it is wanted."""
        return not self.allocates and any(
            binding.answered
            for binding in self._bindings.values()
            if binding.server == relay.server
        )

    def _service(self, relay: RelayWay, now: int) -> None:
        """Take what the client has to say, and send what it has to send."""
        client, socket, link = relay.client, relay.socket, relay.link
        if client is None:
            return
        for event in client.drain_events():
            if isinstance(event, Received):
                if relay.base is not None:
                    self._received.append(Relayed(relay.base, event.peer, event.data))
            elif isinstance(event, Permitted):
                self._send_awaiting(relay, client, event.peer, now)
            elif isinstance(event, Refused):
                self._refuse(relay, event.peer)
            elif isinstance(event, Allocated):
                self._allocated(relay, event.relayed, now)
            elif isinstance(event, Lost):
                self._lost(relay, now)
                break
        if socket is not None:
            for data in client.drain_datagrams():
                self._transmits.append(Transmit(socket, client.server, data))
        elif link is not None:
            self._link_messages += [(link, data) for data in client.drain_datagrams()]

    def _send_awaiting(self, relay: RelayWay, client: TurnClient, peer: Address, now: int) -> None:
        if relay.base is not None:
            data = self._awaiting.pop((relay.base.address, peer), None)
            if data is not None:
                client.send(peer, data, now)

    def _refuse(self, relay: RelayWay, peer: Address) -> None:
        """The relay forbids this host: ask no more, for as long as the allocation stands."""
        if relay.base is not None:
            self._awaiting.pop((relay.base.address, peer), None)
        if len(relay.refused_hosts) < MAX_REFUSED_HOSTS:
            relay.refused_hosts[peer.host] = None

    def _allocated(self, relay: RelayWay, relayed: Address, now: int) -> None:
        relay.failures = 0
        relay.base = Base(
            address=relayed,
            socket=relay.socket or relayed,
            server=relay.server,
            priority=relay.base_priority,
        )
        self._changed(regather=False)
        self._watch_udp(now)

    def _lost(self, relay: RelayWay, now: int) -> None:
        """Make a new allocation: at once if there was one, else with back-off."""
        was_allocated = relay.base is not None
        self._abandon(relay)
        if was_allocated:
            self._changed(regather=True)
            self._allocate(relay, now)
            return
        delay = min(RETRY_FIRST_NS << min(relay.failures, 16), RETRY_LAST_NS)
        relay.failures += 1
        relay.retry_at = now + delay

    def _check_rebinding(self, relay: RelayWay, reflexive: Address, now: int) -> None:
        """The relay knows an allocation by its 5-tuple: with another one it is lost to us."""
        if relay.client is None or relay.base is None or relay.client.reflexive == reflexive:
            return
        self._lost(relay, now)

    def _abandon(self, relay: RelayWay) -> None:
        if relay.base is not None:
            gone = relay.base.address
            self._awaiting = {k: v for k, v in self._awaiting.items() if k[0] != gone}
        relay.client = relay.base = relay.socket = relay.retry_at = None
        relay.refused_hosts.clear()

    def _leave(self, relay: RelayWay, now: int) -> None:
        if relay.leave_at is None:
            relay.leave_at = now + LEAVE_NS
            self._changed(regather=True)

    def _leave_what_is_due(self, now: int) -> None:
        """Give back what was left for long enough, or is gone already."""
        over = [
            key
            for key, relay in self._relays.items()
            if relay.leave_at is not None and (relay.leave_at <= now or relay.client is None)
        ]
        for key in over:
            self._give_back(self._relays.pop(key), now)
        if over:
            self._keep_servers()
            self._sync_bindings(now)

    def _keep_servers(self) -> None:
        used = {relay_id for relay_id, _ in self._relays}
        self._server_by_id = {id: each for id, each in self._server_by_id.items() if id in used}
        self._links.set_relays(self._server_by_id.values())

    def _give_back(self, relay: RelayWay, now: int) -> None:
        if relay.client is None:
            relay.retry_at = None
            return
        was_allocated = relay.base is not None
        relay.client.close(now)
        self._service(relay, now)
        self._abandon(relay)
        if was_allocated:
            self._changed(regather=relay.leave_at is None)

    def _keep(self, known: RelayWay | None, fresh: RelayWay) -> RelayWay:
        """The relay as it was, with the credentials and rank that it has now."""
        is_same = known is not None and (known.way == "link" or known.server == fresh.server)
        if known is None or not is_same:
            return fresh
        known.username, known.password = fresh.username, fresh.password
        known.retry_at = None
        if known.leave_at is not None:
            known.leave_at = None
            self._changed(regather=False)
        return known

    def _relay_of(self, base: Base) -> RelayWay | None:
        for relay in self._relays.values():
            if relay.base == base:
                return relay
        return None

    def _changed(self, *, regather: bool) -> None:
        self.version += 1
        if regather:
            self.generation += 1
