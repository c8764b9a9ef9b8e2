"""Questions to the policy engine, which change nothing: who may reach what and why, what a change
would do, what it would have done, who could reach what then, how late a revocation may come.

They are worked out on the account as it is, beside the event loop (see `portal.api.snapshots`), and
each has a bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Annotated, Final, Literal
from uuid import UUID

import msgspec
from litestar import get, post
from litestar.params import JSONBody
from msgspec import Meta

from actors.messages import ResourceExposure
from actors.model import Authorization, EntityKind, Policy, Region
from actors.policy.circumstances import Circumstances, Span
from actors.policy.diff import Changed, diff
from actors.policy.effort import Effort, Exhausted
from actors.policy.engine import Denied, Snapshot
from actors.policy.engine import Request as PolicyRequest
from actors.policy.explain import Check, GatewayTrace, Hop, PolicyTrace, explain, summary
from actors.policy.exposure import exposure
from actors.policy.history import Reach, reach, rewind
from actors.policy.proposals import FailedTest, failing_tests, newly_failing_tests, propose
from actors.policy.replay import Replayed, replay
from actors.store.interface import MAX_PAGE, InvalidReference, Pruned
from channel.messages import IpText
from portal.api.conditions import Facts, facts_of
from portal.api.filters import filters
from portal.api.inject import TheDesk, TheFilters, ThePage
from portal.api.office import Desk
from portal.api.pagination import Page
from portal.api.problems import FieldError, invalid, of_store
from portal.api.proposals import Proposals, mutations_of
from portal.api.requests import EARLIEST, Body, Checks, Instant, canonical_source
from portal.api.scopes import VERB, noun

MAX_ANSWERS: Final = 10_000
MAX_REPLAYED: Final = 5_000
MAX_REWOUND: Final = 100_000
"""How many changes are taken back for a question about the past."""

AddressOfClient = Annotated[str, Meta(max_length=45, description="The client's public address.")]
HowMany = Annotated[int, Meta(ge=1, le=MAX_ANSWERS)]


# --- explain -------------------------------------------------------------------------------------


class ExplainRequest(Body, frozen=True, kw_only=True):
    """A question: may this client, or any device of this principal, reach this resource?

    Name a `client_id` or a `principal_id`. `remote_ip` is the client's public address (by default
    that of its connection, else unknown), `token_id` the token of its session (by default the one
    it enrolled with), `at` an instant (by default now). `region`, `auth_provider_id`,
    `client_verified` and `posture` count in place of what is known.
    """

    resource_id: UUID
    client_id: UUID | None = None
    principal_id: UUID | None = None
    remote_ip: AddressOfClient | None = None
    token_id: UUID | None = None
    at: Instant | None = None
    region: Region | None = None
    auth_provider_id: UUID | None = None
    client_verified: bool | None = None
    posture: Facts | None = None


class ExplainAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The decision, in a `sentence` and in parts: what holds whatever the policy (`common`), what
    each policy of the resource says, its gateways, and the `path` by which access is given, from
    who asks to the resource. `online` of a gateway is null if that cannot be told just now, and for
    a question about another instant."""

    allowed: bool
    sentence: str
    policy_id: UUID | None
    expires_at: datetime | None
    reason: str
    violated: tuple[str, ...]
    at: datetime
    common: tuple[Check, ...]
    policies: tuple[PolicyTrace, ...]
    gateways: tuple[GatewayTrace, ...]
    path: tuple[Hop, ...]


