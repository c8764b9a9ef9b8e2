"""Groups: sets of principals. The group Everyone is managed: all users, no service accounts."""

from __future__ import annotations

from litestar import Router, delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from actors.model import Group, NameField
from portal.api.inject import PathId, TheDesk, ThePage
from portal.api.pagination import Page
from portal.api.problems import Problem
from portal.api.requests import Body, changes_of


class GroupCreate(Body, frozen=True, kw_only=True):
    """A static group; memberships put principals into it."""

    name: NameField


class GroupUpdate(Body, frozen=True, kw_only=True):
    """A new name."""

    name: NameField | UnsetType = UNSET


@get("/")
async def list_groups(desk: TheDesk, page: ThePage) -> Page[Group]:
    """List groups."""
    return await desk.list(Group, page)


@get("/{id:uuid}")
async def get_group(desk: TheDesk, id: PathId) -> Group:
    """Show a group."""
    return await desk.get(Group, id)


@post("/")
async def create_group(desk: TheDesk, data: JSONBody[GroupCreate]) -> Group:
    """Create a group. Names are unique within the account."""
    return await desk.create(
        Group(id=desk.new_id(), account_id=desk.account_id, name=data.name, created_at=desk.now)
    )


@patch("/{id:uuid}")
async def update_group(desk: TheDesk, id: PathId, data: JSONBody[GroupUpdate]) -> Group:
    """Rename a group."""
    async with desk.revise(Group, id) as revision:
        refuse_managed(revision.entity)
        revision.changes = changes_of(data)
    return revision.entity


@delete("/{id:uuid}")
async def delete_group(desk: TheDesk, id: PathId) -> None:
    """Delete a group with its memberships and policies."""
    refuse_managed(await desk.get(Group, id))
    await desk.remove("group", id)


def refuse_managed(group: Group) -> None:
    """Raises Problem 409 for the managed group."""
    if group.kind == "everyone":
        raise Problem(
            409,
            "managed_group",
            "The group Everyone is kept by Holloway. Make a group of your own.",
        )


router = Router(
    "/v1/groups",
    route_handlers=[list_groups, get_group, create_group, update_group, delete_group],
    tags=["groups"],
)
