"""The account as one document: exported, compared, applied in one transaction or not at all.

Whoever may write it may write everything that it holds, so the scope `declaration:write` is as good
as those of all its nouns.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

import attrs
import msgspec
from litestar import get, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, structs

from actors.declaration import Declaration, Plan, Step, Undeclarable, export, plan
from actors.declaration.exporting import Names
from actors.declaration.form import (
    AuthProviderEntry,
    ConditionsPart,
    PolicyEntry,
    PolicyTestEntry,
    ResourceEntry,
    plain,
)
from actors.model import KIND_OF, EntityKind, Principal, SealedSecret, Token
from actors.policy.diff import Changed, diff
from actors.policy.proposals import Proposal, newly_failing_tests, propose
from actors.policy.snapshot import Snapshot
from actors.store.codec import to_json
from actors.store.interface import (
    ANSWER_KEPT,
    MAX_ANSWER_BYTES,
    MAX_MUTATIONS,
    Contents,
    NotFound,
    Outdated,
    Put,
    Remove,
    Repeated,
)
from actors.store.sealing import CannotOpen
from actors.store.validity import SECRETS
from portal.api.auth_providers import GOOGLE_ISSUER
from portal.api.conditions import ConditionsBody, FactBody, conditions_of, facts_of
from portal.api.idempotency import KEYED
from portal.api.inject import TheDesk
from portal.api.office import Desk
from portal.api.problems import FieldError, Problem, invalid
from portal.api.requests import Body, Checks
from portal.api.resources import check_address
from portal.api.scopes import VERB, allows, noun

MAX_ACCESSES: Final = 1_000
"""How many gains and losses a plan names."""


class PlanRequest(Body, frozen=True, kw_only=True):
    """What the account should be."""

    declaration: Declaration


class ApplyRequest(Body, frozen=True, kw_only=True):
    """What the account should be. With the `number` of a plan, only if nothing changed since."""

    declaration: Declaration
    number: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """That a principal gains (or loses) a resource in some circumstances, first at `since`; no
    `until` where that has no end."""

    principal: str
    resource: str
    since: datetime
    until: datetime | None


class Accesses(msgspec.Struct, frozen=True, kw_only=True):
    """Who gains and who loses what. Not `complete` where more do than are named; not `exact` where
    conditions are too many to be worked out, so that some may do neither."""

    gained: tuple[Access, ...]
    lost: tuple[Access, ...]
    complete: bool
    exact: bool


class PlanView(msgspec.Struct, frozen=True, kw_only=True):
    """What an apply would do to the account as it is after change `number`, and what for people
    comes of it. `failing_tests` are those that would refuse it."""

    number: int
    steps: tuple[Step, ...]
    access: Accesses
    failing_tests: tuple[str, ...]


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What was done, and the number of the account's last change now. `steps` is null where it was
    too long to be kept for an `Idempotency-Key` that is given again."""

    number: int
    steps: tuple[Step, ...] | None

    def kept(self) -> bytes:
        """The body that is kept under a key."""
        whole = to_json(self)
        if len(whole) <= MAX_ANSWER_BYTES:
            return whole
        return to_json(Applied(number=self.number, steps=None))


@get("/")
async def get_declaration(desk: TheDesk) -> Declaration:
    """Export the account in normal form, without secrets."""
    async with desk.whole():
        contents = await desk.office.store.contents(desk.account_id)
        return await desk.work(lambda: export(contents))


@post("/plan", status_code=200, opt={VERB: "read"})
async def plan_declaration(desk: TheDesk, data: JSONBody[PlanRequest]) -> PlanView:
    """Show what applying a declaration would change, and who gains and loses what by it."""
    async with desk.whole():
        return await _rehearsed(desk, data.declaration)


async def _rehearsed(desk: Desk, declaration: Declaration) -> PlanView:
    contents, planned = await _planned(desk, declaration)
    now, regions = desk.now, desk.office.regions

    def rehearse() -> PlanView:
        proposal = propose(Snapshot.of(contents, regions), planned.mutations)
        failing = newly_failing_tests(proposal, now)
        return PlanView(
            number=planned.number,
            steps=planned.steps,
            access=_accesses(contents, proposal, now),
            failing_tests=tuple(each.test.name for each in failing),
        )

    return await desk.work(rehearse)