@post("/explain", status_code=200, opt={VERB: "read"})
async def explain_policies(desk: TheDesk, data: JSONBody[ExplainRequest]) -> ExplainAnswer:
    """Explain who may reach what, and why. Nothing is changed."""
    checks = Checks()
    instant = desk.now if data.at is None else checks.instant("at", data.at)
    remote_ip = _remote_ip(checks, data.remote_ip)
    posture = None if data.posture is None else facts_of(checks, "posture", data.posture)
    if (data.client_id is None) == (data.principal_id is None):
        checks.refuse("client_id", "name either a client_id or a principal_id")
    checks.finish()
    online = await desk.office.live.online(desk.account_id)
    connection = None if data.client_id is None else (online or {}).get(data.client_id)

    def answer(snapshot: Snapshot) -> ExplainAnswer:
        _check_known(snapshot, data)
        client = snapshot.clients.get(data.client_id) if data.client_id else None
        request = PolicyRequest(
            client_id=data.client_id,
            principal_id=data.principal_id,
            resource_id=data.resource_id,
            remote_ip=remote_ip or (connection.remote_ip if connection else None),
            token_id=data.token_id or (client.token_id if client else None),
            region=data.region,
            auth_provider_id=data.auth_provider_id,
            client_verified=data.client_verified,
            posture=posture,
        )
        explanation = explain(snapshot, request, instant, online if data.at is None else None)
        decision = explanation.decision
        denied = decision if isinstance(decision, Denied) else None
        return ExplainAnswer(
            allowed=denied is None,
            sentence=summary(explanation),
            policy_id=None if isinstance(decision, Denied) else decision.policy_id,
            expires_at=None if isinstance(decision, Denied) else decision.expires_at,
            reason=denied.reason if denied else "",
            violated=denied.violated if denied else (),
            at=instant,
            common=explanation.common,
            policies=explanation.policies,
            gateways=explanation.gateways,
            path=explanation.path,
        )

    async with desk.snapshot() as snapshot:
        return await desk.work(lambda: answer(snapshot))


# --- diff ----------------------------------------------------------------------------------------


class DiffRequest(Body, frozen=True, kw_only=True):
    """Changes that are proposed. `limit` bounds how many gains and losses are named."""

    mutations: Proposals
    limit: HowMany = 1_000


class AccessChange(msgspec.Struct, frozen=True, kw_only=True):
    """A principal gains, or loses, a resource: when, in what circumstances for example, and by
    which policies."""

    principal_id: UUID
    principal_name: str
    resource_id: UUID
    resource_name: str
    spans: tuple[Span, ...]
    example: Circumstances
    policy_ids: tuple[UUID, ...]


class FailedTestView(msgspec.Struct, frozen=True, kw_only=True):
    """A policy test that does not hold, and what was decided instead."""

    policy_test_id: UUID
    name: str
    expected: Literal["allowed", "denied"]
    violated: tuple[str, ...]

    @classmethod
    def of(cls, failed: FailedTest) -> FailedTestView:
        decision = failed.decision
        return cls(
            policy_test_id=failed.test.id,
            name=failed.test.name,
            expected=failed.test.expected,
            violated=decision.violated if isinstance(decision, Denied) else (),
        )


class DiffAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly who would gain and lose what from now on, and the policy tests for which the changes
    would be refused. Not `complete` if there is more than the limit, or than can be found out with
    bounded effort; not `exact` if conditions are
    too many to be worked out: then some of what is named may be no gain or loss."""

    number: int
    gained: tuple[AccessChange, ...]
    lost: tuple[AccessChange, ...]
    complete: bool
    exact: bool
    failing_tests: tuple[FailedTestView, ...]


@post("/diff", status_code=200, opt={VERB: "read"})
async def diff_policies(desk: TheDesk, data: JSONBody[DiffRequest]) -> DiffAnswer:
    """Show what proposed changes would do, before they are made: who gains and who loses what."""
    mutations, now = await mutations_of(desk, data.mutations), desk.now

    def answer(snapshot: Snapshot) -> DiffAnswer:
        proposal = propose(snapshot, mutations)
        found = diff(snapshot, proposal.after, now, edits=proposal.edits, limit=data.limit)
        both = (proposal.after, snapshot)
        return DiffAnswer(
            number=snapshot.number,
            gained=tuple(_access(each, both) for each in found.gained),
            lost=tuple(_access(each, both) for each in found.lost),
            complete=found.complete,
            exact=found.exact,
            failing_tests=tuple(map(FailedTestView.of, newly_failing_tests(proposal, now))),
        )

    async with desk.snapshot() as snapshot:
        return await desk.work(lambda: answer(snapshot))


# --- replay --------------------------------------------------------------------------------------


class ReplayRequest(Body, frozen=True, kw_only=True):
    """Changes that are proposed, and since when accesses are looked at. `limit` bounds how many."""

    mutations: Proposals
    since: Instant
    until: Instant | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_REPLAYED)] = 1_000


class ReplayedAccess(msgspec.Struct, frozen=True, kw_only=True):
    """An access that was given and would have gone another way. `outcome` under the proposal:
    `shortened` (at `cut_at`), `denied`, or `stands` where it would not have today."""

    authorization_id: UUID
    client_id: UUID
    resource_id: UUID
    created_at: datetime
    outcome: Literal["stands", "shortened", "denied", "unknown"]
    outcome_now: Literal["stands", "shortened", "denied", "unknown"]
    cut_at: datetime | None
    violated: tuple[str, ...]


class ReplayAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the proposal would have done to the accesses that were given. `outcomes` counts all of
    them; `different` are those that the present policies decide otherwise. Not `complete` if there
    are more than the limit, or than can be found out with bounded effort: `until` is that of the
    last one then."""

    examined: int
    outcomes: dict[str, int]
    different: tuple[ReplayedAccess, ...]
    complete: bool
    until: datetime | None


