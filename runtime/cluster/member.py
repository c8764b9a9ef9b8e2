"""The actor by which a node stays a member of its cluster: it renews the node's lease for ever,
keeps the node's `Tenure` true, and gives nodes up for dead that surely are.

    lease renewed          the tenure is written; `RosterChanged` if the nodes are others now
    database unreachable   the lease runs out by itself; nothing is decided here from then on
    given up by others     the node owned nothing any more: it begins a new tenure
    name taken             `Tenure.is_superseded`: the process has to end
    a stranger's link      it has joined since the last renewal: renew now, and know it
    a link is lost         whose address refuses connections is dead: it is expelled at once, and
                           not only when its lease ends. Were that wrong, it would do no harm: who
                           is expelled notices, and what it owned is fenced
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

import attrs
import structlog

from runtime.actor import Actor, ActorError, NamedRef, Raise, Timer, handles
from runtime.clock import NS_PER_MS, NS_PER_S
from runtime.cluster.leases import ClusterFull, LeaseFenced, LeaseStore, LeaseUnavailable, NodeRow
from runtime.cluster.tenure import ROSTER, RosterChanged, Tenure

MEMBER: Final = "cluster member"
"""The registered name of a node's member actor."""
EXAMINATIONS_NS: Final = (0, 30 * NS_PER_MS, 100 * NS_PER_MS, 300 * NS_PER_MS)
"""The pauses before each try to connect to a node whose link was lost."""

Refuses = Callable[[str], Awaitable[bool]]
"""Whether a connection to `host:port` is refused, as where no process listens. Raises nothing."""

_log = structlog.get_logger("holloway.cluster")


@attrs.frozen(kw_only=True)
class LeaseSettings:
    """How long a node's lease lasts, and how often it is renewed (ns)."""

    ttl_ns: int = 3 * NS_PER_S
    renewal_ns: int = NS_PER_S // 2

    def __attrs_post_init__(self) -> None:
        if not 0 < 2 * self.renewal_ns <= self.ttl_ns:
            raise ValueError("a lease must be renewed at least twice in its time")


@attrs.frozen(kw_only=True)
class Identity:
    """How a node is known to others; see `leases.NodeRow`."""

    link_address: str
    door_address: str
    version: str


@attrs.frozen
class Renew:
    """It is time to renew the lease, or sooner than time: a node says so to the others when there
    is something to learn by it."""


@attrs.frozen
class LinkLost:
    """The link to this node is lost."""

    node: str


@attrs.frozen
class LinkFound:
    """There is a link with this node now."""

    node: str


@attrs.frozen
class BeginDraining:
    """Call: own nothing new, and give away what is owned; answered when all nodes can know."""


@attrs.frozen
class Leave:
    """Call: give up the lease for good. Answered when that is written; raises LeaseUnavailable."""


@attrs.frozen(kw_only=True)
class MemberStatistics:
    """Counts since the start."""

    renewals: int
    renewals_failed: int
    expelled: int
    """Nodes that this one gave up for dead."""
    tenures: int
    """How often this node began anew, since it was given up itself."""


@attrs.frozen
class AskMember:
    """Call: answered by MemberStatistics."""


@attrs.frozen
class _Expelled:
    """An examination has given this node up."""

    row: NodeRow