@post("/apply", status_code=200, opt={KEYED: True})
async def apply_declaration(desk: TheDesk, data: JSONBody[ApplyRequest]) -> Applied:
    """Make the account as declared, in one transaction. Sections that are left out are left alone.

    Refused (409) if a policy test would fail afterwards, if the caller's own token would be lost,
    or if the account changed since the `number` that is given.
    """
    async with desk.whole():
        try:
            return await _applied(desk, data)
        except Outdated:
            await _raise_if_applied(desk)
            raise


async def _applied(desk: Desk, data: ApplyRequest) -> Applied:
    contents, planned = await _planned(desk, data.declaration)
    if data.number not in (None, planned.number):
        raise Outdated(f"account {desk.account_id} is at change {planned.number}")
    if len(planned.mutations) > MAX_MUTATIONS:
        raise Problem(
            422,
            "too_many_changes",
            f"This makes {len(planned.mutations)} changes; one transaction takes {MAX_MUTATIONS}."
            " Apply it in parts: the first sections alone, then with those that refer to them.",
        )
    _check_caller(desk, contents, planned)
    await desk.check(planned.mutations)
    claim, now = desk.call.claim, desk.now
    try:
        changes = await desk.office.store.apply(
            desk.account_id,
            planned.mutations,
            who=desk.caller.who,
            at=now,
            number=planned.number,
            answer=None if claim is None or not planned.mutations else claim.answer(200, None, now),
            tell=lambda number: Applied(number=number, steps=planned.steps).kept(),
        )
    except Repeated as repeated:
        assert claim is not None
        raise claim.replay(repeated.record) from None
    return Applied(number=changes[-1].number if changes else planned.number, steps=planned.steps)


async def _raise_if_applied(desk: Desk) -> None:
    """Raises Replayed if the account has changed by this very call, which another node carried
    out meanwhile."""
    claim = desk.call.claim
    if claim is None:
        return
    known = await desk.office.store.answer_of(claim.token_id, claim.key)
    if known is not None and known.at > desk.now - ANSWER_KEPT:
        raise claim.replay(known)


# --- below: planning ---


async def _planned(desk: Desk, declaration: Declaration) -> tuple[Contents, Plan]:
    """Raises Problem 422 with all that is wrong."""
    checks = Checks()
    wanted = await desk.work(lambda: _canonical(checks, desk, declaration))
    checks.finish()
    contents = await _whole(desk)
    try:
        planned = await desk.work(
            lambda: plan(contents, wanted, new_id=desk.new_id, at=desk.now, vault=_DeskVault(desk))
        )
    except Undeclarable as error:
        faults = (FieldError(field=each.field, message=each.message) for each in error.faults)
        raise invalid(*faults) from None
    return contents, planned


async def _whole(desk: Desk) -> Contents:
    """The account with its sealed secrets, of which `contents` tells only that they are there.
    Raises Outdated."""
    store = desk.office.store
    contents = await store.contents(desk.account_id)
    entities = list(contents.entities)
    for place, entity in enumerate(entities):
        kind = KIND_OF[type(entity)]
        if kind in SECRETS and getattr(entity, SECRETS[kind]) is not None:
            try:
                entities[place] = await store.get(desk.account_id, kind, entity.id)
            except NotFound:
                raise Outdated(f"{kind} {entity.id} was removed meanwhile") from None
    return attrs.evolve(contents, entities=tuple(entities))


@attrs.frozen
class _DeskVault:
    """Secrets as the portal seals them for this account."""

    desk: Desk

    def seal(self, text: str, *, kind: EntityKind, field: str, id: UUID) -> SealedSecret:
        sealed = self.desk.seal(text, kind, field, id)
        assert sealed is not None
        return sealed

    def holds(
        self, sealed: SealedSecret, text: str, *, kind: EntityKind, field: str, id: UUID
    ) -> bool:
        if not allows(self.desk.caller.scopes, "declaration:write"):
            return False  # or else who may only read could try what it is
        try:
            kept = self.desk.office.key_ring.open(
                sealed, table=kind, column=field, account_id=self.desk.account_id, row_id=id
            )
        except CannotOpen:
            return False  # the key is gone: what is declared takes its place
        return kept.matches(text)