@post("/replay", status_code=200, opt={VERB: "read"})
async def replay_policies(desk: TheDesk, data: JSONBody[ReplayRequest]) -> ReplayAnswer:
    """Show what proposed changes would have done to the accesses that were recorded."""
    checks = Checks()
    since = checks.instant("since", data.since)
    until = None if data.until is None else checks.instant("until", data.until)
    checks.finish()
    mutations = await mutations_of(desk, data.mutations)
    rows = await _authorizations(desk, since, until, data.limit + 1)
    wanted = rows[: data.limit]

    def answer(snapshot: Snapshot) -> ReplayAnswer:
        after = propose(snapshot, mutations).after
        effort = Effort()
        pairs: list[tuple[Replayed, Replayed]] = []
        with suppress(Exhausted):
            both = zip(replay(after, wanted, effort), replay(snapshot, wanted, effort), strict=True)
            pairs.extend(both)
        outcomes = dict.fromkeys(("stands", "shortened", "denied", "unknown"), 0)
        for then, _ in pairs:
            outcomes[then.outcome] += 1
        return ReplayAnswer(
            examined=len(pairs),
            outcomes=outcomes,
            different=tuple(
                _replayed(then, now)
                for then, now in pairs
                if (then.outcome, then.cut_at) != (now.outcome, now.cut_at)
            ),
            complete=len(pairs) == len(rows),
            until=pairs[-1][0].authorization.created_at if pairs else None,
        )

    async with desk.snapshot() as snapshot:
        return await desk.work(lambda: answer(snapshot))


# --- at ------------------------------------------------------------------------------------------


class AtRequest(Body, frozen=True, kw_only=True):
    """An instant, by default now; and of whom, and of what, or of all."""

    at: Instant | None = None
    principal_id: UUID | None = None
    resource_id: UUID | None = None
    limit: HowMany = 1_000


class Reachable(msgspec.Struct, frozen=True, kw_only=True):
    """A principal that may reach a resource, and the policies that allow it. `certain`: whatever
    the circumstances; otherwise it depends on some that were not recorded."""

    principal_id: UUID
    principal_name: str
    resource_id: UUID
    resource_name: str
    policy_ids: tuple[UUID, ...]
    certain: bool


class AtAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Who could reach what. `number` is that of the last change then. Not `complete` if there is
    more than the limit, or than can be found out with bounded effort."""

    at: datetime
    number: int
    reachable: tuple[Reachable, ...]
    complete: bool


@post("/at", status_code=200, opt={VERB: "read"})
async def policies_at(desk: TheDesk, data: JSONBody[AtRequest]) -> AtAnswer:
    """Show who could reach what at an instant, as far back as changes are kept."""
    checks = Checks()
    instant = desk.now if data.at is None else checks.instant("at", data.at)
    if instant > desk.now:
        checks.refuse("at", "must not lie in the future; `diff` tells of that")
    checks.finish()

    def answer(past: Snapshot) -> AtAnswer:
        _check_known(past, data)
        found = reach(past, instant, principal_id=data.principal_id, resource_id=data.resource_id)
        first: list[Reach] = []
        is_complete = True
        try:
            first.extend(islice(found, data.limit + 1) if past.account is not None else ())
        except Exhausted:
            is_complete = False
        return AtAnswer(
            at=instant,
            number=past.number,
            reachable=tuple(
                Reachable(
                    principal_id=each.principal_id,
                    principal_name=_name(past.principals.get(each.principal_id)),
                    resource_id=each.resource_id,
                    resource_name=_name(past.resources.get(each.resource_id)),
                    policy_ids=each.policy_ids,
                    certain=each.certain,
                )
                for each in first[: data.limit]
            ),
            complete=is_complete and len(first) <= data.limit,
        )

    async with desk.snapshot() as snapshot:
        past = await _past(desk, snapshot, instant) if data.at else snapshot
        return await desk.work(lambda: answer(past))


# --- exposure ------------------------------------------------------------------------------------


class AwayGatewayView(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway that is not connected, and cannot be told to end what it carries: so many accesses
    to the resource, the last of which ends by itself after `longest_s`."""

    gateway_id: UUID
    authorizations: int
    longest_s: int


