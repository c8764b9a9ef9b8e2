"""The live authorisations of one account and the connections that carry them: a plain book.

The account actor keeps it; nothing here waits, writes or decides. Two kinds of time meet: rows
hold instants (UTC), while what bounds access runs on the monotonic clock (`CLOCK_BOOTTIME`), so
that neither a suspended machine nor a clock that is set back extends it. `deadline_ns` is taken
once from both, whenever an expiry is given.
"""

from __future__ import annotations

from base64 import b64encode
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from heapq import heapify, heappop, heappush
from typing import Literal
from uuid import UUID

import attrs

from actors.model import Authorization
from channel.messages import Candidates, IceCredentials, IceParameters, LiveAuthorization
from runtime.actor import Caller
from runtime.randomness import Randomness

LAST_CALL_NS = 2 * 10**9
"""So long before its end an authorisation is looked at once more, whether another policy takes
over by then."""
ACKNOWLEDGE_NS = 20 * 10**9
"""An authorisation that no gateway acknowledged in this time ends, whoever forgot it."""
MAX_EARLY_CANDIDATES = 16
"""Messages of a gateway that are kept for a client that has not been told of the connection."""

REPORT_NS = 900 * 10**9
"""So long after its end an agent may report what an authorisation carried."""
MAX_ENDED = 10_000
"""Authorisations that have ended and are remembered for that."""

MIN_RETRY_NS = 1 * 10**9

_MICROSECOND = timedelta(microseconds=1)


Stage = Literal["written", "presumed", "live", "ended"]
Step = Literal["acknowledged", "doubted", "rewritten", "ended"]

STEPS: dict[Stage, dict[Step, Stage]] = {
    "written": {"acknowledged": "live", "rewritten": "written", "ended": "ended"},
    "presumed": {
        "acknowledged": "live",
        "doubted": "written",
        "rewritten": "presumed",
        "ended": "ended",
    },
    "live": {"rewritten": "live", "ended": "ended"},
    "ended": {},
}
"""The life of an authorisation from its row on: `written` until its gateway took it; `rewritten`
whenever its end, policy or address becomes another. A new owner presumes of a row that its gateway
took it, until a client is found to be still waiting for it. The diagram of docs/control-plane.md
is `diagram()`."""
FIRST_STAGES: tuple[Stage, ...] = ("written", "presumed")


@attrs.define(kw_only=True, eq=False)
class Live:
    """A live authorisation. `due_ns` is when it has to be looked at: half of the lease, the last
    call, the deadline, or the end of the wait for an acknowledgement."""

    authorization: Authorization
    deadline_ns: int
    due_ns: int
    stage: Stage

    @property
    def id(self) -> UUID:
        return self.authorization.id

    @property
    def acknowledged(self) -> bool:
        return self.stage in ("presumed", "live")

    def step(self, step: Step) -> None:
        """Go on in its life. KeyError for what cannot happen in this stage."""
        self.stage = STEPS[self.stage][step]

    def told(self, now_ns: int) -> LiveAuthorization:
        """As an agent is told of it now."""
        return LiveAuthorization(
            authorization_id=self.authorization.id,
            connection_id=self.authorization.connection_id,
            resource_id=self.authorization.resource_id,
            expires_in_ns=self.remaining_ns(now_ns),
        )

    def remaining_ns(self, now_ns: int) -> int:
        return max(0, self.deadline_ns - now_ns)


@attrs.define(kw_only=True, eq=False)
class Connection:
    """A tunnel between one client and one gateway, each with the tunnel key that it then had.

    A key is None as long as that side has not confirmed that it holds the connection (after a
    restart of the portal). It is `pending` until the gateway took the first authorisation; other
    requests for it wait meanwhile (`waiting`), and so do the gateway's candidates (`early`).
    `opened_for` is the resource of the request that made it.
    """

    id: UUID
    client_id: UUID
    gateway_id: UUID
    client_key: bytes | None
    gateway_key: bytes | None
    ice: IceParameters
    pending: bool
    opened_for: UUID | None = None
    made_ns: int = 0
    waiting: list[tuple[Caller, object]] = attrs.Factory(list)
    early: list[Candidates] = attrs.Factory(list)

    def stands(self, client_key: bytes, gateway_key: bytes) -> bool:
        """Whether both ends are still the ones that made it."""
        return self.client_key == client_key and self.gateway_key == gateway_key

    def hold_early(self, candidates: Candidates) -> bool:
        """Keep (or drop, above the limit) a message that comes before the client can use it."""
        if self.pending and len(self.early) < MAX_EARLY_CANDIDATES:
            self.early.append(candidates)
        return self.pending


