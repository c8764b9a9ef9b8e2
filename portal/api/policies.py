"""Policies: members of a group may reach a resource while conditions hold; and why, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated
from uuid import UUID

import msgspec
from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import (
    DEFAULT_LEASE_S,
    MIN_LEASE_S,
    Client,
    Description,
    Gateway,
    Policy,
    Resource,
)
from actors.policy.engine import Denied, Snapshot
from actors.policy.engine import Request as PolicyRequest
from actors.policy.explain import Check, PolicyTrace, explain, summary
from actors.store.interface import Contents
from channel.messages import IpText
from portal.api.conditions import ConditionsBody, conditions_of
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.office import Online
from portal.api.pagination import Page
from portal.api.problems import Problem
from portal.api.requests import Body, Checks, Instant, canonical_source, changes_of
from portal.api.scopes import VERB, noun

Lease = Annotated[
    int,
    Meta(
        ge=MIN_LEASE_S,
        le=DEFAULT_LEASE_S,
        description="Seconds for which an access outlives the loss of the portal.",
    ),
]


class PolicyCreate(Body, frozen=True, kw_only=True):
    """Lets the members of one group reach one resource."""

    group_id: UUID
    resource_id: UUID
    conditions: ConditionsBody = ConditionsBody()
    disabled: bool = False
    description: Description = ""
    expires_at: Instant | None = None
    lease_s: Lease = DEFAULT_LEASE_S


class PolicyUpdate(Body, frozen=True, kw_only=True):
    """Whatever is no longer allowed after the change is cut at once."""

    group_id: UUID | UnsetType = UNSET
    resource_id: UUID | UnsetType = UNSET
    conditions: ConditionsBody | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    expires_at: Instant | UnsetType | None = UNSET
    lease_s: Lease | UnsetType = UNSET


class ExplainRequest(Body, frozen=True, kw_only=True):
    """A question: may this client, or any device of this principal, reach this resource?

    Name a `client_id` or a `principal_id`. `remote_ip` is the client's public address (by default
    that of its connection, else unknown), `token_id` the token of its session (by default the one
    it enrolled with), `at` an instant (by default now).
    """

    resource_id: UUID
    client_id: UUID | None = None
    principal_id: UUID | None = None
    remote_ip: Annotated[str, Meta(max_length=45)] | None = None
    token_id: UUID | None = None
    at: Instant | None = None


class ExplainAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The decision, in a `sentence` and in parts: what holds whatever the policy (`common`), and
    what each policy of the resource says. `gateways_online` are those of the resource's site; null
    if that cannot be told just now."""

    allowed: bool
    sentence: str
    policy_id: UUID | None
    expires_at: datetime | None
    reason: str
    violated: tuple[str, ...]
    at: datetime
    common: tuple[Check, ...]
    policies: tuple[PolicyTrace, ...]
    gateways_online: tuple[UUID, ...] | None


@get("/", opt=filters(Policy, "group_id", "resource_id", "disabled"))
async def list_policies(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[Policy]:
    """List policies."""
    return await desk.list(Policy, page, filters)


@get("/{id:uuid}")
async def get_policy(desk: TheDesk, id: PathId) -> Policy:
    """Show a policy."""
    return await desk.show(Policy, id)


@post("/")
async def create_policy(desk: TheDesk, data: JSONBody[PolicyCreate]) -> Policy:
    """Create a policy. It takes effect at once."""
    checks = Checks()
    conditions = conditions_of(checks, data.conditions)
    expires_at = checks.future("expires_at", data.expires_at, desk.now)
    checks.finish()
    return await desk.create(
        Policy(
            id=desk.new_id(),
            account_id=desk.account_id,
            group_id=data.group_id,
            resource_id=data.resource_id,
            conditions=conditions,
            disabled=data.disabled,
            description=data.description,
            expires_at=expires_at,
            lease_s=data.lease_s,
            created_at=desk.now,
        )
    )


@patch("/{id:uuid}")
async def update_policy(desk: TheDesk, id: PathId, data: JSONBody[PolicyUpdate]) -> Policy:
    """Change a policy."""
    checks = Checks()
    changes = changes_of(data)
    if "conditions" in changes:
        changes["conditions"] = conditions_of(checks, changes["conditions"])
    if "expires_at" in changes:
        changes["expires_at"] = checks.future("expires_at", changes["expires_at"], desk.now)
    checks.finish()
    return await desk.update(Policy, id, changes)


@delete("/{id:uuid}")
async def delete_policy(desk: TheDesk, id: PathId) -> None:
    """Delete a policy; accesses that no other policy allows end at once."""
    await desk.remove(Policy, id)


@post("/explain", status_code=200, opt={VERB: "read"})
async def explain_policies(desk: TheDesk, data: JSONBody[ExplainRequest]) -> ExplainAnswer:
    """Explain who may reach what, and why. Nothing is changed."""
    checks = Checks()
    instant = desk.now if data.at is None else checks.instant("at", data.at)
    remote_ip = _remote_ip(checks, data.remote_ip)
    if (data.client_id is None) == (data.principal_id is None):
        checks.refuse("client_id", "name either a client_id or a principal_id")
    checks.finish()
    online = await desk.office.live.online(desk.account_id)
    contents = await desk.office.store.contents(desk.account_id)
    known = {entity.id: entity for entity in contents.entities}
    for field in ("resource_id", "client_id", "principal_id", "token_id"):
        id = getattr(data, field)
        if id is not None and id not in known:
            raise Problem(404, "not_found", f"{field} names nothing in this account.")
    client = known.get(data.client_id) if data.client_id else None
    token_id = client.token_id if isinstance(client, Client) else None
    connection = None if data.client_id is None else (online or {}).get(data.client_id)
    request = PolicyRequest(
        client_id=data.client_id,
        principal_id=data.principal_id,
        resource_id=data.resource_id,
        remote_ip=remote_ip or (connection.remote_ip if connection else None),
        token_id=data.token_id or token_id,
    )
    explanation = explain(Snapshot.of(contents, desk.office.regions), request, instant)
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
        gateways_online=_gateways_online(contents, data.resource_id, online),
    )


# --- below: from bodies to the model ---


def _gateways_online(
    contents: Contents, resource_id: UUID, online: Mapping[UUID, Online] | None
) -> tuple[UUID, ...] | None:
    if online is None:
        return None
    entities = contents.entities
    sites = {
        site_id
        for each in entities
        if isinstance(each, Resource) and each.id == resource_id
        for site_id in each.site_ids
    }
    return tuple(
        each.id
        for each in entities
        if isinstance(each, Gateway) and each.site_id in sites and each.id in online
    )


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
    list_policies,
    get_policy,
    create_policy,
    update_policy,
    delete_policy,
    explain_policies,
)
