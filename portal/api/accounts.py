"""Accounts: tenants of the installation. Operators make them; their admins see their own."""

from __future__ import annotations

from datetime import datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import Account, Group, NameField, Slug
from actors.store.interface import Put
from portal.api.authentication import require_operator
from portal.api.inject import PathId, TheCaller, TheOffice, ThePage
from portal.api.office import Desk, desk_of
from portal.api.pagination import Page
from portal.api.problems import Problem
from portal.api.requests import NEVER_A_RESOURCE, Body, Checks, changes_of
from portal.api.tokens import TokenCreate, TokenCreated, create_token_at

EVERYONE = "Everyone"
RangeText = Annotated[
    str, Meta(max_length=49, description="The network of all clients' and gateways' addresses.")
]


class AccountCreate(Body, frozen=True, kw_only=True):
    """A new account. The tunnel ranges cannot be changed later."""

    name: NameField
    slug: Slug
    range_ipv4: RangeText = "100.64.0.0/11"
    range_ipv6: RangeText = "fd48:4c57:5900::/64"


class AccountUpdate(Body, frozen=True, kw_only=True):
    """`slug` and `disabled` are for operators."""

    name: NameField | UnsetType = UNSET
    slug: Slug | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET


class AccountView(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant."""

    id: UUID
    name: str
    slug: str
    disabled: bool
    range_ipv4: str
    range_ipv6: str
    created_at: datetime

    @classmethod
    def of(cls, account: Account) -> AccountView:
        return cls(
            id=account.id,
            name=account.name,
            slug=account.slug,
            disabled=account.disabled,
            range_ipv4=str(account.range_ipv4),
            range_ipv6=str(account.range_ipv6),
            created_at=account.created_at,
        )


@get("/")
async def list_accounts(
    caller: TheCaller,
    office: TheOffice,
    page: ThePage,
) -> Page[AccountView]:
    """List accounts: all of them for an operator, else the token's own."""
    if caller.account_id is not None:
        own = await desk_of(office, caller, caller.account_id)
        return Page(items=(AccountView.of(own.account),), next_cursor=None)
    found = await office.store.accounts(after=page.after_id(), limit=page.limit)
    items = tuple(map(AccountView.of, found))
    return page.page(items, found[-1].id if found else None)


@get("/{account_id:uuid}")
async def get_account(caller: TheCaller, office: TheOffice, account_id: PathId) -> AccountView:
    """Show an account."""
    return AccountView.of((await desk_of(office, caller, account_id)).account)


@post("/")
async def create_account(
    caller: TheCaller, office: TheOffice, data: JSONBody[AccountCreate]
) -> AccountView:
    """Create an account, with its managed group Everyone. For operators."""
    require_operator(caller)
    checks = Checks()
    range_ipv4 = _range(checks, "range_ipv4", data.range_ipv4, 4, shortest=8, longest=24)
    range_ipv6 = _range(checks, "range_ipv6", data.range_ipv6, 6, shortest=32, longest=112)
    checks.finish()
    now = office.clock.utc_now()
    account = Account(
        id=office.new_id(),
        name=data.name,
        slug=data.slug,
        range_ipv4=IPv4Network(range_ipv4),
        range_ipv6=IPv6Network(range_ipv6),
        created_at=now,
    )
    everyone = Group(
        id=office.new_id(), account_id=account.id, kind="everyone", name=EVERYONE, created_at=now
    )
    await office.store.apply(account.id, [Put(account), Put(everyone)], who=caller.who, at=now)
    return AccountView.of(account)


@patch("/{account_id:uuid}")
async def update_account(
    caller: TheCaller,
    office: TheOffice,
    account_id: PathId,
    data: JSONBody[AccountUpdate],
) -> AccountView:
    """Change an account. Disabling it ends every access in it."""
    desk = await desk_of(office, caller, account_id)
    changes: dict[str, Any] = changes_of(data)
    if caller.kind != "operator" and changes.keys() - {"name"}:
        raise Problem(403, "operators_only", "Only an operator may change slug and disabled.")
    return AccountView.of(await desk.update(Account, account_id, changes))


@delete("/{account_id:uuid}")
async def delete_account(caller: TheCaller, office: TheOffice, account_id: PathId) -> None:
    """Delete an account and all that is in it. For operators; there is no way back."""
    desk = await desk_of(office, caller, account_id)
    require_operator(caller)
    await desk.remove("account", account_id)


@post("/{account_id:uuid}/tokens")
async def create_account_token(
    caller: TheCaller,
    office: TheOffice,
    account_id: PathId,
    data: JSONBody[TokenCreate],
) -> TokenCreated:
    """Create a token in this account, as `POST /v1/tokens` does in the caller's."""
    desk: Desk = await desk_of(office, caller, account_id)
    return await create_token_at(desk, data)


def _range(
    checks: Checks, field: str, text: str, version: int, *, shortest: int, longest: int
) -> str:
    text = checks.network(field, text)
    try:
        network = ip_network(text)
    except ValueError:
        return text  # refused already
    if network.version != version:
        checks.refuse(field, f"must be a network of IPv{version}")
    elif not shortest <= network.prefixlen <= longest:
        checks.refuse(field, f"must have a prefix of {shortest} to {longest} bits")
    for name, taken in NEVER_A_RESOURCE:
        if taken.version == network.version and network.overlaps(taken):
            checks.refuse(field, f"touches the {name} range {taken}")
    return text


router = Router(
    "/v1/accounts",
    route_handlers=[
        list_accounts,
        get_account,
        create_account,
        update_account,
        delete_account,
        create_account_token,
    ],
    tags=["accounts"],
)
