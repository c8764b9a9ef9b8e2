"""Which fields each kind of fault and check takes and needs. The docs are made from this table."""

from __future__ import annotations

from typing import Any, Final

import attrs

from simulations.scenario.schema import Check, Fault

HOSTS: Final = ("portal", "relay", "gateway", "client", "service", "population")
NODES: Final = ("portal", "relay")
NETWORKS: Final = ("network",)
POPULATION_TARGETS: Final = frozenset({"client", "user"})


@attrs.frozen
class Kind:
    """`needs`: fields that have to be there; `takes`: that may; `targets`: what those name."""

    text: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({"kind", "at", *self.needs, *self.takes})


FAULTS: Final[dict[str, Kind]] = {
    "crash": Kind(
        "Hosts die at once; with `duration` they are started anew after that time.",
        ("targets",), ("duration",), HOSTS,
    ),
    "restart": Kind(
        "Hosts end in good order and start anew, after `duration` or half a second.",
        ("targets",), ("duration",), HOSTS,
    ),
    "start": Kind(
        "Hosts start that were crashed, or have `starts = false`.", ("targets",), (), HOSTS
    ),
    "pause": Kind(
        "Hosts stand still, as by SIGSTOP, and go on.", ("targets", "duration"), (), HOSTS
    ),
    "partition": Kind(
        "No packet passes between `targets` and `others` (all others if empty), both ways.",
        ("targets",), ("others", "duration"), (*HOSTS, *NETWORKS),
    ),
    "link": Kind(
        "The uplinks of networks have `quality` in place of their own.",
        ("targets", "quality"), ("duration",), NETWORKS,
    ),
    "block_udp": Kind(
        "The firewalls of networks drop UDP to the outside.", ("targets",), ("duration",), NETWORKS
    ),
    "rebind": Kind(
        "NATs forget all bindings; with `renumber` they have another public address.",
        ("targets",), ("renumber",), NETWORKS,
    ),
    "roam": Kind(
        "Hosts move to the network `to`, and with `duration` back.",
        ("targets", "to"), ("duration",), HOSTS,
    ),
    "clock_skew": Kind(
        "The wall clocks of hosts are off by `offset`, and run by `drift_ppm` too fast.",
        ("targets",), ("offset", "drift_ppm", "duration"), HOSTS,
    ),
    "drain": Kind(
        "Portals or relays leave in good order; with `duration` they come back.",
        ("targets",), ("duration",), NODES,
    ),
    "database": Kind(
        "The database is away; with `slow` its answers take that long instead.",
        (), ("duration", "slow"),
    ),
    "upgrade": Kind(
        "Hosts are restarted one after the other, one in each `every`.",
        ("targets",), ("every",), HOSTS,
    ),
    "reconnect": Kind(
        "The control channels of agents end at once (a thundering herd).", ("targets",), (), HOSTS
    ),
    "change": Kind("An admin changes something.", ("change", "subject")),
    "shrink_directory": Kind(
        "So large a share of the users vanishes at once, as by a broken directory.", ("share",)
    ),
}  # fmt: skip

SUBJECTS: Final[dict[str, tuple[str, ...]]] = {
    "add_policy": ("policy",),
    "remove_policy": ("policy",),
    "disable_policy": ("policy",),
    "enable_policy": ("policy",),
    "add_membership": ("user", "group"),
    "remove_membership": ("user", "group"),
    "remove_user": ("user",),
    "disable_user": ("user",),
    "delete_token": ("client",),
    "remove_resource": ("resource",),
}

_PAIRS: Final = ("source", "to")

CHECKS: Final[dict[str, Kind]] = {
    "reach": Kind(
        "Pairs have the outcome `path` at the end; the first answer came within `within` of `at`.",
        (), (*_PAIRS, "path", "within"),
    ),
    "denied": Kind(
        "No packet passes from `at` to `until` (the end if there is none).", (), (*_PAIRS, "until")
    ),
    "cut": Kind("Nothing passes from `at` + `within` on.", ("within",), _PAIRS),
    "recovered": Kind(
        "After the fault at `at` traffic passes again within `within`.", ("within",), _PAIRS
    ),
    "uninterrupted": Kind(
        "No gap between answers from `at` to `until` is longer than `within`.",
        ("within",), (*_PAIRS, "until"),
    ),
    "online": Kind(
        "Hosts are online within `within` of `at`.", ("targets",), ("within",), (*HOSTS,)
    ),
    "share": Kind(
        "Of all pairs that may, at least `least` have an outcome in `paths`.",
        (), (*_PAIRS, "paths", "least"),
    ),
}  # fmt: skip


def default_of(entry: Fault | Check, name: str) -> Any:
    """The default of a field: NOTHING where there is none, so that nothing equals it."""
    return getattr(attrs.fields(type(entry)), name).default
