"""A NAT in virtual time, in the terms of RFC 4787: mapping, filtering, port assignment, timeout.

A core: packets go in with the instant, translated packets come out or None. The default is the
easy NAT of most homes (endpoint-independent mapping, address and port-dependent filtering, port
preserved); `SYMMETRIC` is the hard one. An inbound packet never makes a binding (strict RFC 4787;
the Linux kernel's own behaviour is an option of later scenarios), and outbound traffic alone
refreshes one.
"""

from __future__ import annotations

from typing import Literal

import attrs

from runtime.net.address import Address
from runtime.randomness import Randomness

Behaviour = Literal["endpoint_independent", "address_dependent", "address_and_port_dependent"]
FIRST_PORT = 1_024
PORTS = 64_512


@attrs.frozen(kw_only=True)
class NatBehaviour:
    """How a NAT maps and filters (RFC 4787, sections 4 and 5); `timeout_ns` since last outbound."""

    mapping: Behaviour = "endpoint_independent"
    filtering: Behaviour = "address_and_port_dependent"
    preserves_port: bool = True
    timeout_ns: int = 30 * 10**9


PORT_RESTRICTED = NatBehaviour()
SYMMETRIC = NatBehaviour(mapping="address_and_port_dependent", preserves_port=False)


@attrs.define
class _Binding:
    inside: Address
    outside_port: int
    refreshed_at: int
    peers: set[Address] = attrs.field(factory=set)


class Nat:
    """One NAT with one public address. `behaviour` may be replaced while it runs."""

    def __init__(self, public_ip: str, behaviour: NatBehaviour, *, randomness: Randomness) -> None:
        self.public_ip = public_ip
        self.behaviour = behaviour
        self._randomness = randomness
        self._by_mapping: dict[tuple[Address, object], _Binding] = {}
        self._by_port: dict[int, _Binding] = {}

    def outbound(self, source: Address, destination: Address, now: int) -> Address:
        """The public source of a packet from inside; makes or refreshes its binding."""
        key = (source, _part(destination, self.behaviour.mapping))
        binding = self._by_mapping.get(key)
        if binding is None or self._expired(binding, now):
            binding = _Binding(source, self._free_port(source.port, now), now)
            self._by_mapping[key] = binding
            self._by_port[binding.outside_port] = binding
        binding.refreshed_at = now
        binding.peers.add(destination)
        return Address(self.public_ip, binding.outside_port)

    def inbound(self, source: Address, port: int, now: int) -> Address | None:
        """The inside destination of a packet to a public port; None where it is filtered."""
        binding = self._by_port.get(port)
        if binding is None or self._expired(binding, now):
            return None
        filtering = self.behaviour.filtering
        wanted = _part(source, filtering)
        if not any(_part(peer, filtering) == wanted for peer in binding.peers):
            return None
        return binding.inside

    def flush(self) -> None:
        """Forget every binding, as a reboot does."""
        self._by_mapping.clear()
        self._by_port.clear()

    def statistics(self) -> dict[str, int]:
        return {"bindings": len(self._by_port)}

    def _expired(self, binding: _Binding, now: int) -> bool:
        return now - binding.refreshed_at > self.behaviour.timeout_ns

    def _free_port(self, wanted: int, now: int) -> int:
        port = wanted if self.behaviour.preserves_port else self._random_port()
        for _ in range(PORTS):
            holder = self._by_port.get(port)
            if holder is None or self._expired(holder, now):
                return port
            port = self._random_port()
        raise RuntimeError(f"every port of {self.public_ip} is bound")

    def _random_port(self) -> int:
        return FIRST_PORT + self._randomness.integer(PORTS)


def _part(address: Address, behaviour: Behaviour) -> object:
    if behaviour == "endpoint_independent":
        return None
    return address.host if behaviour == "address_dependent" else address
