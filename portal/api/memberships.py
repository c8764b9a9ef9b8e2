"""Memberships: one principal in one group. They are made and deleted, never changed."""

from __future__ import annotations

from uuid import UUID

from litestar import delete, get, post
from litestar.params import JSONBody

from actors.model import Group, Membership
from portal.api.filters import filters
from portal.api.groups import refuse_managed
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body
from portal.api.scopes import noun


class MembershipCreate(Body, frozen=True, kw_only=True):
    """Puts a principal into a static group."""

    group_id: UUID
    principal_id: UUID


@get("/", opt=filters(Membership, "group_id", "principal_id"))
async def list_memberships(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[Membership]:
    """List memberships."""
    return await desk.list(Membership, page, filters)


@get("/{id:uuid}")
async def get_membership(desk: TheDesk, id: PathId) -> Membership:
    """Show a membership."""
    return await desk.show(Membership, id)


@post("/")
async def create_membership(desk: TheDesk, data: JSONBody[MembershipCreate]) -> Membership:
    """Put a principal into a group."""
    refuse_managed(await desk.refer(Group, data.group_id, "group_id"))
    return await desk.create(
        Membership(
            id=desk.new_id(),
            account_id=desk.account_id,
            group_id=data.group_id,
            principal_id=data.principal_id,
            created_at=desk.now,
        )
    )


@delete("/{id:uuid}")
async def delete_membership(desk: TheDesk, id: PathId) -> None:
    """Take a principal out of a group; what only that group allowed ends at once."""
    membership = await desk.get(Membership, id)
    refuse_managed(await desk.refer(Group, membership.group_id, "group_id"))
    await desk.remove(Membership, id)


router = noun("memberships", list_memberships, get_membership, create_membership, delete_membership)
