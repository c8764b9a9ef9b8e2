"""Sites: places with gateways and resources."""

from __future__ import annotations

from litestar import Router, delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from actors.model import NameField, Site
from portal.api.inject import PathId, TheDesk, ThePage
from portal.api.pagination import Page
from portal.api.requests import Body, changes_of


class SiteCreate(Body, frozen=True, kw_only=True):
    """A place; its gateways are the machines that enrol with its tokens."""

    name: NameField


class SiteUpdate(Body, frozen=True, kw_only=True):
    """A new name."""

    name: NameField | UnsetType = UNSET


@get("/")
async def list_sites(desk: TheDesk, page: ThePage) -> Page[Site]:
    """List sites."""
    return await desk.list(Site, page)


@get("/{id:uuid}")
async def get_site(desk: TheDesk, id: PathId) -> Site:
    """Show a site."""
    return await desk.get(Site, id)


@post("/")
async def create_site(desk: TheDesk, data: JSONBody[SiteCreate]) -> Site:
    """Create a site. Names are unique within the account."""
    return await desk.create(
        Site(id=desk.new_id(), account_id=desk.account_id, name=data.name, created_at=desk.now)
    )


@patch("/{id:uuid}")
async def update_site(desk: TheDesk, id: PathId, data: JSONBody[SiteUpdate]) -> Site:
    """Rename a site."""
    return await desk.update(Site, id, changes_of(data))


@delete("/{id:uuid}")
async def delete_site(desk: TheDesk, id: PathId) -> None:
    """Delete a site with its gateways, tokens, resources and their policies."""
    await desk.remove("site", id)


router = Router(
    "/v1/sites",
    route_handlers=[list_sites, get_site, create_site, update_site, delete_site],
    tags=["sites"],
)
