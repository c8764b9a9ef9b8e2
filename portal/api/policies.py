"""Policies: members of a group may reach a resource while conditions hold. What can be asked of
them is in `portal.api.questions`."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import (
    DEFAULT_LEASE_S,
    MIN_LEASE_S,
    AuthProvider,
    Conditions,
    Description,
    Policy,
)
from portal.api.conditions import ConditionsBody, conditions_of
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.office import Desk
from portal.api.pagination import Page
from portal.api.requests import Body, Checks, Instant, changes_of
from portal.api.scopes import noun

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
    await _check_providers(desk, conditions)
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
    if "conditions" in changes:
        await _check_providers(desk, changes["conditions"])
    return await desk.update(Policy, id, changes)


@delete("/{id:uuid}")
async def delete_policy(desk: TheDesk, id: PathId) -> None:
    """Delete a policy; accesses that no other policy allows end at once."""
    await desk.remove(Policy, id)


async def _check_providers(desk: Desk, conditions: Conditions) -> None:
    """Raises Problem 404 for a provider that is not there: the condition could never hold, or,
    turned round, would always."""
    asked = conditions.auth_provider
    for place, id in enumerate(() if asked is None else asked.values):
        await desk.refer(AuthProvider, id, f"conditions.auth_provider.values[{place}]")


router = noun("policies", list_policies, get_policy, create_policy, update_policy, delete_policy)