class Ledger:
    """Live authorisations by every key that is asked for, and by when they are due."""

    def __init__(self) -> None:
        self._live: dict[UUID, Live] = {}
        self._by_client: dict[UUID, dict[UUID, Live]] = {}
        self._by_gateway: dict[UUID, dict[UUID, Live]] = {}
        self._by_connection: dict[UUID, dict[UUID, Live]] = {}
        self._by_resource: dict[UUID, dict[UUID, Live]] = {}
        self._by_policy: dict[UUID, dict[UUID, Live]] = {}
        self._by_token: dict[UUID, dict[UUID, Live]] = {}
        self._due: list[tuple[int, UUID]] = []
        self._ended: OrderedDict[UUID, tuple[int, Authorization]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Live]:
        return iter(tuple(self._live.values()))

    def get(self, id: UUID) -> Live | None:
        return self._live.get(id)

    def recent(self, id: UUID, now_ns: int) -> Authorization | None:
        """One that is live, or ended at most REPORT_NS ago (the last MAX_ENDED of them)."""
        live = self._live.get(id)
        if live is not None:
            return live.authorization
        ended_ns, authorization = self._ended.get(id, (0, None))
        return authorization if now_ns <= ended_ns + REPORT_NS else None

    def of_client(self, client_id: UUID) -> tuple[Live, ...]:
        return tuple(self._by_client.get(client_id, {}).values())

    def of_gateway(self, gateway_id: UUID) -> tuple[Live, ...]:
        return tuple(self._by_gateway.get(gateway_id, {}).values())

    def of_connection(self, connection_id: UUID) -> tuple[Live, ...]:
        return tuple(self._by_connection.get(connection_id, {}).values())

    def of_resource(self, resource_id: UUID) -> tuple[Live, ...]:
        return tuple(self._by_resource.get(resource_id, {}).values())

    def of_policy(self, policy_id: UUID) -> tuple[Live, ...]:
        """Those that this policy gives."""
        return tuple(self._by_policy.get(policy_id, {}).values())

    def of_token(self, token_id: UUID) -> tuple[Live, ...]:
        """Those of sessions by this token."""
        return tuple(self._by_token.get(token_id, {}).values())

    def add(
        self, authorization: Authorization, *, now_ns: int, instant: datetime, stage: Stage
    ) -> Live:
        """Take in an authorisation that is written: one of FIRST_STAGES."""
        live = Live(
            authorization=authorization,
            deadline_ns=deadline(authorization.expires_at, now_ns, instant),
            due_ns=0,
            stage=stage,
        )
        self._live[live.id] = live
        self._enter(live)
        self._plan(live, now_ns)
        return live

    def rewrite(self, live: Live, authorization: Authorization, now_ns: int, at: datetime) -> None:
        """The row was written anew: another expiry, policy or address, the same parties."""
        live.step("rewritten")
        self._leave(live)
        live.authorization = authorization
        self._enter(live)
        live.deadline_ns = deadline(authorization.expires_at, now_ns, at)
        self._plan(live, now_ns)

    def acknowledge(self, live: Live, now_ns: int) -> None:
        """Its gateway took it."""
        if live.stage != "live":
            live.step("acknowledged")
        self._plan(live, now_ns)

    def doubt(self, live: Live, now_ns: int) -> None:
        """Its client waits to be told of it. If we only presume that its gateway took it, that is
        still to be said."""
        if live.stage == "presumed":
            live.step("doubted")
            self._plan(live, now_ns)

    def postpone(self, live: Live, now_ns: int) -> None:
        """It was looked at and stays as it is: it is due again at the next of its moments."""
        last_call = live.deadline_ns - LAST_CALL_NS
        self._schedule(live, last_call if now_ns < last_call else live.deadline_ns)

    def retry(self, live: Live, now_ns: int) -> None:
        """What was due could not be written: again when an eighth of what is left has passed."""
        left_ns = live.remaining_ns(now_ns)
        self._schedule(live, now_ns + max(left_ns // 8, min(left_ns, MIN_RETRY_NS)))

    def remove(self, live: Live, now_ns: int) -> None:
        """It has ended."""
        self._ended[live.id] = (now_ns, live.authorization)
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)
        live.step("ended")
        del self._live[live.id]
        self._leave(live)
        if len(self._due) > 4 * len(self._live) + 64:
            self._due = [(each.due_ns, each.id) for each in self._live.values()]
            heapify(self._due)

    def next_due_ns(self) -> int | None:
        """When the next authorisation has to be looked at."""
        while self._due:
            due_ns, id = self._due[0]
            live = self._live.get(id)
            if live is not None and live.due_ns == due_ns:
                return due_ns
            heappop(self._due)
        return None

    def take_due(self, now_ns: int) -> list[Live]:
        """Those that are due, the most urgent first. Each must be ended or planned again."""
        due = []
        while (next_ns := self.next_due_ns()) is not None and next_ns <= now_ns:
            _, id = heappop(self._due)
            due.append(self._live[id])
        return due

    def _plan(self, live: Live, now_ns: int) -> None:
        if not live.acknowledged:
            self._schedule(live, min(live.deadline_ns, now_ns + ACKNOWLEDGE_NS))
        else:
            self._schedule(live, now_ns + max(0, live.deadline_ns - now_ns) // 2)

    def _schedule(self, live: Live, due_ns: int) -> None:
        live.due_ns = due_ns
        heappush(self._due, (due_ns, live.id))

    def _enter(self, live: Live) -> None:
        for index, key in self._keys(live.authorization):
            index.setdefault(key, {})[live.id] = live

    def _leave(self, live: Live) -> None:
        for index, key in self._keys(live.authorization):
            entries = index[key]
            del entries[live.id]
            if not entries:
                del index[key]

    def _keys(
        self, authorization: Authorization
    ) -> Iterable[tuple[dict[UUID, dict[UUID, Live]], UUID]]:
        yield self._by_client, authorization.client_id
        yield self._by_gateway, authorization.gateway_id
        yield self._by_connection, authorization.connection_id
        yield self._by_resource, authorization.resource_id
        yield self._by_policy, authorization.policy_id
        yield self._by_token, authorization.token_id


class Connections:
    """At most one connection for a client and a gateway; others are forgotten."""

    def __init__(self) -> None:
        self._by_client: dict[UUID, dict[UUID, Connection]] = {}
        self._by_gateway: dict[UUID, dict[UUID, Connection]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def between(self, client_id: UUID, gateway_id: UUID) -> Connection | None:
        return self._by_client.get(client_id, {}).get(gateway_id)

    def of_client(self, client_id: UUID) -> tuple[Connection, ...]:
        return tuple(self._by_client.get(client_id, {}).values())

    def of_gateway(self, gateway_id: UUID) -> tuple[Connection, ...]:
        return tuple(self._by_gateway.get(gateway_id, {}).values())

    def count(self, gateway_id: UUID) -> int:
        """The load of a gateway, as far as the portal knows it."""
        return len(self._by_gateway.get(gateway_id, {}))

    def put(self, connection: Connection) -> None:
        self._by_client.setdefault(connection.client_id, {})[connection.gateway_id] = connection
        self._by_gateway.setdefault(connection.gateway_id, {})[connection.client_id] = connection

    def forget(self, connection: Connection) -> None:
        """Harmless if it was forgotten, or replaced, before."""
        if self.between(connection.client_id, connection.gateway_id) is not connection:
            return
        for index, key, other in (
            (self._by_client, connection.client_id, connection.gateway_id),
            (self._by_gateway, connection.gateway_id, connection.client_id),
        ):
            del index[key][other]
            if not index[key]:
                del index[key]


def diagram() -> str:
    """`STEPS` as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", *(f"    [*] --> {stage}" for stage in FIRST_STAGES)]
    for stage, steps in STEPS.items():
        lines += [f"    {stage} --> {after}: {step}" for step, after in steps.items()]
        lines += [f"    {stage} --> [*]"] if not steps else []
    return "\n".join(lines)


def new_ice(randomness: Randomness) -> IceParameters:
    """Fresh ICE credentials for both ends of a connection: 48-bit fragments, 192-bit passwords."""
    return IceParameters(client=_ice_credentials(randomness), gateway=_ice_credentials(randomness))


def _ice_credentials(randomness: Randomness) -> IceCredentials:
    return IceCredentials(
        fragment=b64encode(randomness.bytes(6)).decode(),
        password=b64encode(randomness.bytes(24)).decode(),
    )


def deadline(expires_at: datetime, now_ns: int, instant: datetime) -> int:
    """The monotonic time of an instant, given that it is now both `now_ns` and `instant`."""
    return now_ns + (expires_at - instant) // _MICROSECOND * 1_000
