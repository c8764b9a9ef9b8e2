"""Memberships: one principal in one group. They are made and deleted, never changed."""

from __future__ import annotations

from uuid import UUID

from litestar import Router, delete, get, post
from litestar.params import JSONBody

from actors.model import Group, Membership
from actors.store.interface import InvalidReference
from portal.api.groups import refuse_managed
from portal.api.inject import PathId, TheDesk, ThePage
from portal.api.pagination import Page
from portal.api.problems import Problem, of_store
from portal.api.requests import Body


class MembershipCreate(Body, frozen=True, kw_only=True):
    """Puts a principal into a static group."""

    group_id: UUID
    principal_id: UUID


@get("/")
async def list_memberships(desk: TheDesk, page: ThePage) -> Page[Membership]:
    """List memberships."""
    return await desk.list(Membership, page)


@get("/{id:uuid}")
async def get_membership(desk: TheDesk, id: PathId) -> Membership:
    """Show a membership."""
    return await desk.get(Membership, id)


@post("/")
async def create_membership(desk: TheDesk, data: JSONBody[MembershipCreate]) -> Membership:
    """Put a principal into a group."""
    try:
        refuse_managed(await desk.get(Group, data.group_id))
    except Problem as problem:
        if problem.status == 404:
            raise of_store(InvalidReference("membership", "group_id")) from None
        raise
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
    await desk.remove("membership", id)


router = Router(
    "/v1/memberships",
    route_handlers=[list_memberships, get_membership, create_membership, delete_membership],
    tags=["memberships"],
)
