"""What runs on a scheduler that belongs to a cluster, whoever hosts it: the way to other nodes, who
is present where, and the node's membership. No socket here: `runtime.cluster.process` has those,
`runtime.cluster.testing` has a cluster in virtual time.

    cluster (supervisor, one for one)
      presence      who is present where (runtime.presence.tracker)
      member        the node's lease, and who lives (runtime.cluster.member)
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import attrs

from runtime.actor import ActorRef
from runtime.cluster.frames import MessageCodec
from runtime.cluster.leases import MAX_NODE_LEASE_NS, LeaseStore
from runtime.cluster.link import Unreachable
from runtime.cluster.member import (
    MEMBER,
    Identity,
    LeaseSettings,
    LinkFound,
    LinkLost,
    Member,
    Refuses,
)
from runtime.cluster.remote import RemoteActors
from runtime.cluster.tenure import Tenure
from runtime.presence.crdt import Replica
from runtime.presence.tracker import (
    PEER_MESSAGES,
    FromNode,
    NodeLost,
    PeerMessage,
    Tracker,
    TrackerSettings,
    lives_of,
)
from runtime.scheduler import Scheduler
from runtime.supervisor import ChildSpec, Supervisor

TRACKER: Final = "presence"
"""The registered name of a node's tracker."""


@attrs.frozen(kw_only=True)
class ClusterSettings:
    """All durations of a node's membership."""

    lease: LeaseSettings = LeaseSettings()
    presence: TrackerSettings = TrackerSettings()


class _NodeTracker(Tracker):
    """A tracker whose messages go straight to the other nodes."""

    def __init__(self, replica: Replica, remote: RemoteActors, settings: TrackerSettings) -> None:
        super().__init__(replica, settings)
        self._remote = remote

    def carry(self, to: str | None, message: PeerMessage) -> None:
        for node in self._remote.nodes() if to is None else (to,):
            self._remote.tell(node, message)


class ClusterNode:
    """A node's part in the cluster. `refuses` examines a node whose link was lost (see `Member`);
    `incarnation` (of the process) is the one with which the scheduler was made."""

    def __init__(
        self,
        scheduler: Scheduler,
        remote: RemoteActors,
        tenure: Tenure,
        store: LeaseStore,
        identity: Identity,
        refuses: Refuses,
        *,
        incarnation: int,
        settings: ClusterSettings | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.remote = remote
        self.tenure = tenure
        self.store = store
        self._settings = settings or ClusterSettings()
        self._lives = lives_of(scheduler.node, incarnation)
        self._identity = identity
        self._refuses = refuses
        for message_type in PEER_MESSAGES:
            remote.serve(message_type, self._hear_presence)

    def start(self) -> ActorRef:
        """Spawn the tree."""
        specs = [
            ChildSpec(id="presence", factory=self._tracker, name=TRACKER),
            ChildSpec(id="member", factory=self._member, name=MEMBER),
        ]
        return self.scheduler.spawn(Supervisor(specs), label="cluster")

    @property
    def member(self) -> ActorRef | None:
        """Who renews the lease (`BeginDraining`, `Leave`, `AskMember`)."""
        return self.scheduler.registry.whereis(MEMBER)

    def link_changed(self, node: str, is_up: bool) -> None:
        """The link to a node stands now, or is lost."""
        if is_up:
            self.remote.node_up(node)
            self._tell(MEMBER, LinkFound(node))
            return
        self.remote.node_down(node)
        self._tell(TRACKER, NodeLost(node))
        self._tell(MEMBER, LinkLost(node))

    def _hear_presence(self, node: str, message: Any) -> None:
        self._tell(TRACKER, FromNode(node, message))

    def _tell(self, name: str, message: object) -> None:
        ref = self.scheduler.registry.whereis(name)
        if ref is not None:
            self.scheduler.cast(ref, message)

    def _tracker(self) -> Tracker:
        return _NodeTracker(self._lives(), self.remote, self._settings.presence)

    def _member(self) -> Member:
        return Member(self.tenure, self.store, self._identity, self._refuses, self._settings.lease)


# --- a node that is alone ------------------------------------------------------------------------

NOWHERE: Final = "127.0.0.1:0"
"""The address of what cannot be reached."""

UNHURRIED: Final = ClusterSettings(
    lease=LeaseSettings(ttl_ns=MAX_NODE_LEASE_NS, renewal_ns=MAX_NODE_LEASE_NS // 4),
    presence=TrackerSettings(
        heartbeat_ns=MAX_NODE_LEASE_NS // 8,
        down_ns=MAX_NODE_LEASE_NS // 4,
        forget_ns=MAX_NODE_LEASE_NS // 2,
    ),
)
"""For worlds of one node in virtual time: nothing happens again and again."""


def no_links(node: str, target: int, message: object) -> NoReturn:
    """The `Send` of a node that has no links."""
    raise Unreachable(node, "this node has no links")


async def never_refuses(address: str) -> bool:
    """The `Refuses` of a node that has no others to examine."""
    return False


def start_alone(
    scheduler: Scheduler, store: LeaseStore, codec: MessageCodec, *, incarnation: int
) -> Tenure:
    """Make a scheduler the only node of a cluster, in virtual time: it has joined the store as
    `scheduler.node`, with this incarnation and a lease of MAX_NODE_LEASE_NS."""
    tenure = Tenure(scheduler.node, incarnation)
    ClusterNode(
        scheduler,
        RemoteActors(scheduler, codec, no_links),
        tenure,
        store,
        Identity(link_address=NOWHERE, door_address=NOWHERE, version="alone"),
        never_refuses,
        incarnation=incarnation,
        settings=UNHURRIED,
    ).start()
    return tenure
