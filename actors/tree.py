"""The control plane as a tree of actors, and the door through which the portal reaches it.

    control plane (supervisor, one for one)
      relay directory
      logs          the clerk, which writes down who was connected, and what flowed
      couriers      carry orders to gateways for nodes that do not reach them
      accounts      one actor for each account that somebody is connected to (to whatever node) and
                    that lives on this node, started on demand: a keeper of keyed actors
      sessions      one actor for each connected client (its requests below it)
      gateways      one for each connected gateway
      relays        one for each connected relay
      admissions    one for each connection that is in the midst of joining

Those below the last five are temporary: what ends is not started again by its supervisor, but by
whoever needs it (an agent dials again, a session looks for its account), so no crash of one account
or agent ever reaches another.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from uuid import UUID

import attrs
import structlog

from actors.account import AccountActor
from actors.admission import Admission
from actors.attachment import Attachment, Channel, OwnedChannel
from actors.clerk import Clerk
from actors.courier import Couriers
from actors.enrolment import refusal
from actors.gateway import GatewayActor
from actors.messages import (
    ACCOUNT,
    CLERK,
    COURIERS,
    DIRECTORY,
    OWNERS,
    REGIONS,
    RELAY_OWNERS,
    CheckToken,
    End,
    RegionsChanged,
    Wake,
    account_name,
)
from actors.model import Client, Gateway
from actors.policy.conditions import NOWHERE, Regions
from actors.relay import RelayActor, RelayDirectory
from actors.services import Limits, Services
from actors.session import SessionActor
from actors.store.interface import Store
from channel.messages import Challenge, DoorAddress, IpText, Join, RelayJoin, SocketAddress
from channel.versions import SPOKEN, Spoken
from runtime.actor import Actor, ActorError, ActorRef, Dead
from runtime.clock import Clock
from runtime.cluster.keyed import Keeper, KeyedActors, keeper_name
from runtime.cluster.tenure import Tenure
from runtime.randomness import Randomness
from runtime.scheduler import Scheduler
from runtime.supervisor import ChildSpec, DynamicSupervisor, Restart, Supervisor

MAX_ACCOUNTS = 100_000
MAX_AGENTS = 500_000
MAX_CLERKS = 1_000_000
"""Restarts of the clerk in a supervisor's period: more than can be."""

_log = structlog.get_logger("holloway.tree")


@attrs.frozen(kw_only=True)
class ControlPlaneStatistics:
    """Actors now, and connections refused since the start."""

    accounts: int
    sessions: int
    gateways: int
    relays: int
    admissions: int
    refused: int


