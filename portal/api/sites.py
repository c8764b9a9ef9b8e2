"""Sites: places with gateways and resources. The site Internet is managed: its gateways carry the
internet resource."""

from __future__ import annotations

from typing import Any

from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from actors.model import NameField, Site
from portal.api.filters import filters
from portal.api.inject import PathId, TheDesk, TheFilters, ThePage
from portal.api.pagination import Page
from portal.api.problems import Problem
from portal.api.requests import Body, changes_of
from portal.api.scopes import noun


class SiteCreate(Body, frozen=True, kw_only=True):
    """A place; its gateways are the machines that enrol with its tokens."""

    name: NameField


class SiteUpdate(Body, frozen=True, kw_only=True):
    """A new name."""

    name: NameField | UnsetType = UNSET


@get("/", opt=filters(Site, "name", "kind"))
async def list_sites(desk: TheDesk, page: ThePage, filters: TheFilters) -> Page[Site]:
    """List sites."""
    return await desk.list(Site, page, filters)


@get("/{id:uuid}")
async def get_site(desk: TheDesk, id: PathId) -> Site:
    """Show a site."""
    return await desk.show(Site, id)


@post("/")
async def create_site(desk: TheDesk, data: JSONBody[SiteCreate]) -> Site:
    """Create a site. Names are unique within the account."""
    return await desk.create(
        Site(id=desk.new_id(), account_id=desk.account_id, name=data.name, created_at=desk.now)
    )


@patch("/{id:uuid}")
async def update_site(desk: TheDesk, id: PathId, data: JSONBody[SiteUpdate]) -> Site:
    """Rename a site."""

    def changes(site: Site) -> dict[str, Any]:
        refuse_managed(site)
        return changes_of(data)

    return await desk.update(Site, id, changes)


@delete("/{id:uuid}")
async def delete_site(desk: TheDesk, id: PathId) -> None:
    """Delete a site with its gateways and tokens, and the resources that lie nowhere else, with
    their policies."""
    await desk.remove(Site, id, refuse_managed)


def refuse_managed(site: Site) -> None:
    """Raises Problem 409 for the site Internet."""
    if site.kind == "internet":
        raise Problem(
            409, "managed_site", f"The site {site.name} is kept by Holloway. Make one of your own."
        )


router = noun("sites", list_sites, get_site, create_site, update_site, delete_site)
