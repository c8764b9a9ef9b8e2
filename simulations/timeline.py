"""The timeline of one session, packet by packet: what its client, gateways and relays sent, what
came through, and what was dropped where."""

from __future__ import annotations

from typing import Final

import attrs

from simulations.build import Installation
from simulations.net.packets import Sighting
from simulations.net.routing import Network
from simulations.result import Step

MAX_STEPS: Final = 20_000
_WIREGUARD: Final = {1: "initiation", 2: "response", 3: "cookie"}
_STUN_CLASS: Final = {0x000: "request", 0x010: "indication", 0x100: "success", 0x110: "error"}
_STUN_METHOD: Final = {
    1: "binding", 3: "allocate", 4: "refresh", 6: "send", 7: "data", 8: "create permission",
    9: "channel bind",
}  # fmt: skip


class Timeline:
    """Follows a client on its way to a resource."""

    def __init__(self, installation: Installation, client: str, resource: str) -> None:
        slots = installation.slots
        if client not in slots or resource not in installation.account.addresses:
            raise ValueError(f"there is no {client} or no {resource} to follow")
        sites = next(
            each.sites for each in installation.scenario.account.resources if each.name == resource
        )
        self._installation = installation
        self._client = slots[client].host
        self._partners = frozenset(
            [gateway.name for gateway in installation.scenario.gateways if gateway.site in sites]
            + [relay.name for relay in installation.scenario.relays]
            + [portal.name for portal in installation.scenario.portals]
        )
        self._steps: list[Step] = []
        installation.world.watch(self._see)

    def steps(self, zero: int) -> tuple[Step, ...]:
        """All of them, their instants counted from `zero`."""
        return tuple(attrs.evolve(step, at_ns=step.at_ns - zero) for step in self._steps)

    def fault(self, now: int, text: str) -> None:
        """A fault began or ended."""
        self._add(Step(at_ns=now, kind="fault", where="", peer="", text=text))

    def _see(self, seen: Sighting) -> None:
        if seen.origin == self._client.name:
            peer = str(seen.destination)
        elif seen.origin in self._partners and seen.destination.host in self._own_addresses():
            peer = str(seen.source)
        else:
            return
        kind, text = ("channel", "") if seen.stream else kind_of(seen.data)
        words = [seen.what, text] if text else [seen.what]
        if seen.why:
            kind, words = "drop", [*words, f"({seen.why})"]
        self._add(
            Step(
                at_ns=seen.now,
                kind=kind,
                where=seen.where,
                peer=peer,
                text=" ".join(words),
                size=seen.size,
            )
        )

    def _own_addresses(self) -> tuple[str, ...]:
        host = self._client
        addresses = [each for each in (host.ipv4, host.ipv6) if each is not None]
        network: Network | None = host.network
        while network is not None:
            addresses += network.outer
            network = network.parent
        return tuple(addresses)

    def _add(self, step: Step) -> None:
        if len(self._steps) < MAX_STEPS:
            self._steps.append(step)


def kind_of(data: bytes) -> tuple[str, str]:
    """What a datagram is, by its first bytes: WireGuard, STUN, TURN or neither (RFC 7983)."""
    if len(data) >= 4 and data[1:4] == b"\0\0\0" and 1 <= data[0] <= 4:
        return "wireguard", _WIREGUARD.get(data[0], "data" if len(data) > 32 else "keepalive")
    if data and 0x40 <= data[0] <= 0x7F:
        return "turn", f"channel data ({kind_of(data[4:])[1]})"
    if len(data) >= 20 and data[4:8] == b"\x21\x12\xa4\x42":
        label = int.from_bytes(data[:2], "big")
        method = label & 0xF | (label >> 1) & 0x70 | (label >> 2) & 0xF80
        text = f"{_STUN_METHOD.get(method, method)} {_STUN_CLASS[label & 0x110]}"
        return ("stun" if method == 1 else "turn"), text
    return "other", ""
