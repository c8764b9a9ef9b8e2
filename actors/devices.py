"""The devices of an account as enrolment asks for them: by key, by principal, and by address.

A join asks for each of these once, and an account may have tens of thousands of devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Literal
from uuid import UUID

from actors.model import Change, Client, Gateway
from actors.policy.engine import Snapshot

DeviceKind = Literal["client", "gateway"]


class Devices:
    """Follows the changes that its snapshot follows. Keys are unique among the devices of a kind,
    addresses among all (the store sees to that)."""

    def __init__(self, devices: Iterable[Client | Gateway] = ()) -> None:
        self._by_key: dict[tuple[DeviceKind, bytes], UUID] = {}
        self._clients_by_principal: Counter[UUID] = Counter()
        self._by_address: dict[IPv4Address | IPv6Address, UUID] = {}
        for device in devices:
            self._add(device)

    @classmethod
    def of(cls, snapshot: Snapshot) -> Devices:
        return cls((*snapshot.clients.values(), *snapshot.gateways.values()))

    def follow(self, change: Change) -> None:
        """Carry out one change, of whatever kind; each once, and in order."""
        if isinstance(change.before, Client | Gateway):
            self._remove(change.before)
        if isinstance(change.after, Client | Gateway):
            self._add(change.after)

    def by_key(self, kind: DeviceKind, key: bytes) -> UUID | None:
        """The device of this key."""
        return self._by_key.get((kind, key))

    def clients_of(self, principal_id: UUID) -> int:
        """How many clients a principal has."""
        return self._clients_by_principal[principal_id]

    def __contains__(self, address: IPv4Address | IPv6Address) -> bool:
        """Whether a tunnel address is taken."""
        return address in self._by_address

    # --- helpers -------------------------------------------------------------------------------

    def _add(self, device: Client | Gateway) -> None:
        self._by_key[_key(device)] = device.id
        for address in (device.ipv4, device.ipv6):
            self._by_address[address] = device.id
        if isinstance(device, Client):
            self._clients_by_principal[device.principal_id] += 1

    def _remove(self, device: Client | Gateway) -> None:
        """Another device may have got its address, or its key, before this is known."""
        if self._by_key.get(_key(device)) == device.id:
            del self._by_key[_key(device)]
        for address in (device.ipv4, device.ipv6):
            if self._by_address.get(address) == device.id:
                del self._by_address[address]
        if isinstance(device, Client):
            self._clients_by_principal[device.principal_id] -= 1
            if not self._clients_by_principal[device.principal_id]:
                del self._clients_by_principal[device.principal_id]


def _key(device: Client | Gateway) -> tuple[DeviceKind, bytes]:
    return ("client" if isinstance(device, Client) else "gateway", device.device_key)
