"""Accounts: tenants of the installation. Operators make them; their admins see their own, and set
what concerns it alone."""

from __future__ import annotations

from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, Literal
from uuid import UUID

import attrs
import msgspec
from litestar import delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType

from actors.model import (
    MAX_DNS_UPSTREAMS,
    MAX_RETENTION_DAYS,
    Account,
    AccountLimits,
    DnsUpstream,
    Group,
    NameField,
    Retention,
    Site,
    Slug,
)
from actors.store.interface import Put
from channel.reserved import RESERVED
from portal.api.authentication import require_operator
from portal.api.filters import filters
from portal.api.inject import PathId, TheCall, TheCaller, TheFilters, TheOffice, ThePage
from portal.api.office import Desk, desk_of
from portal.api.pagination import Page
from portal.api.problems import Problem
from portal.api.requests import NEVER_A_RESOURCE, Body, Checks, changes_of
from portal.api.scopes import NOUN, noun
from portal.api.tokens import TokenCreate, TokenCreated, create_token_at

EVERYONE = "Everyone"
INTERNET = "Internet"
OF_ADMINS = frozenset({"name", "search_domain", "dns_upstreams", "retention"})
RESOLVER_PREFIX = 24
SETTINGS = ("search_domain", "dns_upstreams", "limits", "retention")
RANGES = {
    name: str(attrs.fields_dict(Account)[name].default)
    for name in ("range_ipv4", "range_ipv6", "names_ipv4", "names_ipv6", "resolver_ipv4")
}
"""The addresses of an account unless its creation says otherwise."""
NAMES_AVOID = tuple((name, taken) for name, taken in RESERVED if name != "metadata")
"""Names are mapped to what never leaves the client, so a cloud's own addresses may lie among it."""

RangeText = Annotated[
    str, Meta(max_length=49, description="The network of all clients' and gateways' addresses.")
]
NamesText = Annotated[
    str, Meta(max_length=49, description="The network that names are mapped into.")
]
ResolverText = Annotated[
    str, Meta(max_length=15, description="Where the clients' resolver answers; its /24 is taken.")
]
Domain = Annotated[
    str, Meta(min_length=1, max_length=253, description="Appended to names of a single label.")
]


class DnsUpstreamBody(Body, frozen=True, kw_only=True):
    """A resolver: `do53` with an address (and port), or `doh` with an https URL."""

    kind: Literal["do53", "doh"]
    address: Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[!-~]+$(?!\n)")]


Upstreams = Annotated[
    tuple[DnsUpstreamBody, ...],
    Meta(
        max_length=MAX_DNS_UPSTREAMS,
        description="For names that are no resource; none means the device's own.",
    ),
]
Limit = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Days = Annotated[int, Meta(ge=1, le=MAX_RETENTION_DAYS)]


class LimitsBody(Body, frozen=True, kw_only=True):
    """How many of each there may be; null means the installation's limit, which is the highest."""

    principals: Limit | None = None
    groups: Limit | None = None
    sites: Limit | None = None
    resources: Limit | None = None
    policies: Limit | None = None
    policies_per_resource: Limit | None = None
    tokens: Limit | None = None
    clients: Limit | None = None
    gateways: Limit | None = None


class RetentionBody(Body, frozen=True, kw_only=True):
    """How many days each log is kept. `changes_days` is also how far back `at` can look."""

    changes_days: Days = 365
    authorizations_days: Days = 90
    sessions_days: Days = 90
    flows_days: Days = 30
    requests_days: Days = 90


class AccountCreate(Body, frozen=True, kw_only=True):
    """A new account. Its ranges cannot be changed later."""

    name: NameField
    slug: Slug
    range_ipv4: RangeText = RANGES["range_ipv4"]
    range_ipv6: RangeText = RANGES["range_ipv6"]
    names_ipv4: NamesText = RANGES["names_ipv4"]
    names_ipv6: NamesText = RANGES["names_ipv6"]
    resolver_ipv4: ResolverText = RANGES["resolver_ipv4"]
    search_domain: Domain | None = None
    dns_upstreams: Upstreams = ()
    limits: LimitsBody = LimitsBody()
    retention: RetentionBody = RetentionBody()