class Member(Actor):
    """See the module. `incarnation` and the first lease come with the tenure."""

    def __init__(
        self,
        tenure: Tenure,
        store: LeaseStore,
        identity: Identity,
        refuses: Refuses,
        settings: LeaseSettings | None = None,
    ) -> None:
        self._tenure = tenure
        self._store = store
        self._identity = identity
        self._refuses = refuses
        self._settings = settings or LeaseSettings()
        self._is_joining = False  # a join was sent, and what became of it is not known
        self._timer: Timer | None = None
        self._renewals = 0
        self._renewals_failed = 0
        self._expelled = 0
        self._tenures = 0

    def started(self) -> None:
        self.cast(self.context.ref, Renew())

    @handles(Renew)
    async def _on_renew(self, message: Renew) -> None:
        await self._renew()

    @handles(BeginDraining)
    async def _on_begin_draining(self, message: BeginDraining) -> None:
        self._tenure.is_draining = True
        await self._renew()
        self._have_others_look()

    @handles(Leave)
    async def _on_leave(self, message: Leave) -> Raise | None:
        tenure = self._tenure
        tenure.has_left = True
        tenure.was_lost()
        try:
            await self.perform(self._store.leave_node, tenure.node, tenure.incarnation)
        except LeaseUnavailable as error:
            return Raise(error)
        self._have_others_look()
        return None

    @handles(LinkFound)
    def _on_link_found(self, message: LinkFound) -> None:
        if self._tenure.row(message.node) is None:
            self.cast(self.context.ref, Renew())

    @handles(LinkLost)
    def _on_link_lost(self, message: LinkLost) -> None:
        row = self._tenure.row(message.node)
        if row is not None and not self._tenure.has_left:
            self.spawn(_Examination(self._store, row, self._refuses), label=f"is {row.name} dead?")

    @handles(AskMember)
    def _on_ask(self, message: AskMember) -> MemberStatistics:
        return MemberStatistics(
            renewals=self._renewals,
            renewals_failed=self._renewals_failed,
            expelled=self._expelled,
            tenures=self._tenures,
        )

    async def _renew(self) -> None:
        if self._tenure.has_left or self._tenure.is_superseded:
            return
        if self._timer is not None:
            self.cancel(self._timer)
        self._timer = self.send_after(self._settings.renewal_ns, Renew())
        sent_ns = self.context.now()
        try:
            rows = await self._perform_renewal()
        except LeaseFenced as error:
            await self._was_fenced(error)
        except (LeaseUnavailable, ActorError) as error:
            self._renewals_failed += 1
            if not self._tenure.holds(self.context.now()):
                _log.warning("lease_lapsed", node=self._tenure.node, cause=type(error).__name__)
        else:
            self._renewals += 1
            until_ns = sent_ns + self._settings.ttl_ns
            if self._tenure.renewed(rows, until_ns):
                names = {row.name: row.draining for row in self._tenure.rows}
                _log.info("nodes", living=sorted(names), draining=sorted(filter(names.get, names)))
                self.publish(ROSTER, RosterChanged())

    async def _perform_renewal(self) -> tuple[NodeRow, ...]:
        rows: tuple[NodeRow, ...] = await self.perform(
            partial(
                self._store.renew_node,
                self._tenure.node,
                self._tenure.incarnation,
                draining=self._tenure.is_draining,
                ttl_ns=self._settings.ttl_ns,
            ),
            deadline_ns=self._patience_ns,
        )
        return rows

    def _have_others_look(self) -> None:
        """There is something about this node that the others should know at once."""
        for row in self._tenure.rows:
            if row.name != self._tenure.node:
                self.cast(NamedRef(MEMBER, row.name), Renew())

    @property
    def _patience_ns(self) -> int:
        """So that after one request that is lost another can still be in time."""
        return self._settings.ttl_ns // 2

    async def _was_fenced(self, error: LeaseFenced) -> None:
        tenure = self._tenure
        tenure.was_lost()
        if error.superseded and not self._is_joining:
            tenure.is_superseded = True
            _log.error("node_superseded", node=tenure.node)
            self.publish(ROSTER, RosterChanged())
            return
        self._is_joining = True
        try:
            incarnation: int = await self.perform(
                partial(
                    self._store.join_node,
                    tenure.node,
                    link_address=self._identity.link_address,
                    door_address=self._identity.door_address,
                    version=self._identity.version,
                    ttl_ns=self._settings.ttl_ns,
                ),
                deadline_ns=self._patience_ns,
            )
        except (LeaseUnavailable, ClusterFull, ActorError) as failure:
            # The next renewal is fenced again, and comes here. If this join was carried out and
            # only its answer lost, then as superseded: by ourselves.
            _log.warning("rejoin_failed", node=tenure.node, cause=type(failure).__name__)
            return
        self._is_joining = False
        tenure.began_anew(incarnation)
        self._tenures += 1
        _log.warning("tenure_began_anew", node=tenure.node, incarnation=incarnation)
        self.publish(ROSTER, RosterChanged())
        self.cast(self.context.ref, Renew())

    @handles(_Expelled)
    def _on_expelled(self, message: _Expelled) -> None:
        self._expelled += 1
        row = message.row
        _log.warning("node_expelled", node=row.name, incarnation=row.incarnation)
        self.cast(self.context.ref, Renew())


@attrs.frozen
class _Begin:
    pass


class _Examination(Actor):
    """Finds out whether a node is surely dead, and if so gives it up."""

    def __init__(self, store: LeaseStore, row: NodeRow, refuses: Refuses) -> None:
        self._store = store
        self._row = row
        self._refuses = refuses

    def started(self) -> None:
        self.cast(self.context.ref, _Begin())

    @handles(_Begin)
    async def _on_begin(self, message: _Begin) -> None:
        if await self._is_dead():
            row, member = self._row, self.context.parent
            with suppress(LeaseUnavailable):  # then its lease has to run out
                await self.perform(self._store.expel_node, row.name, row.incarnation)
                if member is not None:
                    self.cast(member, _Expelled(row))
        self.stop()

    async def _is_dead(self) -> bool:
        for pause_ns in EXAMINATIONS_NS:
            await self.sleep(pause_ns)
            if await self.perform(self._refuses, self._row.link_address):
                return True
        return False