class ExposureView(msgspec.Struct, frozen=True, kw_only=True):
    """How long an access to a resource can outlive its revocation at a gateway that nobody can
    tell of it: `disconnected_s`, bounded by the policy `policy_id`. One that is connected hears of
    it at once.

    Of the accesses that are live now, `connected` would end at once, those at `away` gateways at
    the end of their leases; both are null when the actors do not answer in time.
    """

    resource_id: UUID
    resource_name: str
    disconnected_s: int
    policy_id: UUID | None
    connected: int | None = None
    away: tuple[AwayGatewayView, ...] | None = None

    def with_live(self, live: ResourceExposure | None) -> ExposureView:
        away = () if live is None else live.away
        return msgspec.structs.replace(
            self,
            connected=0 if live is None else live.connected,
            away=tuple(
                AwayGatewayView(
                    gateway_id=each.gateway_id,
                    authorizations=each.authorizations,
                    longest_s=-(-each.longest_ns // 10**9),
                )
                for each in away
            ),
        )


@get("/exposure", opt=filters(Policy, "resource_id"))
async def list_exposures(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[ExposureView]:
    """Show for each resource how late a revocation can take effect."""
    now, after, wanted = desk.now, page.after_id(), filters.get("resource_id")

    def answer(snapshot: Snapshot) -> list[ExposureView]:
        ids = sorted(
            id
            for id in snapshot.table("resource")
            if (after is None or id > after) and wanted in (None, id)
        )
        views, effort = [], Effort()
        for id in ids[: page.limit]:
            found = exposure(snapshot, id, now, effort)
            views.append(
                ExposureView(
                    resource_id=id,
                    resource_name=_name(snapshot.resources.get(id)),
                    disconnected_s=found.disconnected_s,
                    policy_id=found.policy_id,
                )
            )
        return views

    async with desk.snapshot() as snapshot:
        found = await desk.work(lambda: answer(snapshot))
    ids = tuple(each.resource_id for each in found)
    live = await desk.office.live.exposed(desk.account_id, ids)
    if live is not None:
        found = [each.with_live(live.get(each.resource_id)) for each in found]
    return page.page(found, ids[-1] if ids else None)


# --- policy tests --------------------------------------------------------------------------------


class PolicyTestsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How the policy tests of the account stand now."""

    passed: int
    failed: tuple[FailedTestView, ...]


@post("/tests", status_code=200, opt={VERB: "read"})
async def run_policy_tests(desk: TheDesk) -> PolicyTestsAnswer:
    """Try all policy tests now. One that fails, because time went by, refuses no change."""
    now = desk.now

    def answer(snapshot: Snapshot) -> PolicyTestsAnswer:
        failed = tuple(map(FailedTestView.of, failing_tests(snapshot, now)))
        return PolicyTestsAnswer(passed=len(snapshot.policy_tests) - len(failed), failed=failed)

    async with desk.snapshot() as snapshot:
        return await desk.work(lambda: answer(snapshot))


# --- helpers -------------------------------------------------------------------------------------


_KINDS: Final[tuple[tuple[str, EntityKind], ...]] = (
    ("resource_id", "resource"),
    ("client_id", "client"),
    ("principal_id", "principal"),
    ("token_id", "token"),
    ("auth_provider_id", "auth_provider"),
)


def _check_known(snapshot: Snapshot, data: ExplainRequest | AtRequest) -> None:
    """Raises Problem 404 for a field that names nothing in the account."""
    for field, kind in _KINDS:
        id = getattr(data, field, None)
        if id is not None and id not in snapshot.table(kind):
            raise of_store(InvalidReference(kind, field))


def _name(entity: object) -> str:
    return str(getattr(entity, "name", ""))


def _access(changed: Changed, snapshots: Iterable[Snapshot]) -> AccessChange:
    def name(kind: Literal["principal", "resource"], id: UUID) -> str:
        return next(filter(None, (_name(each.table(kind).get(id)) for each in snapshots)), "")

    return AccessChange(
        principal_id=changed.principal_id,
        principal_name=name("principal", changed.principal_id),
        resource_id=changed.resource_id,
        resource_name=name("resource", changed.resource_id),
        spans=changed.spans,
        example=changed.example,
        policy_ids=changed.policy_ids,
    )


def _replayed(then: Replayed, now: Replayed) -> ReplayedAccess:
    row = then.authorization
    return ReplayedAccess(
        authorization_id=row.id,
        client_id=row.client_id,
        resource_id=row.resource_id,
        created_at=row.created_at,
        outcome=then.outcome,
        outcome_now=now.outcome,
        cut_at=then.cut_at,
        violated=then.violated,
    )


async def _authorizations(
    desk: Desk, since: datetime, until: datetime | None, limit: int
) -> list[Authorization]:
    """The first that were given from `since` on, by their ids, which tell the time."""
    found: list[Authorization] = []
    after = UUID(int=(round(since.timestamp() * 1_000) << 80) - 1)
    while len(found) < limit:
        page = await desk.office.store.authorizations(
            desk.account_id, after=after, limit=min(MAX_PAGE, limit)
        )
        found += [each for each in page if until is None or each.created_at < until]
        if len(page) < min(MAX_PAGE, limit) or (until and page[-1].created_at >= until):
            break
        after = page[-1].id
    return found[:limit]


async def _past(desk: Desk, snapshot: Snapshot, instant: datetime) -> Snapshot:
    """The account as it was at an instant. A page of changes is in memory at a time. Raises Problem
    422 for what is beyond the horizon, or further back than MAX_REWOUND changes."""
    store, account_id = desk.office.store, desk.account_id
    horizon, pruned = EARLIEST, 0
    try:
        await store.changes(account_id, after=0, limit=1)
    except Pruned as gone:
        pruned = gone.number
        (first,) = await store.changes(account_id, after=pruned, limit=1) or (None,)
        horizon = desk.now if first is None else first.at.astimezone(UTC)
    if instant < horizon:
        message = f"changes are kept since {horizon.isoformat()} only"
        raise invalid(FieldError(field="at", message=message))
    past = await desk.work(snapshot.copy)
    number = snapshot.number
    while number > pruned:
        if snapshot.number - number > MAX_REWOUND:
            message = f"more than {MAX_REWOUND:,} changes were made since"
            raise invalid(FieldError(field="at", message=message))
        start = max(pruned, number - MAX_PAGE)
        changes = await store.changes(account_id, after=start, limit=number - start)
        if await desk.work(partial(rewind, past, changes[::-1], instant)):
            break
        number = start
    return past


def _remote_ip(checks: Checks, text: str | None) -> str | None:
    if text is None:
        return None
    address = canonical_source(text)
    if address is None or "%" in text:
        checks.refuse("remote_ip", "must be an address such as 192.0.2.7 or 2001:db8::7")
        return None
    return IpText(str(address))


router = noun(
    "policies",
    explain_policies,
    diff_policies,
    replay_policies,
    policies_at,
    list_exposures,
    run_policy_tests,
)