class AccountUpdate(Body, frozen=True, kw_only=True):
    """`slug`, `disabled` and `limits` are for operators."""

    name: NameField | UnsetType = UNSET
    slug: Slug | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET
    search_domain: Domain | UnsetType | None = UNSET
    dns_upstreams: Upstreams | UnsetType = UNSET
    limits: LimitsBody | UnsetType = UNSET
    retention: RetentionBody | UnsetType = UNSET


class AccountView(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant, and its settings."""

    id: UUID
    name: str
    slug: str
    disabled: bool
    range_ipv4: IPv4Network
    range_ipv6: IPv6Network
    names_ipv4: IPv4Network
    names_ipv6: IPv6Network
    resolver_ipv4: IPv4Address
    search_domain: str | None
    dns_upstreams: tuple[DnsUpstream, ...]
    limits: AccountLimits
    retention: Retention
    created_at: datetime

    @classmethod
    def of(cls, account: Account) -> AccountView:
        return cls(**{name: getattr(account, name) for name in cls.__struct_fields__})


@get("/", opt=filters(Account, "name", "slug", "disabled"))
async def list_accounts(
    caller: TheCaller,
    office: TheOffice,
    call: TheCall,
    page: ThePage,
    filters: TheFilters,
) -> Page[AccountView]:
    """List accounts: all of them for an operator, else the token's own."""
    if caller.account_id is not None:
        own = (await desk_of(office, caller, call, caller.account_id)).account
        is_wanted = all(getattr(own, field) == value for field, value in filters.items())
        return Page(items=(AccountView.of(own),) if is_wanted else (), next_cursor=None)
    found = await office.store.accounts(after=page.after_id(), limit=page.limit, equals=filters)
    return page.page(found, found[-1].id if found else None).of(AccountView.of)


@get("/{account_id:uuid}")
async def get_account(
    caller: TheCaller, office: TheOffice, call: TheCall, account_id: PathId
) -> AccountView:
    """Show an account."""
    account = (await desk_of(office, caller, call, account_id)).account
    call.show(account)
    return AccountView.of(account)


@post("/")
async def create_account(
    caller: TheCaller, office: TheOffice, call: TheCall, data: JSONBody[AccountCreate]
) -> AccountView:
    """Create an account, with its managed group Everyone and site Internet. For operators."""
    require_operator(caller)
    now = office.clock.utc_now()
    account = _new_account(office.new_id(), data, now)
    common: dict[str, Any] = {"account_id": account.id, "created_at": now}
    everyone = Group(id=office.new_id(), kind="everyone", name=EVERYONE, **common)
    internet = Site(id=office.new_id(), kind="internet", name=INTERNET, **common)
    desk = Desk(office=office, caller=caller, account=account, call=call)
    view = AccountView.of(account)
    await desk.create(account, Put(everyone), Put(internet), shown=view)
    return view


@patch("/{account_id:uuid}")
async def update_account(
    caller: TheCaller,
    office: TheOffice,
    call: TheCall,
    account_id: PathId,
    data: JSONBody[AccountUpdate],
) -> AccountView:
    """Change an account. Disabling it ends every access in it."""
    desk = await desk_of(office, caller, call, account_id)
    given = changes_of(data)
    if caller.kind != "operator" and given.keys() - OF_ADMINS:
        raise Problem(
            403, "operators_only", "Only an operator may change slug, disabled and limits."
        )
    checks = Checks()
    changes = _settings(checks, given)
    checks.finish()
    return AccountView.of(await desk.update(Account, account_id, changes))


@delete("/{account_id:uuid}")
async def delete_account(
    caller: TheCaller, office: TheOffice, call: TheCall, account_id: PathId
) -> None:
    """Delete an account and all that is in it. For operators; there is no way back."""
    desk = await desk_of(office, caller, call, account_id)
    require_operator(caller)
    await desk.remove(Account, account_id)


@post("/{account_id:uuid}/tokens", opt={NOUN: "tokens"})
async def create_account_token(
    caller: TheCaller,
    office: TheOffice,
    call: TheCall,
    account_id: PathId,
    data: JSONBody[TokenCreate],
) -> TokenCreated:
    """Create a token in this account, as `POST /v1/tokens` does in the caller's."""
    return await create_token_at(await desk_of(office, caller, call, account_id), data)


# --- below: from bodies to the model ---


def _new_account(id: UUID, data: AccountCreate, now: datetime) -> Account:
    checks = Checks()
    range_ipv4 = _range(checks, "range_ipv4", data.range_ipv4, 4, shortest=8, longest=24)
    range_ipv6 = _range(checks, "range_ipv6", data.range_ipv6, 6, shortest=32, longest=112)
    names_ipv4 = _range(checks, "names_ipv4", data.names_ipv4, 4, shortest=8, longest=22)
    names_ipv6 = _range(checks, "names_ipv6", data.names_ipv6, 6, shortest=32, longest=112)
    resolver = checks.address("resolver_ipv4", data.resolver_ipv4)
    if ":" in resolver:
        checks.refuse("resolver_ipv4", "must be an IPv4 address")
    settings = _settings(checks, changes_of(data))
    checks.finish()
    account = Account(
        id=id,
        name=data.name,
        slug=data.slug,
        range_ipv4=IPv4Network(range_ipv4),
        range_ipv6=IPv6Network(range_ipv6),
        names_ipv4=IPv4Network(names_ipv4),
        names_ipv6=IPv6Network(names_ipv6),
        resolver_ipv4=IPv4Address(resolver),
        created_at=now,
        **{field: settings[field] for field in SETTINGS},
    )
    _check_apart(checks, account)
    checks.finish()
    return account


def resolver_network(account: Account) -> IPv4Network:
    """The network around the account's resolver, which is nobody else's."""
    return IPv4Network((int(account.resolver_ipv4) >> 8 << 8, RESOLVER_PREFIX))


def _settings(checks: Checks, given: dict[str, Any]) -> dict[str, Any]:
    """The fields that are settings, as the model has them; the others as they are."""
    found = dict(given)
    if "search_domain" in found:
        found["search_domain"] = checks.host("search_domain", found["search_domain"])
    if "dns_upstreams" in found:
        found["dns_upstreams"] = tuple(
            DnsUpstream(kind=each.kind, address=each.address) for each in found["dns_upstreams"]
        )
    for field, kind in (("limits", AccountLimits), ("retention", Retention)):
        if field in found:
            found[field] = kind(**msgspec.structs.asdict(found[field]))
    return found


def _check_apart(checks: Checks, account: Account) -> None:
    """Addresses of agents, of names and of the resolver are never one another's."""
    resolver = resolver_network(account)
    if account.range_ipv4.overlaps(account.names_ipv4):
        checks.refuse("names_ipv4", "overlaps range_ipv4")
    if account.range_ipv6.overlaps(account.names_ipv6):
        checks.refuse("names_ipv6", "overlaps range_ipv6")
    if account.range_ipv4.overlaps(resolver):
        checks.refuse("resolver_ipv4", f"lies, with its {resolver}, in range_ipv4")
    if account.names_ipv4.subnet_of(resolver):
        checks.refuse("names_ipv4", f"lies in {resolver}, which is the resolver's")


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
    for name, taken in NAMES_AVOID if field.startswith("names") else NEVER_A_RESOURCE:
        if taken.version == network.version and network.overlaps(taken):
            checks.refuse(field, f"touches the {name} range {taken}")
    return text


router = noun(
    "accounts",
    list_accounts,
    get_account,
    create_account,
    update_account,
    delete_account,
    create_account_token,
)
