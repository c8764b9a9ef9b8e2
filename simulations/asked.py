"""Who asks for what in a scenario: pairs by its traffic, and those that its checks need.

The same for a run in virtual time and on the kernel. `visible` gives the resources that a client
may see at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from simulations.scenario.schema import Scenario, Traffic

CHECK_EVERY_NS: Final = 10**9
"""So often a pair is asked for that a check names and no traffic touches."""
CHECK_BYTES: Final = 64
PROBED: Final = ("reach", "denied", "cut", "recovered", "uninterrupted")

Names = tuple[str, str]
"""Of a client and a resource."""


def asked_by(
    traffic: Traffic, scenario: Scenario, visible: Callable[[str], Sequence[str]]
) -> list[Names]:
    """Whom one table of traffic has ask for what."""
    clients = traffic.source or [client.name for client in scenario.clients]
    return [
        (client, resource) for client in clients for resource in traffic.to or visible(client)
    ]  # fmt: skip


def probed_by(scenario: Scenario, visible: Callable[[str], Sequence[str]]) -> list[Names]:
    """What checks name and no traffic touches, so that there is something to judge."""
    touched = {
        (client, resource)
        for traffic in scenario.traffic
        for client in traffic.source or [each.name for each in scenario.clients]
        for resource in traffic.to
    }
    everything = any(not each.to for each in scenario.traffic)
    wanted = {
        (client, resource): None
        for check in scenario.checks
        if check.kind in PROBED
        for client in check.source
        for resource in check.to
        if (client, resource) not in touched
    }
    return [
        (client, resource)
        for client, resource in wanted
        if not (everything and resource in visible(client))
    ]
