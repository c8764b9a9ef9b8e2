"""Relays in the world: the real TURN server and its side of the channel, on a host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from channel.credentials import decode_token
from channel.messages import TO_RELAY, Disconnect, IpText, SocketAddress
from relays.agent import DrainRequested, Joined, RelayAgent, UserRevoked
from relays.authentication import GRACE_S, StampedCredentials
from relays.server import Server
from runtime.clock import NS_PER_S, earliest
from runtime.net.address import Address
from runtime.secret import Secret
from simulations.checks.interface import Observer, hears
from simulations.hosts.channel import AgentChannel, Lookup
from simulations.hosts.relay_links import DOOR_PORT, DOORS, PIN, RelayDoors
from simulations.net.world import Host, World

RELAY_PORT: Final = 3_478
LISTENER: Final = 0
DRAIN_LOOK_NS: Final = NS_PER_S // 2
DRAIN_TIMEOUT_NS: Final = 300 * NS_PER_S


class RelayHost:
    """One life of a relay: see `relays.daemon`, whose shell this is in virtual time."""

    def __init__(
        self,
        world: World,
        host: Host,
        *,
        name: str,
        region: str,
        token: Secret,
        life: int,
        lookup: Lookup,
        observers: tuple[Observer, ...] = (),
    ) -> None:
        self.world = world
        self.host = host
        self.name = name
        self.refused = ""
        self.is_over = False
        drawn = world.randomness(f"{name}/{life}")
        stamp_secret = drawn.bytes(32)
        self._credentials = StampedCredentials(stamp_secret)
        self._ports: dict[int, tuple[str, int]] = {}
        self._number = LISTENER
        self._gone: Callable[[], None] | None = None
        self._drain_until = self._drain_at = 0
        addresses = {1: host.ipv4, 2: host.ipv6}
        self._hosts = {family: str(ip) for family, ip in addresses.items() if ip is not None}
        self.server = Server(
            credentials=self._credentials,
            realm="holloway",
            relay_addresses=self._hosts,
            own_addresses=frozenset(self._hosts.values()),
            sockets=self,
            randomness=drawn.child("server"),
            now=self.now,
            unix_s=self._unix_s,
        )
        self.agent = RelayAgent(
            token=token,
            addresses=(
                *(self._address(ip, RELAY_PORT, "udp") for ip in self._hosts.values()),
                *(
                    self._address(ip, DOOR_PORT, door)
                    for door in DOORS
                    for ip in self._hosts.values()
                ),
            ),
            certificate_pins=(PIN,),
            stamp_secret=stamp_secret,
            name=name,
            region=region,
            software="holloway simulation",
            incarnation=int(host.clock.utc_now().timestamp() * 10**9),
        )
        self._listeners: dict[str, int] = {}
        for ip in self._hosts.values():
            number = self._next_number()
            self._listeners[ip] = number
            self._ports[number] = (ip, RELAY_PORT)
            self.server.add_listener(number)
        host.bind(RELAY_PORT, self._from_client)
        self._door_number = self._next_number()
        self._doors = RelayDoors(
            host, self.server, self._door_number, lambda: self.now, lambda: world.touch(self)
        )
        self._listeners_heard = listeners = hears(observers, "heard")
        self.channel = AgentChannel(
            self,
            self.agent,
            TO_RELAY,
            decode_token(token),
            drawn.child("channel"),
            now=self.now,
            lookup=lookup,
            heard=self._heard if listeners else None,
        )
        world.add(self, host=host)

    # --- relays.allocations.Sockets ---

    def open(self, family: int, port: int) -> int | None:
        ip = self._hosts.get(family)
        if ip is None:
            return None
        number = self._next_number()

        def from_peer(data: bytes, source: Address, local: Address) -> None:
            self.server.receive_from_peer(number, memoryview(data), source, self.now)
            self.world.touch(self)

        try:
            self.host.bind(port, from_peer)
        except ValueError:
            return None
        self._ports[number] = (ip, port)
        return number

    def close(self, socket: int) -> None:
        _, port = self._ports.pop(socket)
        self.host.unbind(port)

    # --- Part ---

    def poll_timeout(self) -> int | None:
        return earliest(
            self.server.poll_timeout(),
            self.agent.poll_timeout(),
            self.channel.poll_timeout(),
            None if self._gone is None else self._drain_at,
        )

    def handle_timeout(self, now: int) -> None:
        self.server.handle_timeout(now)
        self.agent.load_changed(self.server.allocations, self.server.load, now)
        self.agent.handle_timeout(now)
        self.channel.handle_timeout(now)
        if self._gone is not None and now >= self._drain_at:
            self._look_at_drain(now)

    def flush(self, now: int) -> None:
        for event in self.agent.drain_events():
            if isinstance(event, Joined):
                self._credentials.relay_id = event.relay_id
            elif isinstance(event, DrainRequested):
                self.server.drain()
            elif isinstance(event, UserRevoked):
                self._revoke(event)
        self.agent.load_changed(self.server.allocations, self.server.load, now)
        for message in self.agent.drain_messages():
            self.channel.send(message)
        self.channel.flush()
        for socket, data, (host, port) in self.server.drain_transmits():
            if socket == self._door_number:
                self._doors.send(bytes(data), (host, port))
            elif abs(socket) in self._ports:
                self.transmit(self._ports[abs(socket)], Address(host, port), bytes(data))

    def transmit(self, local: tuple[str, int], destination: Address, data: bytes) -> None:
        """A datagram leaves."""
        self.host.send(local[1], destination, data)

    # --- the life of the process ---

    @property
    def now(self) -> int:
        return self.host.clock.monotonic_ns()

    @property
    def is_online(self) -> bool:
        """Whether it serves, and the portal knows."""
        return self.channel.connected

    def kill(self) -> None:
        """It is gone at once; the host's sockets are the host's to lose."""
        self.is_over = True
        self.channel.is_over = True
        self.world.remove(self)

    def stop(self) -> None:
        """It ends in good order, without waiting for anybody."""
        if self.is_over:
            return
        self.channel.close("ended")
        self._doors.close()
        for _, port in dict.fromkeys(self._ports.values()):
            self.host.unbind(port)
        self.kill()

    def drain(self, gone: Callable[[], None]) -> None:
        """As SIGTERM does: no newcomers, and the end when it is empty, or late."""
        self.server.drain()
        self.channel.close("draining")
        self._gone = gone
        self._drain_until = self.now + DRAIN_TIMEOUT_NS
        self._drain_at = self.now + DRAIN_LOOK_NS
        self.world.touch(self)

    def _look_at_drain(self, now: int) -> None:
        self._drain_at = now + DRAIN_LOOK_NS
        if self.server.allocations and now < self._drain_until:
            return
        gone, self._gone = self._gone, None
        self.stop()
        if gone is not None:
            gone()

    # --- channel owner ---

    def channel_touched(self) -> None:
        self.world.touch(self)

    def channel_refused(self, outcome: Disconnect) -> None:
        self.refused = outcome.reason
        self.world.after(0, self.stop)

    # --- helpers ---

    def _heard(self, message: object, epoch: int | None) -> None:
        for each in self._listeners_heard:
            each(self.world.now, self.name, message, epoch)

    @staticmethod
    def _address(
        ip: str, port: int, transport: Literal["udp", "quic", "tls", "tcp"]
    ) -> SocketAddress:
        return SocketAddress(address=IpText(ip), port=port, transport=transport)

    def _from_client(self, data: bytes, source: Address, local: Address) -> None:
        number = self._listeners.get(local.host)
        if number is not None:
            self.server.receive(number, memoryview(data), source, self.now)
            self.world.touch(self)

    def _revoke(self, event: UserRevoked) -> None:
        unix_s = self._unix_s
        until = unix_s + GRACE_S + event.for_ns // NS_PER_S
        self._credentials.revoke(event.user, until_unix_s=until, unix_s=unix_s)
        self.server.revoke_user(event.user)

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    @property
    def _unix_s(self) -> int:
        return int(self.host.clock.utc_now().timestamp())
