"""What serves clients in one process: the core, its sockets and the way data takes.

`relays.daemon` has one of these, or several processes with one each (`relays.processes`).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from relays.authentication import Credentials
from relays.fastpath.drain import load as load_drain
from relays.peers import PeerPolicy
from relays.requests import ServerLimits
from relays.server import Server
from relays.settings import Addresses, RelaySettings
from relays.transports.local import local_addresses
from relays.transports.udp import UdpSockets, wanted_descriptors
from runtime.clock import Clock
from runtime.descriptors import raise_file_limit
from runtime.net.address import Address
from runtime.net.binding import binding
from runtime.randomness import SystemRandomness
from runtime.service import get_logger


class Serving:
    """See the head of this file. `inherited` are listeners that are open already; of `processes`
    that serve as one relay this is one."""

    def __init__(
        self,
        settings: RelaySettings,
        addresses: Addresses,
        credentials: Credentials,
        clock: Clock,
        *,
        processes: int = 1,
        inherited: Mapping[Address, socket.socket] | None = None,
    ) -> None:
        drain = load_drain(SystemRandomness()) if settings.compiled_drain else None
        self.data_path = "python" if drain is None else "compiled"
        self.sockets = UdpSockets(bind_hosts=addresses.bind_hosts, clock=clock, drain=drain)
        self._listen = addresses.listen
        self._inherited = inherited
        limits = ServerLimits()
        self.server = Server(
            credentials=credentials,
            realm=settings.realm,
            relay_addresses=addresses.told_hosts,
            own_addresses=local_addresses() | addresses.external_hosts,
            sockets=self.sockets,
            randomness=SystemRandomness(),
            peers=PeerPolicy.of(
                allow_private_peers=settings.allow_private_peers,
                allowed_peer_ranges=settings.allowed_peer_ranges,
            ),
            limits=ServerLimits(
                allocations_per_username=settings.max_allocations_per_user,
                allocations_per_source=settings.max_allocations_per_source,
                allocations=_allow_descriptors(settings.max_allocations),
                permissions_per_allocation=settings.max_permissions,
                channels_per_allocation=settings.max_channels,
                unauthenticated_per_second=settings.unauthenticated_per_second,
                unauthenticated_burst=2 * settings.unauthenticated_per_second,
                unanswered_per_host=-(-limits.unanswered_per_host // processes),
            ),
            first_port=addresses.first_port,
            last_port=addresses.last_port,
            alternate_servers=addresses.alternate_servers,
            fast_path=drain,
            now=clock.monotonic_ns(),
            unix_s=int(clock.utc_now().timestamp()),
        )

    def listen(self) -> None:
        """Open the listeners, or take the inherited ones. Raises OSError."""
        log = get_logger("relay")
        if self._inherited is not None:
            for opened in self._inherited.values():
                self.server.add_listener(self.sockets.adopt(opened))
            return
        for address in self._listen:
            with binding("listen", f"{address} (UDP)"):
                number, bound = self.sockets.listen(address)
            self.server.add_listener(number)
            log.info("listening", address=str(bound), transport="udp")
        log.info("data_path", mode=self.data_path)

    async def run(self) -> None:
        """Serve, until cancelled."""
        await self.sockets.run(self.server)

    async def wait_serving(self) -> None:
        """Listeners are read as soon as `run` runs; what has come before waits in them."""

    def statistics(self) -> dict[str, int]:
        return {**self.server.statistics(), **self.sockets.statistics()}

    def close(self) -> None:
        self.sockets.close_all()


def _allow_descriptors(allocations: int) -> int:
    """Raise the limit of open files as far as allowed; how many allocations it is good for."""
    soft = raise_file_limit(wanted_descriptors(allocations))
    return min(allocations, max(1, (soft - wanted_descriptors(0)) // 2))
