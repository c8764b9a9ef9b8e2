"""Directories: where principals and groups are synchronised from. Their credentials go in and never
come out."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec
from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from actors.model import Directory, NameField
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body, SecretText, changes_of
from portal.api.scopes import noun

Kind = Literal["google", "okta", "entra", "scim"]


class DirectoryCreate(Body, frozen=True, kw_only=True):
    """A directory. `credentials` is what its kind is read with, such as a key file's JSON."""

    kind: Kind
    name: NameField
    credentials: SecretText | None = None


class DirectoryUpdate(Body, frozen=True, kw_only=True):
    """`credentials` replace those that are kept; null forgets them. A disabled directory is not
    read; what it brought stays."""

    name: NameField | UnsetType = UNSET
    credentials: SecretText | UnsetType | None = UNSET
    disabled: bool | UnsetType = UNSET


class DirectoryView(msgspec.Struct, frozen=True, kw_only=True):
    """A directory, when it was last read, and what went wrong then."""

    id: UUID
    account_id: UUID
    kind: Kind
    name: str
    has_credentials: bool
    disabled: bool
    synced_at: datetime | None
    last_error: str
    created_at: datetime

    @classmethod
    def of(cls, directory: Directory) -> DirectoryView:
        fields = {
            name: getattr(directory, name)
            for name in cls.__struct_fields__
            if name != "has_credentials"
        }
        return cls(has_credentials=directory.credentials is not None, **fields)


@get("/", opt=filters(Directory, "name", "kind", "disabled"))
async def list_directories(
    desk: TheDesk, page: ThePage, filters: TheFilters
) -> Page[DirectoryView]:
    """List directories."""
    return (await desk.list(Directory, page, filters)).of(DirectoryView.of)


@get("/{id:uuid}")
async def get_directory(desk: TheDesk, id: PathId) -> DirectoryView:
    """Show a directory."""
    return DirectoryView.of(await desk.show(Directory, id))


@post("/")
async def create_directory(desk: TheDesk, data: JSONBody[DirectoryCreate]) -> DirectoryView:
    """Create a directory."""
    id = desk.new_id()
    directory = Directory(
        id=id,
        account_id=desk.account_id,
        kind=data.kind,
        name=data.name,
        credentials=desk.seal(data.credentials, "directory", "credentials", id),
        created_at=desk.now,
    )
    view = DirectoryView.of(directory)
    await desk.create(directory, shown=view)
    return view


@patch("/{id:uuid}")
async def update_directory(
    desk: TheDesk, id: PathId, data: JSONBody[DirectoryUpdate]
) -> DirectoryView:
    """Change a directory."""
    changes = changes_of(data)
    if "credentials" in changes:
        changes["credentials"] = desk.seal(changes["credentials"], "directory", "credentials", id)
    return DirectoryView.of(await desk.update(Directory, id, changes))


@delete("/{id:uuid}")
async def delete_directory(desk: TheDesk, id: PathId) -> None:
    """Delete a directory with the groups that follow it, and their policies."""
    await desk.remove(Directory, id)


router = noun(
    "directories",
    list_directories,
    get_directory,
    create_directory,
    update_directory,
    delete_directory,
)
