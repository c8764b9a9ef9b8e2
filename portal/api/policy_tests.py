"""Policy tests: what must stay so. A change after which one of them fails is refused."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import ENTITIES, REFERENCES, NameField, PolicyTest
from channel.messages import IpText
from portal.api.conditions import Facts, facts_of
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.office import Desk
from portal.api.pagination import Page
from portal.api.requests import Body, Checks, Instant, changes_of
from portal.api.scopes import noun

Expected = Literal["allowed", "denied"]
AddressOfClient = Annotated[str, Meta(max_length=45, description="The client's public address.")]


class PolicyTestCreate(Body, frozen=True, kw_only=True):
    """That a principal may, or may not, reach a resource in these circumstances. `at` is the
    instant of the question, by default that of the change; what is not named is unknown."""

    name: NameField
    principal_id: UUID
    resource_id: UUID
    expected: Expected
    at: Instant | None = None
    remote_ip: AddressOfClient | None = None
    auth_provider_id: UUID | None = None
    client_verified: bool | None = None
    posture: Facts = ()


class PolicyTestUpdate(Body, frozen=True, kw_only=True):
    """A changed test has to hold at once, as a new one does."""

    name: NameField | UnsetType = UNSET
    principal_id: UUID | UnsetType = UNSET
    resource_id: UUID | UnsetType = UNSET
    expected: Expected | UnsetType = UNSET
    at: Instant | UnsetType | None = UNSET
    remote_ip: AddressOfClient | UnsetType | None = UNSET
    auth_provider_id: UUID | UnsetType | None = UNSET
    client_verified: bool | UnsetType | None = UNSET
    posture: Facts | UnsetType = UNSET


@get("/", opt=filters(PolicyTest, "name", "principal_id", "resource_id", "expected"))
async def list_policy_tests(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[PolicyTest]:
    """List policy tests."""
    return await desk.list(PolicyTest, page, filters)


@get("/{id:uuid}")
async def get_policy_test(desk: TheDesk, id: PathId) -> PolicyTest:
    """Show a policy test."""
    return await desk.show(PolicyTest, id)


@post("/")
async def create_policy_test(desk: TheDesk, data: JSONBody[PolicyTestCreate]) -> PolicyTest:
    """Create a policy test. It has to hold now: 409 `policy_test_failed` otherwise."""
    fields = await _checked(desk, changes_of(data))
    return await desk.create(
        PolicyTest(id=desk.new_id(), account_id=desk.account_id, created_at=desk.now, **fields)
    )


@patch("/{id:uuid}")
async def update_policy_test(
    desk: TheDesk, id: PathId, data: JSONBody[PolicyTestUpdate]
) -> PolicyTest:
    """Change a policy test."""
    return await desk.update(PolicyTest, id, await _checked(desk, changes_of(data)))


@delete("/{id:uuid}")
async def delete_policy_test(desk: TheDesk, id: PathId) -> None:
    """Delete a policy test."""
    await desk.remove(PolicyTest, id)


async def _checked(desk: Desk, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as the model has them. What they name is looked for first: a test that names
    nothing would be said to fail otherwise. Raises Problem 404, 422."""
    checks = Checks()
    if fields.get("remote_ip") is not None:
        address = checks.address("remote_ip", fields["remote_ip"])
        fields["remote_ip"] = address
    if "posture" in fields:
        fields["posture"] = facts_of(checks, "posture", fields["posture"])
    if isinstance(fields.get("at"), datetime):
        fields["at"] = checks.instant("at", fields["at"])
    checks.finish()
    if fields.get("remote_ip") is not None:
        fields["remote_ip"] = IpText(fields["remote_ip"])
    for field, kind in REFERENCES["policy_test"].items():
        if fields.get(field) is not None:
            await desk.refer(ENTITIES[kind], fields[field], field)
    return fields


router = noun(
    "policy_tests",
    list_policy_tests,
    get_policy_test,
    create_policy_test,
    update_policy_test,
    delete_policy_test,
)
