"""Groups: sets of principals. The group Everyone is managed: all users, no service accounts.
Groups that a directory knows follow it."""

from __future__ import annotations

from typing import Any

from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from actors.model import Group, NameField
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.problems import Problem
from portal.api.requests import Body, changes_of
from portal.api.scopes import noun


class GroupCreate(Body, frozen=True, kw_only=True):
    """A static group; memberships put principals into it."""

    name: NameField


class GroupUpdate(Body, frozen=True, kw_only=True):
    """A new name."""

    name: NameField | UnsetType = UNSET


@get("/", opt=filters(Group, "name", "kind", "directory_id", "external_id"))
async def list_groups(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[Group]:
    """List groups."""
    return await desk.list(Group, page, filters)


@get("/{id:uuid}")
async def get_group(desk: TheDesk, id: PathId) -> Group:
    """Show a group."""
    return await desk.show(Group, id)


@post("/")
async def create_group(desk: TheDesk, data: JSONBody[GroupCreate]) -> Group:
    """Create a group. Names are unique within the account."""
    return await desk.create(
        Group(id=desk.new_id(), account_id=desk.account_id, name=data.name, created_at=desk.now)
    )


@patch("/{id:uuid}")
async def update_group(desk: TheDesk, id: PathId, data: JSONBody[GroupUpdate]) -> Group:
    """Rename a group."""

    def changes(group: Group) -> dict[str, Any]:
        refuse_managed(group)
        return changes_of(data)

    return await desk.update(Group, id, changes)


@delete("/{id:uuid}")
async def delete_group(desk: TheDesk, id: PathId) -> None:
    """Delete a group with its memberships and policies."""
    await desk.remove(Group, id, refuse_managed)


def refuse_managed(group: Group) -> None:
    """Raises Problem 409 for a group that is not of the admins' making."""
    keeper = {"everyone": "Holloway", "synced": "its directory"}.get(group.kind)
    if keeper is not None:
        raise Problem(
            409,
            "managed_group",
            f"The group {group.name} is kept by {keeper}. Make a group of your own.",
        )


router = noun("groups", list_groups, get_group, create_group, update_group, delete_group)
