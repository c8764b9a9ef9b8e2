"""Which relays an agent gets. A function of what is known, and of draws."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from ipaddress import ip_address, ip_network
from uuid import UUID

import attrs

from actors.model import Relay
from actors.policy.conditions import Regions
from runtime.randomness import Randomness

FULL = 1.0
"""The load at which a relay has no allocation left to give."""
_DOMAIN_PREFIX_LENGTH = {4: 24, 6: 64}
_COUNTRY = re.compile(r"[A-Za-z]{2}")


@attrs.frozen(kw_only=True)
class ChoosableRelay:
    """A relay that is online. `load` is from 0 to 1. `domain`: what fails together has the same.
    `near`: it is known to be in the agent's country."""

    relay_id: UUID
    load: float
    domain: str
    near: bool = False


def choose_relays(
    relays: Iterable[ChoosableRelay],
    *,
    count: int,
    current: Collection[UUID],
    randomness: Randomness,
) -> tuple[UUID, ...]:
    """The relays to use, `count` at most; fewer only if there are not so many.

    Those in use (`current`) stay, in their order. Then, one after the other: those that are full
    last; those of a failure domain that none of the chosen is in first; then the near ones; then
    the least loaded; between equals the draw decides.
    """
    by_id = {each.relay_id: each for each in relays}
    chosen = [by_id.pop(id) for id in current if id in by_id][:count]
    while by_id and len(chosen) < count:
        domains = {each.domain for each in chosen}
        ranked: dict[tuple[bool, bool, bool, float], list[UUID]] = {}
        for each in by_id.values():
            rank = (each.load >= FULL, each.domain in domains, not each.near, each.load)
            ranked.setdefault(rank, []).append(each.relay_id)
        best = sorted(ranked[min(ranked)])
        chosen.append(by_id.pop(best[randomness.integer(len(best))]))
    return tuple(each.relay_id for each in chosen)


def domain_of(relay: Relay) -> str:
    """What the relay announced as its failure domain; else its region; else the network (IPv4 /24,
    IPv6 /64) of its first address."""
    if relay.failure_domain or relay.region:
        return relay.failure_domain or relay.region
    if not relay.addresses:
        return str(relay.id)
    address = ip_address(relay.addresses[0].address)
    return str(ip_network((address, _DOMAIN_PREFIX_LENGTH[address.version]), strict=False))


def country_of(relay: Relay, regions: Regions) -> str | None:
    """The relay's region, if that is the code of a country (ISO 3166-1 alpha-2); else what the
    region database says of its first address."""
    if _COUNTRY.fullmatch(relay.region):
        return relay.region.upper()
    return regions.country(relay.addresses[0].address) if relay.addresses else None
