"""The scenario file, as it is written: one attrs class for each kind of table.

A file says where hosts stand and how their networks behave, who may reach what, what goes wrong
when, what traffic there is, and what must hold in the end. `load.py` reads one; quantities are text
with a unit (`units.py`); names refer to tables of the same file, which `load.py` checks. The same
file runs in virtual time, and (where `kernel.twin` can build it) on namespaces.

    format = 1
    name = "two homes"
    duration = "30s"

    [[networks]]
    name = "home"
    prefix = "192.168.1.0/24"
    nat = { mapping = "endpoint_independent", filtering = "address_and_port_dependent" }
    uplink = { latency = "10ms" }

    [[clients]]
    name = "laptop"
    network = "home"
    user = "grace"

Instants (`at`) count from the moment at which all agents that start at once are online, or from
`settle` after the start if that comes first.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import attrs
from msgspec import Meta

FORMAT: Final = 1
INTERNET: Final = "internet"
"""The network that is there without being named: the core, to which all others are attached."""

MAX_NETWORKS: Final = 10_000
MAX_HOSTS: Final = 20_000
MAX_FAULTS: Final = 10_000
MAX_CHECKS: Final = 10_000
MAX_FILE_BYTES: Final = 16 << 20

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Text = Annotated[str, Meta(max_length=1_000)]
Quantity = Annotated[str, Meta(max_length=32)]
Share = Annotated[str, Meta(max_length=32)] | float
Names = Annotated[tuple[Name, ...], Meta(max_length=MAX_HOSTS)]

Behaviour = Literal["endpoint_independent", "address_dependent", "address_and_port_dependent"]
PortAssignment = Literal["preserve", "random", "sequential", "range"]
Hairpinning = Literal["none", "internal_source", "external_source"]
UdpPolicy = Literal["pass", "drop", "reject"]
Change = Literal[
    "add_policy", "remove_policy", "disable_policy", "enable_policy", "remove_membership",
    "add_membership", "remove_user", "disable_user", "delete_token", "remove_resource",
]  # fmt: skip
FaultKind = Literal[
    "crash",        # targets: hosts. With `duration` they are started anew after that time
    "restart",      # targets: hosts. Ends them in good order and starts them anew
    "start",        # targets: hosts that were crashed, or have `starts = false`
    "pause",        # targets: hosts, as by SIGSTOP, for `duration`
    "partition",    # targets and others: hosts or networks that part for `duration`
    "link",         # targets: networks whose uplinks have `quality` for `duration`
    "block_udp",    # targets: networks whose firewall drops UDP to the outside for `duration`
    "rebind",       # targets: networks whose NAT forgets all bindings (`renumber`: other address)
    "roam",         # targets: hosts that move to the network `to`
    "clock_skew",   # targets: hosts whose wall clock is off by `offset` and runs by `drift_ppm`
    "drain",        # targets: portals or relays, in good order; with `duration` they come back
    "database",     # the database is away for `duration` (`slow`: answers take that long instead)
    "upgrade",      # targets: hosts that are restarted one after the other, `every` so often
    "reconnect",    # targets: hosts whose control channel ends at once (a thundering herd)
    "change",       # `change` with `subject` is made by an admin
    "shrink_directory",  # `share` of the users vanish at once, as by a broken directory
]  # fmt: skip
CheckKind = Literal[
    "reach",        # from, to: the outcome at the end (or at `at`) is `path`, first within `within`
    "denied",       # from, to: no packet passes between `at` and the end (or `until`)
    "cut",          # from, to: nothing passes from `at` + `within` on
    "recovered",    # from, to: after the fault at `at`, traffic passes again within `within`
    "uninterrupted",  # from, to: between `at` and `until`, no gap longer than `within`
    "online",       # target: is online within `within` of `at`
    "share",        # of all pairs that may, at least `least` have an outcome in `paths`
]  # fmt: skip
Path = Literal["direct", "relayed", "any", "none"]


@attrs.frozen(kw_only=True)
class LinkQuality:
    """How a way behaves, in each direction. `loss` is a share of packets; `burst` the mean length
    of a burst of losses in packets (1: independent). `bandwidth` with a queue of `queue` bytes that
    drops at its tail; without one there is no limit."""

    latency: Quantity = "0ms"
    jitter: Quantity = "0ms"
    loss: Share = 0.0
    burst: Annotated[float, Meta(ge=1, le=1_000)] = 1.0
    duplication: Share = 0.0
    reordering: Share = 0.0
    corruption: Share = 0.0
    bandwidth: Quantity = ""
    queue: Quantity = "64KiB"
    mtu: Annotated[int, Meta(ge=1_280, le=65_535)] = 1_500


@attrs.frozen(kw_only=True)
class NatBehaviour:
    """A NAT in the terms of RFC 4787. `timeout` is without outbound traffic, unless
    `inbound_refresh`. `inbound_binding`: a packet from outside that finds no binding takes the
    place of one, as with Linux' masquerade. `reply_binding`: what goes to a peer leaves from where
    that peer came in, as with connection tracking. `addresses`: public ones, paired with inside
    hosts."""

    mapping: Behaviour = "endpoint_independent"
    filtering: Behaviour = "address_and_port_dependent"
    ports: PortAssignment = "preserve"
    hairpinning: Hairpinning = "none"
    timeout: Quantity = "30s"
    inbound_refresh: bool = False
    inbound_binding: bool = False
    reply_binding: bool = False
    addresses: Annotated[int, Meta(ge=1, le=64)] = 1


@attrs.frozen(kw_only=True)
class Firewall:
    """What a network lets out and in, stateful, beside its NAT. With `ipv6_inbound` unasked IPv6
    packets come in."""

    udp: UdpPolicy = "pass"
    udp_ports: Annotated[tuple[int, ...], Meta(max_length=64)] = ()
    """If any: only to these ports UDP goes out."""
    tcp_ports: Annotated[tuple[int, ...], Meta(max_length=64)] = ()
    ipv6_inbound: bool = False


@attrs.frozen(kw_only=True)
class Network:
    """A place with hosts, attached by its uplink to the network `behind` which it stands."""

    name: Name
    behind: Name = INTERNET
    prefix: Annotated[str, Meta(max_length=43)] = ""
    prefix6: Annotated[str, Meta(max_length=43)] = ""
    nat: NatBehaviour | None = None
    firewall: Firewall = Firewall()
    uplink: LinkQuality = LinkQuality(latency="10ms")
    lan: LinkQuality = LinkQuality()
    country: Annotated[str, Meta(pattern=r"^([A-Z]{2})?$")] = ""


@attrs.frozen(kw_only=True)
class Link:
    """A further way between two networks without a NAT between them."""

    between: tuple[Name, Name]
    quality: LinkQuality = LinkQuality(latency="10ms")


@attrs.frozen(kw_only=True)
class Portal:
    """A node of the control plane. All nodes of a file are one cluster."""

    name: Name
    network: Name = INTERNET
    starts: bool = True


@attrs.frozen(kw_only=True)
class Relay:
    name: Name
    network: Name = INTERNET
    region: Annotated[str, Meta(max_length=64)] = ""
    starts: bool = True
    hostile: Literal["", "drops", "corrupts", "duplicates", "redirects", "replays"] = ""


@attrs.frozen(kw_only=True)
class Gateway:
    name: Name
    network: Name
    site: Name
    starts: bool = True
    hostile: Literal["", "silent", "acknowledges_and_drops", "spoofs", "replays"] = ""


@attrs.frozen(kw_only=True)
class Client:
    name: Name
    network: Name
    user: Name
    starts: bool = True
    hostile: Literal[
        "", "spoofs", "trespasses", "floods", "replays", "stale_token", "forged_candidates", "scans"
    ] = ""


@attrs.frozen(kw_only=True)
class Service:
    """A server that echoes UDP datagrams, at an address of its network."""

    name: Name
    network: Name
    address: Annotated[str, Meta(max_length=39)] = ""


@attrs.frozen(kw_only=True)
class User:
    name: Name
    groups: Names = ()


@attrs.frozen(kw_only=True)
class Resource:
    """What is protected: an address, a prefix, or by `service` the address of that service."""

    name: Name
    sites: Names
    service: Name | Literal[""] = ""
    address: Annotated[str, Meta(max_length=43)] = ""
    filters: Annotated[tuple[dict[str, Any], ...], Meta(max_length=32)] = ()


@attrs.frozen(kw_only=True)
class Policy:
    """`conditions` as in the API (docs/policy.md). `disabled` ones are there to be enabled."""

    name: Name
    group: Name
    resource: Name
    conditions: dict[str, Any] = attrs.Factory(dict)
    lease: Quantity = ""
    expires_in: Quantity = ""
    disabled: bool = False


@attrs.frozen(kw_only=True)
class Account:
    """Who may reach what. `everyone` is the group of all users."""

    users: Annotated[tuple[User, ...], Meta(max_length=MAX_HOSTS)] = ()
    sites: Names = ()
    resources: Annotated[tuple[Resource, ...], Meta(max_length=10_000)] = ()
    policies: Annotated[tuple[Policy, ...], Meta(max_length=10_000)] = ()


@attrs.frozen(kw_only=True)
class Population:
    """So many clients more, each with a user in `groups` and a network drawn from a mix
    (`population.py`), named `<name>-<number>`. `stay`: which share moves about, by `roam` faults
    drawn for them."""

    name: Name
    count: Annotated[int, Meta(ge=1, le=MAX_HOSTS)]
    mix: Name = "general"
    groups: Names = ()
    roaming: Share = 0.0


@attrs.frozen(kw_only=True)
class Traffic:
    """Datagrams from clients to resources, each to be echoed. Empty `source`: of all clients,
    empty `to`: to all that they may reach. `every` after `at` until `until` (the end if empty)."""

    source: Names = ()
    to: Names = ()
    at: Quantity = "0s"
    until: Quantity = ""
    every: Quantity = "1s"
    size: Annotated[int, Meta(ge=16, le=1_200)] = 64


@attrs.frozen(kw_only=True)
class Fault:
    """Something that happens at `at`; what the fields mean is at `FaultKind`."""

    at: Quantity
    kind: FaultKind
    targets: Names = ()
    others: Names = ()
    to: Name | Literal[""] = ""
    duration: Quantity = ""
    """For how long; empty: for good (or there is no "how long" to it)."""
    quality: LinkQuality | None = None
    renumber: bool = False
    offset: Quantity = "0s"
    drift_ppm: Annotated[int, Meta(ge=-10_000, le=10_000)] = 0
    slow: Quantity = ""
    every: Quantity = "5s"
    change: Change | Literal[""] = ""
    subject: Names = ()
    """Names of what is changed: a policy; a user and a group; a user; a client, of whose user the
    token is; a resource."""
    share: Share = 0.0


@attrs.frozen(kw_only=True)
class Check:
    """Something that must hold; what the fields mean is at `CheckKind`. Empty `source` and `to`
    are all. A bound that is empty is not looked at."""

    kind: CheckKind
    source: Names = ()
    to: Names = ()
    targets: Names = ()
    path: Path = "any"
    at: Quantity = "0s"
    until: Quantity = ""
    within: Quantity = ""
    paths: Annotated[tuple[Path, ...], Meta(max_length=4)] = ("direct",)
    least: Share = 1.0


@attrs.frozen(kw_only=True)
class Chaos:
    """The budget of faults that are drawn from the seed, beside those of the file. Shares and rates
    of 0 mean: none of that kind. All end `heals` before the duration is over."""

    faults: Annotated[int, Meta(ge=0, le=1_000)] = 0
    kinds: Annotated[tuple[FaultKind, ...], Meta(max_length=32)] = ()
    """Empty: all that the topology permits."""
    longest: Quantity = "20s"
    at_once: Annotated[int, Meta(ge=1, le=100)] = 3
    heals: Quantity = "60s"
    worst_loss: Share = 0.2
    worst_latency: Quantity = "300ms"


@attrs.frozen(kw_only=True)
class Scenario:
    """One file. Checks of safety hold always and are not written down (`checks/safety.py`)."""

    format: Literal[1]
    name: Annotated[str, Meta(min_length=1, max_length=100)]
    description: Text = ""
    sources: Annotated[tuple[Text, ...], Meta(max_length=32)] = ()
    """Where figures in it come from."""
    duration: Quantity = "60s"
    settle: Quantity = "30s"
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    """That of a saved failure; a run may name another."""
    networks: Annotated[tuple[Network, ...], Meta(max_length=MAX_NETWORKS)] = ()
    links: Annotated[tuple[Link, ...], Meta(max_length=MAX_NETWORKS)] = ()
    portals: Annotated[tuple[Portal, ...], Meta(max_length=32)] = ()
    relays: Annotated[tuple[Relay, ...], Meta(max_length=256)] = ()
    gateways: Annotated[tuple[Gateway, ...], Meta(max_length=1_000)] = ()
    clients: Annotated[tuple[Client, ...], Meta(max_length=MAX_HOSTS)] = ()
    services: Annotated[tuple[Service, ...], Meta(max_length=1_000)] = ()
    account: Account = Account()
    populations: Annotated[tuple[Population, ...], Meta(max_length=32)] = ()
    traffic: Annotated[tuple[Traffic, ...], Meta(max_length=1_000)] = ()
    faults: Annotated[tuple[Fault, ...], Meta(max_length=MAX_FAULTS)] = ()
    checks: Annotated[tuple[Check, ...], Meta(max_length=MAX_CHECKS)] = ()
    chaos: Chaos | None = None

    @property
    def hosts(self) -> tuple[Portal | Relay | Gateway | Client | Service, ...]:
        """All hosts that the file names, in the order in which they are started."""
        return (*self.portals, *self.relays, *self.services, *self.gateways, *self.clients)