class ControlPlane:
    """All actors of the control plane on one scheduler.

    `prove_address` is asked, as an effect, whether a relay answers at an address; `tenure` is that
    of this node in its cluster (see `runtime.cluster.node`, which must run on the same scheduler).
    `doors` are the addresses of all nodes that take agents now, `regions` the countries of
    addresses, `spoken` the versions of the protocol. Methods are to be called where the scheduler
    runs.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        store: Store,
        clock: Clock,
        randomness: Randomness,
        *,
        portal_name: str,
        prove_address: Callable[[SocketAddress, tuple[str, ...]], Awaitable[bool]],
        tenure: Tenure,
        limits: Limits | None = None,
        doors: Callable[[], tuple[DoorAddress, ...]] = tuple,
        regions: Regions = NOWHERE,
        spoken: Spoken = SPOKEN,
    ) -> None:
        self._scheduler = scheduler
        self._services = Services(
            store=store,
            clock=clock,
            randomness=randomness,
            portal_name=portal_name,
            tenure=tenure,
            accounts=KeyedActors(ACCOUNT, tenure),
            prove_address=prove_address,
            limits=limits or Limits(),
            doors=doors,
            regions=regions,
            spoken=spoken,
        )
        self._houses: dict[str, DynamicSupervisor] = {}
        self._serial = count(1)
        self._root: ActorRef | None = None
        self._is_draining = False
        self._refused = 0

    # --- for the portal ------------------------------------------------------------------------

    def start(self) -> ActorRef:
        """Spawn the tree; its children come up in the scheduler's first run."""
        limits = self._services.limits
        sizes = {
            "sessions": MAX_AGENTS,
            "gateways": MAX_AGENTS,
            "relays": MAX_AGENTS,
            "admissions": limits.admissions,
        }
        specs = [
            ChildSpec(id=DIRECTORY, factory=lambda: RelayDirectory(self._services), name=DIRECTORY),
            ChildSpec(id="logs", factory=self._make_logs),
            ChildSpec(id=COURIERS, factory=Couriers, name=COURIERS),
            ChildSpec(id="accounts", factory=self._make_keeper, name=keeper_name(ACCOUNT)),
        ]
        specs += [
            ChildSpec(id=name, factory=self._house_factory(name, size))
            for name, size in sizes.items()
        ]
        self._root = self._scheduler.spawn(Supervisor(specs), label="control plane")
        return self._root

    def connected(self, channel: Channel, challenge: Challenge) -> Attachment:
        """A channel stands and its challenge was sent: an admission takes it from here."""
        attachment = OwnedChannel(self._scheduler, channel)
        try:
            admission = Admission(self._services, self, channel, attachment, challenge)
            attachment.own(self._house("admissions", admission))
        except ActorError as error:
            self._refused += 1
            reason = "draining" if self._is_draining else "limits_exceeded"
            _log.warning("connection_refused", code=reason, cause=type(error).__name__)
            channel.close(
                refusal(
                    "draining" if self._is_draining else "limits_exceeded",
                    randomness=self._services.randomness,
                )
            )
        return attachment

    def wake(self, account_id: UUID) -> None:
        """The account changed, or may have. Nothing happens if nobody is connected to it."""
        ref = self._scheduler.registry.whereis(account_name(account_id))
        if ref is not None:
            self._scheduler.cast(ref, Wake(self._scheduler.clock.monotonic_ns()))

    def wake_relays(self) -> None:
        """A token of relays was deleted: on all nodes they are asked for theirs."""
        self._scheduler.broadcast(RELAY_OWNERS, CheckToken())

    def regions_changed(self) -> bool:
        """The regions answer from another database now: accesses that depend on them are decided
        anew. False if an account was too busy to hear it; then to be called again."""
        pubsub = self._scheduler.pubsub
        subscribers = len(pubsub.subscribers(REGIONS))
        return pubsub.publish(REGIONS, RegionsChanged()) >= subscribers

    @property
    def accounts(self) -> KeyedActors:
        """The way to the actors of accounts."""
        return self._services.accounts

    @property
    def relay_directory(self) -> ActorRef | None:
        """Who knows the relays (`ListRelays`)."""
        return self._scheduler.registry.whereis(DIRECTORY)

    def drain(self, spread_ns: int = 0) -> None:
        """Refuse newcomers, and send everybody away, spread over `spread_ns`.

        Each leaves at a random time of it, so that the other nodes do not get all of them in one
        instant. Where there is no other, all leave at once, and come back at a random time of it.
        To be called when `doors` no longer has this node.
        """
        self._is_draining = True
        randomness, goes_elsewhere = self._services.randomness, bool(self._services.doors())
        for ref in self._scheduler.pubsub.subscribers(OWNERS):
            goodbye, delay_ns = refusal("draining", randomness=randomness), 0
            if spread_ns:
                delay_ns = randomness.integer(spread_ns)
            if delay_ns and not goes_elsewhere:
                goodbye, delay_ns = attrs.evolve(goodbye, retry_after_ns=delay_ns), 0
            self._scheduler.cast(ref, End(goodbye, delay_ns))

    def tree(self) -> str:
        """Every actor on a line."""
        return self._scheduler.tree()

    def statistics(self) -> ControlPlaneStatistics:
        alive = {name: house.statistics().alive for name, house in self._houses.items()}
        return ControlPlaneStatistics(
            accounts=alive.get("accounts", 0),
            sessions=alive.get("sessions", 0),
            gateways=alive.get("gateways", 0),
            relays=alive.get("relays", 0),
            admissions=alive.get("admissions", 0),
            refused=self._refused,
        )

    # --- for admissions ------------------------------------------------------------------------

    def house_client(
        self, channel: Channel, device: Client, token_id: UUID, join: Join, remote: IpText
    ) -> ActorRef:
        """Start the session of a client that was admitted."""
        session = SessionActor(
            self._services, channel, device=device, token_id=token_id, join=join, remote=remote
        )
        return self._house("sessions", session)

    def house_gateway(
        self, channel: Channel, device: Gateway, token_id: UUID, join: Join, remote: IpText
    ) -> ActorRef:
        """Start the actor of a gateway that was admitted."""
        gateway = GatewayActor(
            self._services, channel, device=device, token_id=token_id, join=join, remote=remote
        )
        return self._house("gateways", gateway)

    def house_relay(self, channel: Channel, token_id: UUID, join: RelayJoin) -> ActorRef:
        """Start the actor of a relay that was admitted."""
        relay = RelayActor(
            self._services,
            channel,
            token_id=token_id,
            join=join,
        )
        return self._house("relays", relay)

    # --- helpers -------------------------------------------------------------------------------

    def _make_logs(self) -> Supervisor:
        """However often the clerk fails, nothing else does for it."""
        clerk = ChildSpec(id=CLERK, factory=lambda: Clerk(self._services.store), name=CLERK)
        return Supervisor([clerk], intensity=MAX_CLERKS)

    def _make_keeper(self) -> Keeper:
        services = self._services
        self._houses["accounts"] = keeper = Keeper(
            ACCOUNT,
            services.tenure,
            services.store,
            partial(AccountActor, services),
            limit=MAX_ACCOUNTS,
        )
        return keeper

    def _house_factory(self, name: str, limit: int) -> Callable[[], Actor]:
        def make() -> Actor:
            self._houses[name] = DynamicSupervisor(limit=limit)
            return self._houses[name]

        return make

    def _house(self, house: str, actor: Actor) -> ActorRef:
        supervisor = self._houses.get(house)
        if self._is_draining:
            raise Dead(house, "draining")
        if supervisor is None or not hasattr(supervisor, "context"):
            raise Dead(house, "not started")
        spec = ChildSpec(
            id=f"{house[:-1]}-{next(self._serial)}",
            factory=lambda: actor,
            restart=Restart.TEMPORARY,
        )
        return supervisor.start_child(spec)
