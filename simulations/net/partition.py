"""A cut between two sides of a world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulations.net.host import Host
    from simulations.net.routing import Network


class Partition:
    """Made by `World.partition`."""

    def __init__(
        self,
        among: list[Partition],
        a: Sequence[Host | Network],
        b: Sequence[Host | Network],
        *,
        one_way: bool,
    ) -> None:
        self._among = among
        self._a = frozenset(a)
        self._b = frozenset(b)
        self._one_way = one_way

    def heal(self) -> None:
        """End it. Nothing happens the second time."""
        if self in self._among:
            self._among.remove(self)

    def keeps(self, origin: Host, place: Host | Network) -> bool:
        """Whether what a host sent is kept from entering a host or network."""
        if place in self._b and _is_in(origin, self._a):
            return True
        return not self._one_way and place in self._a and _is_in(origin, self._b)


def _is_in(host: Host, side: frozenset[Host | Network]) -> bool:
    if host in side:
        return True
    network: Network | None = host.network
    while network is not None:
        if network in side:
            return True
        network = network.parent
    return False
