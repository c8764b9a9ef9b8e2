"""The resources that a client may ask for: which one a packet means, and what is to be routed."""

from __future__ import annotations

from uuid import UUID

from channel.filters import PacketFilter, compile_filters
from channel.messages import Resource
from channel.prefixes import PrefixTable
from tunnel.packet import Header
from tunnel.resources import Network, is_forbidden, networks_of


class ResourceTable:
    """Resources by id and by network. Where two contain an address, the more specific decides."""

    def __init__(self) -> None:
        self._resources: dict[UUID, tuple[Resource, PacketFilter]] = {}
        self._ids_by_network: PrefixTable[tuple[UUID, ...]] = PrefixTable()

    def upsert(self, resource: Resource) -> PacketFilter | None:
        """Add or change a resource; its new filters if they differ from those it had."""
        older = self._resources.get(resource.id)
        allowed = compile_filters(resource.filters)
        self._resources[resource.id] = (resource, allowed)
        if older is not None and _networks(older[0]) != _networks(resource):
            self._leave_networks(older[0])
        if older is None or _networks(older[0]) != _networks(resource):
            for network in _networks(resource):
                ids = self._ids_by_network.get(network) or ()
                self._ids_by_network.insert(network, (*ids, resource.id))
        return allowed if older is not None and older[1] != allowed else None

    def remove(self, resource_id: UUID) -> bool:
        """Take a resource out; False if it was not in."""
        entry = self._resources.pop(resource_id, None)
        if entry is None:
            return False
        self._leave_networks(entry[0])
        return True

    def permitting(self, header: Header) -> UUID | None:
        """The resource that a packet is for, if its filters allow it."""
        for resource_id in self._ids_by_network.lookup(header.destination) or ():
            if self._resources[resource_id][1].allows(header.protocol, header.destination_port):
                return resource_id
        return None

    def networks(self) -> frozenset[Network]:
        """What is to be routed into the tunnel."""
        return frozenset(network for network, _ in self._ids_by_network.items())

    def name_of(self, resource_id: UUID) -> str:
        """Its name, empty if it is not known (any more)."""
        entry = self._resources.get(resource_id)
        return "" if entry is None else entry[0].name

    def all(self) -> list[Resource]:
        return [resource for resource, _ in self._resources.values()]

    def __contains__(self, resource_id: UUID) -> bool:
        return resource_id in self._resources

    def _leave_networks(self, resource: Resource) -> None:
        for network in _networks(resource):
            ids = self._ids_by_network.get(network) or ()
            left = tuple(other for other in ids if other != resource.id)
            if left:
                self._ids_by_network.insert(network, left)
            else:
                self._ids_by_network.remove(network)


def _networks(resource: Resource) -> tuple[Network, ...]:
    """What is routed for a resource. A portal that names loopback, link-local addresses or
    everything as a network gets no route for it."""
    return tuple(network for network in networks_of(resource) if not is_forbidden(network))