def _check_caller(desk: Desk, contents: Contents, planned: Plan) -> None:
    """Raises Problem 409 for who would lock out himself."""
    token = next((each for each in contents.entities if each.id == desk.caller.token_id), None)
    if not isinstance(token, Token) or token.principal_id is None:
        return
    puts = (each.entity for each in planned.mutations if isinstance(each, Put))
    gone = Remove("principal", token.principal_id) in planned.mutations
    own = next((each for each in puts if each.id == token.principal_id), None)
    if gone or (isinstance(own, Principal) and (own.disabled or own.role != "admin")):
        raise Problem(
            409,
            "locks_you_out",
            "Nothing was changed: the principal of your own token would be no enabled admin any"
            " more. Leave it as it is, or use the token of another admin.",
        )


def _accesses(contents: Contents, proposal: Proposal, now: datetime) -> Accesses:
    found = diff(proposal.before, proposal.after, now, edits=proposal.edits, limit=MAX_ACCESSES)
    before, after = Names(contents.entities), Names(proposal.after.entities())

    def told(changed: Changed) -> Access:
        def name(kind: EntityKind, id: UUID) -> str:
            return (after if id in after.by_kind[kind] else before).reference(kind, id)

        return Access(
            principal=name("principal", changed.principal_id),
            resource=name("resource", changed.resource_id),
            since=changed.spans[0].start,
            until=changed.spans[-1].until,
        )

    return Accesses(
        gained=tuple(map(told, found.gained)),
        lost=tuple(map(told, found.lost)),
        complete=found.complete,
        exact=found.exact,
    )


# --- below: values in the one form that we keep ---


class _At(Checks):
    """Checks of one entry: what is wrong is noted under its path."""

    def __init__(self, checks: Checks, path: str) -> None:
        super().__init__()
        self._checks = checks
        self._path = path

    def refuse(self, field: str, message: str) -> None:
        self._checks.refuse(f"{self._path}.{field}", message)


def _canonical(checks: Checks, desk: Desk, declaration: Declaration) -> Declaration:
    def each(section: str, tidy: Any) -> dict[str, Any]:
        entries = getattr(declaration, section)
        if entries is UNSET:
            return {}
        return {
            section: tuple(
                tidy(_At(checks, f"{section}[{i}]"), entry) for i, entry in enumerate(entries)
            )
        }

    def resource(checks: Checks, entry: ResourceEntry) -> ResourceEntry:
        address = check_address(checks, desk, entry.kind, entry.address)
        return structs.replace(entry, address=address)

    sections: Mapping[str, Any] = {
        **each("auth_providers", _auth_provider),
        **each("resources", resource),
        **each("policies", _policy),
        **each("policy_tests", _policy_test),
    }
    return structs.replace(declaration, **sections)


def _auth_provider(checks: Checks, entry: AuthProviderEntry) -> AuthProviderEntry:
    if entry.kind != "google":
        return entry
    if entry.issuer not in (None, GOOGLE_ISSUER):
        checks.refuse("issuer", f"of Google is {GOOGLE_ISSUER}")
    return structs.replace(entry, issuer=GOOGLE_ISSUER)


def _policy(checks: Checks, entry: PolicyEntry) -> PolicyEntry:
    fields = plain(entry.conditions)
    fields.pop("auth_provider", None)  # has names, which `plan` reads
    conditions = conditions_of(checks, msgspec.convert(fields, ConditionsBody))
    if entry.conditions.remote_ip is None or conditions.remote_ip is None:
        return entry
    remote_ip = structs.replace(entry.conditions.remote_ip, values=conditions.remote_ip.values)
    changed: ConditionsPart = structs.replace(entry.conditions, remote_ip=remote_ip)
    return structs.replace(entry, conditions=changed)


def _policy_test(checks: Checks, entry: PolicyTestEntry) -> PolicyTestEntry:
    facts_of(checks, "posture", [FactBody(name=f.name, value=f.value) for f in entry.posture])
    if entry.at is not None:
        checks.instant("at", entry.at)
    if entry.remote_ip is None:
        return entry
    return structs.replace(entry, remote_ip=checks.address("remote_ip", entry.remote_ip))


router = noun("declaration", get_declaration, plan_declaration, apply_declaration)
