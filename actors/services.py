"""What the actors of the control plane are given: seams, limits, and the way to an account."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import attrs

from actors.policy.conditions import NOWHERE, Regions
from actors.store.interface import Store
from channel.messages import DoorAddress, SocketAddress
from channel.versions import SPOKEN, Spoken
from runtime.clock import Clock
from runtime.cluster.keyed import KeyedActors
from runtime.cluster.tenure import Tenure
from runtime.randomness import Randomness

_S = 10**9


@attrs.frozen(kw_only=True)
class Limits:
    """Named bounds of one portal. Rates are token buckets: `burst` at once, `per_s` on average."""

    admissions: int = 1_000
    """Connections that are in the midst of joining; above it newcomers are told to come later."""
    join_deadline_ns: int = 10 * _S
    held_deadline_ns: int = 30 * _S
    """For the rest of what an agent holds, if its join could not say it all."""
    probe_ns: int = 2 * _S + _S // 2
    """How long the older connection of a gateway has to answer before a newer one is taken."""
    clients_online: int = 50_000
    """Per account."""
    gateways_online: int = 5_000
    """Per account."""
    devices: int = 200_000
    """Rows of clients and gateways per account."""
    clients_per_principal: int = 1_000
    idle_account_ns: int = 600 * _S
    """How long an account's actor stays when nobody is connected to it."""
    authorizations_per_client: int = 1_000
    pending_requests: int = 32
    """Requests of one client that wait for a gateway."""
    requests_per_s: int = 20
    requests_burst: int = 100
    candidates_per_s: int = 100
    candidates_burst: int = 500
    flow_logs_per_s: int = 5
    flow_logs_burst: int = 50
    """Messages of a client; a gateway has ten times as many, as of candidates."""
    posture_interval_ns: int = 10 * _S
    """The least time between two reports of a client that are heeded; the later one then is."""
    gateway_answer_ns: int = 1 * _S
    gateway_last_answer_ns: int = 4 * _S
    """For all that were silent, when no other is left."""
    """How long a gateway may take to acknowledge before the next one is asked."""
    request_deadline_ns: int = 15 * _S
    relays_per_agent: int = 2
    relay_credentials_ns: int = 37 * 3600 * _S
    """Life of TURN credentials: the longest lease (24 h), and the time until they are renewed."""
    relay_renewal_ns: int = 12 * 3600 * _S
    relay_token_check_ns: int = 60 * _S
    """How often a connected relay's token is looked at; a portal that deletes one does so at once.
    """


@attrs.frozen(kw_only=True)
class Services:
    """`tenure` is the node's, `accounts` the way to the actor of any account, wherever it lives;
    `prove_address` says whether a relay answers at an address that it announced.

    `doors` are the channel listeners of all nodes that take agents now, as far as this node knows;
    agents are told no more than MAX_DOORS of them, and of none at all nothing. They are looked at
    when the roster changes (`runtime.cluster.tenure`). `regions` says in which country an address
    is, `spoken` which versions of the protocol agents may speak.
    """

    store: Store
    clock: Clock
    randomness: Randomness
    portal_name: str
    tenure: Tenure
    accounts: KeyedActors
    prove_address: Callable[[SocketAddress, tuple[str, ...]], Awaitable[bool]]
    limits: Limits = Limits()
    doors: Callable[[], tuple[DoorAddress, ...]] = tuple
    regions: Regions = NOWHERE
    spoken: Spoken = SPOKEN

    def door_of(self, node: str, now_ns: int) -> DoorAddress | None:
        """The door of another node that lives and takes agents, unless it is that of this node too.
        None also where this node cannot know: its own lease has ended."""
        row, own = self.tenure.row(node), self.tenure.row(self.tenure.node)
        if row is None or row.draining or not self.tenure.holds(now_ns):
            return None
        if own is not None and own.door_address == row.door_address:
            return None
        with suppress(ValueError):
            return DoorAddress(row.door_address)
        return None


class Bucket:
    """A token bucket (rate limit): `take` is False when it is empty."""

    __slots__ = ("_burst", "_filled_ns", "_level", "_per_s")

    def __init__(self, per_s: int, burst: int, now_ns: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._level = float(burst)
        self._filled_ns = now_ns

    def take(self, now_ns: int) -> bool:
        """Take one, if there is one."""
        self._level += (now_ns - self._filled_ns) / _S * self._per_s
        self._level = min(self._level, self._burst)
        self._filled_ns = now_ns
        if self._level < 1:
            return False
        self._level -= 1
        return True
