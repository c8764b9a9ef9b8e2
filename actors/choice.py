"""Which gateway is asked to carry an access. A function of what is known, and of one draw."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from uuid import UUID

import attrs

from runtime.randomness import Randomness


@attrs.frozen(kw_only=True)
class Choosable:
    """An approved gateway of the resource's sites that is online, and carries such a resource.

    `load` counts connections. `suspect`: it just left another request without an answer. `near`:
    it is known to be in the client's country.
    """

    gateway_id: UUID
    load: int
    suspect: bool = False
    near: bool = False


def choose_gateway(
    gateways: Iterable[Choosable],
    *,
    connected: Collection[UUID],
    failed: Collection[UUID],
    randomness: Randomness,
) -> UUID | None:
    """The gateway to ask, or None if there is none.

    Those that the client failed to reach (or that are suspect) come last, those that it is
    connected to first; then the near ones; then the least loaded; between equals the draw decides.
    """
    ranked: dict[tuple[bool, bool, bool, int], list[UUID]] = {}
    for each in gateways:
        id = each.gateway_id
        rank = (id in failed or each.suspect, id not in connected, not each.near, each.load)
        ranked.setdefault(rank, []).append(id)
    if not ranked:
        return None
    best = sorted(ranked[min(ranked)])
    return best[randomness.integer(len(best))]
