"""What a run tells whoever watches it: the contract between `run.py` and the checks of safety.

A monitor is an `Observer` that overrides what it wants to hear; what nobody overrides costs nothing
(`hears`). Nothing here may change the run: an observer draws no randomness of the world, sends
nothing and keeps what it wants to say in `violations`. Instants are nanoseconds of the world
(monotonic), the same for all hosts, whatever their own clocks say.

The order in which one access is seen: `authorization_written` (the store has it), `told` (the
gateway's owner sends `Authorize`), `heard` (the gateway), `granted`, then `forwarded` for each
packet; and at its end `authorization_written` again, with `ended_at`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs

from runtime.net.address import Address
from simulations.result import Violation

if TYPE_CHECKING:
    from actors.model import Authorization, Change
    from simulations.scenario.schema import Scenario


@attrs.frozen(kw_only=True)
class Subject:
    """Who an entity of the account is in the file; told as soon as it is known (`introduced`).
    For agents `addresses` are the packed tunnel addresses, for resources those of the resource."""

    kind: str
    """`client`, `gateway`, `resource`, `user`, `policy`, `group`, `site`, `account`."""
    name: str
    id: UUID
    addresses: tuple[bytes, ...] = ()


class Observer:
    """Hears of everything, and does nothing with it."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def broken(self, at_ns: int, rule: str, detail: str) -> None:
        """Note that something happened that must never."""
        self.violations.append(Violation(at_ns=at_ns, rule=rule, detail=detail))

    # --- the run ---------------------------------------------------------------------------------

    def began(self, now: int, scenario: Scenario, seed: int, hostile: frozenset[str]) -> None:
        """The world stands, and nothing has happened yet. `hostile`: hosts that do not keep to the
        rules, so that nothing is to be expected of them."""

    def introduced(self, now: int, subject: Subject) -> None:
        """Who somebody is. Again, if the addresses have changed."""

    def fault(self, now: int, kind: str, targets: tuple[str, ...], text: str) -> None:
        """A fault of the file, or of chaos, strikes now."""

    def ended(self, now: int) -> None:
        """The run is over: the last call."""

    # --- packets ---------------------------------------------------------------------------------

    def datagram(
        self, now: int, event: str, hop: str, source: Address, destination: Address, data: bytes
    ) -> None:
        """A UDP datagram at one hop of its way (a host, or a network's router). `event` is
        `sent` (by a host), `translated`, `delivered` (to a host) or `dropped`. Left out is what a
        gateway and the services of its network say to each other, outside of every tunnel."""

    def asked(self, now: int, client: str, resource: str, packet: bytes) -> None:
        """An application on a client sends this inner packet to a resource."""

    def answered(self, now: int, client: str, packet: bytes) -> None:
        """A client's TUN device gives out an inner packet."""

    def forwarded(self, now: int, gateway: str, client: str, packet: bytes) -> None:
        """A gateway gives an inner packet to its network. `client` is whose tunnel it came by, by
        the gateway's own knowledge (proved by the tunnel's key), whatever the packet says."""

    def returned(self, now: int, gateway: str, packet: bytes) -> None:
        """A gateway takes an inner packet from its network, for a client."""

    # --- access ----------------------------------------------------------------------------------

    def changed(self, now: int, changes: tuple[Change, ...]) -> None:
        """A transaction on the account is durable (policies, members, tokens, devices...)."""

    def authorization_written(
        self, now: int, node: str, authorization: Authorization, epoch: int
    ) -> None:
        """The store took an authorisation: new, renewed, or ended (`ended_at`), under an epoch."""

    def granted(
        self, now: int, gateway: str, client: str, authorization_id: UUID, resource_id: UUID
    ) -> None:
        """A gateway's agent took an authorisation."""

    # --- the cluster -----------------------------------------------------------------------------

    def node_joined(self, now: int, node: str, incarnation: int) -> None:
        """A portal node began a life: all that it was before is over."""

    def owner_claimed(
        self, now: int, node: str, incarnation: int, account_id: UUID, epoch: int
    ) -> None:
        """The store made a node the owner of the account."""

    def owner_released(self, now: int, node: str, account_id: UUID) -> None:
        """A node gave the account up in good order."""

    def told(self, now: int, node: str, agent: str, message: object, epoch: int | None) -> None:
        """A node sends a message on the channel of an agent."""

    def heard(self, now: int, agent: str, message: object, epoch: int | None) -> None:
        """An agent takes a message of the portal (those of former owners it does not)."""

    # --- cryptography ----------------------------------------------------------------------------

    def sealed(self, now: int, host: str, key: bytes, counter: int, datagram: bytes) -> None:
        """An agent's engine gives out a WireGuard transport message. `key` stands for the sending
        key: the receiver's index, which is another one in each session of the pair."""


def hears(observers: Iterable[Observer], callback: str) -> tuple[Any, ...]:
    """The bound callbacks of this name of all observers that override it."""
    base = getattr(Observer, callback)
    return tuple(
        getattr(observer, callback)
        for observer in observers
        if getattr(type(observer), callback) is not base
    )
