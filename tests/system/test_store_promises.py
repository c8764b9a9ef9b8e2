"""The promises of `Store`, one by one, kept by both stores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Any
from uuid import UUID

import attrs
import pytest

from actors.limits import POLICIES_PER_RESOURCE
from actors.model import (
    Account,
    AccountLimits,
    Authorization,
    Client,
    Gateway,
    Group,
    Membership,
    Policy,
    Principal,
    Relay,
    Resource,
    Site,
    Token,
)
from actors.store.interface import (
    MAX_PAGE,
    Conflict,
    Fenced,
    Invalid,
    InvalidReference,
    Mutation,
    NotFound,
    Outdated,
    Put,
    Remove,
    Store,
    TooMany,
)
from actors.store.memory import MemoryStore
from actors.store.postgres import PostgresStore
from channel.messages import IpText, SocketAddress
from tests.nodes import joined

pytestmark = pytest.mark.system

AT = datetime(2026, 1, 1, tzinfo=UTC)
ACME = Account(id=UUID(int=0xA), name="Acme", slug="acme", created_at=AT)
BETA = Account(id=UUID(int=0xB), name="Beta", slug="beta", created_at=AT)
OF_ACME: dict[str, Any] = {"account_id": ACME.id, "created_at": AT}
ANN = Principal(**OF_ACME, id=UUID(int=1), name="Ann")
STAFF = Group(**OF_ACME, id=UUID(int=2), name="Staff")
ANN_IN_STAFF = Membership(**OF_ACME, id=UUID(int=3), group_id=STAFF.id, principal_id=ANN.id)
HALL = Site(**OF_ACME, id=UUID(int=4), name="Hall")
WEB = Resource(
    **OF_ACME, id=UUID(int=5), site_ids=(HALL.id,), name="web", kind="ip", address="10.0.0.1"
)
POLICY = Policy(**OF_ACME, id=UUID(int=6), group_id=STAFF.id, resource_id=WEB.id)
TOKEN = Token(
    **OF_ACME, id=UUID(int=7), kind="client", name="t", hash=bytes(32), principal_id=ANN.id,
    max_uses=1,
)  # fmt: skip
JOINING = Token(
    **OF_ACME, id=UUID(int=8), kind="gateway", name="g", hash=bytes(32), site_id=HALL.id
)
LAPTOP = Client(
    **OF_ACME, id=UUID(int=9), principal_id=ANN.id, token_id=TOKEN.id, device_key=bytes(32),
    name="laptop", ipv4=IPv4Address("100.64.0.1"), ipv6=IPv6Address("fd48:4c57:5900::1"),
)  # fmt: skip
DOOR = Gateway(
    **OF_ACME, id=UUID(int=10), site_id=HALL.id, token_id=JOINING.id, device_key=bytes(32),
    name="door", ipv4=IPv4Address("100.64.0.2"), ipv6=IPv6Address("fd48:4c57:5900::2"),
)  # fmt: skip
EVERYTHING = (ACME, ANN, STAFF, ANN_IN_STAFF, HALL, WEB, POLICY, TOKEN, JOINING, LAPTOP, DOOR)
ACCESS = Authorization(
    id=UUID(int=11), account_id=ACME.id, policy_id=POLICY.id, client_id=LAPTOP.id,
    gateway_id=DOOR.id, resource_id=WEB.id, token_id=TOKEN.id, connection_id=UUID(int=12),
    remote_ip=IpText("192.0.2.1"), created_at=AT, expires_at=AT + timedelta(hours=1),
)  # fmt: skip
RELAY_TOKEN = Token(
    id=UUID(int=13), account_id=None, kind="relay", name="r", hash=bytes(32), created_at=AT
)
RELAY = Relay(
    id=UUID(int=14), token_id=RELAY_TOKEN.id, name="r", last_seen_at=AT, region="eu",
    addresses=(SocketAddress(address=IpText("192.0.2.9"), port=3478),),
)  # fmt: skip


@pytest.fixture(params=["memory", "postgres"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    database = request.getfixturevalue("database")
    async with PostgresStore.open(database, migrated=True) as postgres:
        yield postgres


async def apply(store: Store, *mutations: Mutation) -> list[tuple[int, str, bool]]:
    """Number, kind, and whether something is there afterwards, of each change."""
    changes = await store.apply(ACME.id, mutations, who="test", at=AT)
    return [(change.number, change.kind, change.after is not None) for change in changes]


async def fill(store: Store) -> None:
    await apply(store, *map(Put, EVERYTHING))


# --- changes -------------------------------------------------------------------------------------


async def test_each_change_tells_who_when_and_what_was_before_and_after(store: Store) -> None:
    await apply(store, Put(ACME), Put(HALL))
    later = AT + timedelta(seconds=1.5)
    renamed = attrs.evolve(HALL, name="Loft")
    (edited,) = await store.apply(ACME.id, [Put(renamed)], who="token 7", at=later)
    assert (edited.number, edited.who, edited.at) == (3, "token 7", later)
    assert (edited.before, edited.after, edited.entity_id) == (HALL, renamed, HALL.id)
    (removed,) = await store.apply(ACME.id, [Remove("site", HALL.id)], who="token 7", at=later)
    assert (removed.before, removed.after) == (renamed, None)
    assert await store.changes(ACME.id, after=2) == (edited, removed)
    assert await store.changes(ACME.id, after=2, limit=1) == (edited,)


async def test_a_put_of_what_is_there_makes_no_change(store: Store) -> None:
    await fill(store)
    assert await apply(store, *map(Put, EVERYTHING)) == []
    assert (await store.contents(ACME.id)).number == len(EVERYTHING)


async def test_who_writes_back_what_it_read_takes_no_change_back(store: Store) -> None:
    await fill(store)
    moved, renamed = attrs.evolve(HALL, name="Loft"), attrs.evolve(HALL, name="Attic")
    assert await apply(store, Put(moved, before=HALL)) == [(12, "site", True)]
    with pytest.raises(Outdated):
        await apply(store, Put(renamed, before=HALL))
    assert await apply(store, Put(moved, before=HALL)) == [], "it may be said again"
    assert await apply(store, Put(renamed, before=moved)) == [(13, "site", True)]
    await apply(store, Remove("site", HALL.id))
    number = (await store.contents(ACME.id)).number
    with pytest.raises(Outdated):
        await apply(store, Put(moved, before=renamed))
    assert (await store.contents(ACME.id)).number == number


async def test_no_mutation_at_all_is_no_change(store: Store) -> None:
    assert await apply(store) == []
    assert await store.changes(ACME.id, after=0) == ()


async def test_of_a_refused_transaction_nothing_remains(store: Store) -> None:
    await fill(store)
    before = await store.contents(ACME.id)
    with pytest.raises(Conflict):
        await apply(
            store,
            Remove("principal", ANN.id),
            Put(attrs.evolve(HALL, name="Loft")),
            Put(attrs.evolve(HALL, id=UUID(int=99), name="Loft")),
        )
    assert await store.contents(ACME.id) == before
    assert await store.find_token(TOKEN.id) == TOKEN
    assert await apply(store, Put(attrs.evolve(HALL, name="Loft"))) == [(12, "site", True)]


async def test_removal_takes_whatever_refers_along_the_referrer_first(store: Store) -> None:
    await fill(store)
    assert await apply(store, Remove("principal", ANN.id)) == [
        (12, "membership", False),
        (13, "client", False),
        (14, "token", False),
        (15, "principal", False),
    ]
    assert await apply(store, Remove("site", HALL.id)) == [
        (16, "policy", False),
        (17, "resource", False),
        (18, "gateway", False),
        (19, "token", False),
        (20, "site", False),
    ]


async def test_an_account_goes_with_everything_in_it_and_its_numbers_go_on(store: Store) -> None:
    await fill(store)
    removals = await apply(store, Remove("account", ACME.id))
    assert [number for number, _, _ in removals] == list(range(12, 23))
    assert removals[-1] == (22, "account", False)
    with pytest.raises(NotFound):
        await store.contents(ACME.id)
    assert await store.accounts() == ()
    assert await store.find_token(TOKEN.id) is None
    assert len(await store.changes(ACME.id, after=0)) == 22
    assert await apply(store, Put(ACME)) == [(23, "account", True)]


async def test_an_account_removed_and_made_again_at_once_is_empty_and_fenced(store: Store) -> None:
    await fill(store)
    epoch = await store.acquire(ACME.id, **await joined(store, "node"))
    await store.write_authorization(ACCESS, epoch=epoch)
    await apply(store, Remove("account", ACME.id), Put(ACME))
    assert (await store.contents(ACME.id)).entities == ()
    assert await store.authorizations(ACME.id) == ()
    for guess in (epoch, epoch + 1):
        with pytest.raises(Fenced):
            await store.write_authorization(ACCESS, epoch=guess)
    assert await store.acquire(ACME.id, **await joined(store, "node")) > epoch


async def test_nothing_goes_into_an_account_that_is_not_there(store: Store) -> None:
    with pytest.raises(NotFound):
        await apply(store, Put(HALL))
    with pytest.raises(NotFound):
        await apply(store, Put(ACME), Remove("account", ACME.id), Put(HALL))
    assert await store.changes(ACME.id, after=0) == ()


async def test_an_entity_of_another_account_is_a_mistake_of_the_caller(store: Store) -> None:
    await fill(store)
    for entity in (BETA, attrs.evolve(HALL, account_id=BETA.id)):
        with pytest.raises(ValueError, match="belongs"):
            await apply(store, Put(entity))


# --- what must be unique, what must exist --------------------------------------------------------


@pytest.mark.parametrize(
    ("entity", "kind", "field"),
    [
        (attrs.evolve(STAFF, id=UUID(int=99)), "group", "name"),
        (attrs.evolve(HALL, id=UUID(int=99)), "site", "name"),
        (attrs.evolve(WEB, id=UUID(int=99)), "resource", "name"),
        (attrs.evolve(ANN_IN_STAFF, id=UUID(int=99)), "membership", "principal_id"),
        (attrs.evolve(LAPTOP, id=UUID(int=99)), "client", "device_key"),
        (attrs.evolve(DOOR, id=UUID(int=99)), "gateway", "device_key"),
        (attrs.evolve(LAPTOP, ipv4=DOOR.ipv4), "client", "ipv4"),
        (attrs.evolve(LAPTOP, ipv6=DOOR.ipv6), "client", "ipv6"),
        (attrs.evolve(DOOR, ipv4=LAPTOP.ipv4), "gateway", "ipv4"),
    ],
)
async def test_what_is_taken_within_the_account_is_refused_by_its_name(
    store: Store, entity: Any, kind: str, field: str
) -> None:
    await fill(store)
    with pytest.raises(Conflict) as refusal:
        await apply(store, Put(entity))
    assert (refusal.value.kind, refusal.value.field) == (kind, field)


async def test_an_account_has_one_group_everyone(store: Store) -> None:
    everyone = Group(**OF_ACME, id=UUID(int=98), name="Everyone", kind="everyone")
    await apply(store, Put(ACME), Put(everyone), Put(everyone))
    with pytest.raises(Conflict) as refusal:
        await apply(store, Put(attrs.evolve(everyone, id=UUID(int=99), name="All")))
    assert (refusal.value.kind, refusal.value.field) == ("group", "kind")


async def test_another_account_may_use_the_same_names_keys_addresses_and_ids(store: Store) -> None:
    await fill(store)
    tokens = {TOKEN.id: UUID(int=0x7B), JOINING.id: UUID(int=0x8B)}
    theirs: list[Mutation] = [Put(BETA)]
    for entity in EVERYTHING[1:]:
        other = attrs.evolve(entity, account_id=BETA.id)
        if isinstance(other, Token):
            other = attrs.evolve(other, id=tokens[other.id])
        if isinstance(other, Client | Gateway):
            other = attrs.evolve(other, token_id=tokens[other.token_id])
        theirs.append(Put(other))
    changes = await store.apply(BETA.id, theirs, who="test", at=AT)
    assert [change.number for change in changes] == list(range(1, 12))
    assert await store.get(ACME.id, "client", LAPTOP.id) == LAPTOP
    assert (await store.get(BETA.id, "client", LAPTOP.id)) != LAPTOP


async def test_a_slug_and_the_id_of_a_token_are_unique_in_the_installation(store: Store) -> None:
    await fill(store)
    with pytest.raises(Conflict, match="slug"):
        await store.apply(BETA.id, [Put(attrs.evolve(BETA, slug="acme"))], who="t", at=AT)
    api = attrs.evolve(TOKEN, account_id=BETA.id)
    person = attrs.evolve(ANN, account_id=BETA.id)
    with pytest.raises(Conflict, match="id"):
        await store.apply(BETA.id, [Put(BETA), Put(person), Put(api)], who="t", at=AT)
    with pytest.raises(Conflict, match="id"):
        await store.put_installation_token(attrs.evolve(RELAY_TOKEN, id=TOKEN.id))


async def test_a_name_and_an_address_are_free_again_once_they_are_given_up(store: Store) -> None:
    await fill(store)
    await apply(
        store,
        Put(attrs.evolve(HALL, name="Loft")),
        Put(attrs.evolve(HALL, id=UUID(int=99))),
        Put(attrs.evolve(LAPTOP, ipv4=IPv4Address("100.64.0.3"))),
        Put(attrs.evolve(DOOR, ipv4=LAPTOP.ipv4)),
        Remove("client", LAPTOP.id),
        Put(attrs.evolve(DOOR, ipv4=IPv4Address("100.64.0.3"), ipv6=LAPTOP.ipv6)),
    )


async def test_tunnel_addresses_lie_in_the_accounts_ranges_whichever_of_both_changes(
    store: Store,
) -> None:
    await fill(store)
    with pytest.raises(Invalid) as refusal:
        await apply(store, Put(attrs.evolve(LAPTOP, ipv4=IPv4Address("10.0.0.1"))))
    assert (refusal.value.kind, refusal.value.field) == ("client", "ipv4")
    elsewhere = attrs.evolve(ACME, range_ipv4=IPv4Network("10.0.0.0/8"))
    with pytest.raises(Invalid) as refusal:
        await apply(store, Put(elsewhere))
    assert (refusal.value.kind, refusal.value.field) == ("account", "range_ipv4")
    await apply(store, Put(attrs.evolve(ACME, range_ipv4=IPv4Network("100.64.0.0/30"))))
    await apply(store, Remove("client", LAPTOP.id), Remove("gateway", DOOR.id), Put(elsewhere))


@pytest.mark.parametrize(
    ("entity", "field"),
    [
        (attrs.evolve(ANN_IN_STAFF, group_id=UUID(int=99)), "group_id"),
        (attrs.evolve(ANN_IN_STAFF, principal_id=UUID(int=99)), "principal_id"),
        (attrs.evolve(WEB, site_ids=(HALL.id, UUID(int=99))), "site_ids"),
        (attrs.evolve(POLICY, resource_id=UUID(int=99)), "resource_id"),
        (attrs.evolve(TOKEN, principal_id=UUID(int=99)), "principal_id"),
        (attrs.evolve(LAPTOP, token_id=UUID(int=99)), "token_id"),
        (attrs.evolve(DOOR, site_id=UUID(int=99)), "site_id"),
    ],
)
async def test_a_reference_to_nothing_is_refused_by_its_field(
    store: Store, entity: Any, field: str
) -> None:
    await fill(store)
    with pytest.raises(InvalidReference) as refusal:
        await apply(store, Put(entity))
    assert refusal.value.field == field


async def test_a_transaction_sees_its_own_steps_in_order(store: Store) -> None:
    await apply(store, Put(ACME))
    with pytest.raises(InvalidReference):
        await apply(store, Put(WEB), Put(HALL))
    assert len(await apply(store, Put(HALL), Put(WEB))) == 2
    with pytest.raises(NotFound):
        await apply(store, Remove("site", HALL.id), Remove("resource", WEB.id))


# --- reading -------------------------------------------------------------------------------------


def policies_on(resource: Resource, count: int, first: int = 0x1000) -> list[Mutation]:
    return [
        Put(attrs.evolve(POLICY, id=UUID(int=first + number), resource_id=resource.id))
        for number in range(count)
    ]


async def test_a_resource_has_no_more_policies_than_it_may(store: Store) -> None:
    other = attrs.evolve(WEB, id=UUID(int=0x51), name="other")
    await apply(store, *map(Put, [ACME, STAFF, HALL, WEB, other]))
    await apply(store, *policies_on(WEB, POLICIES_PER_RESOURCE))
    elsewhere = attrs.evolve(POLICY, resource_id=other.id)
    await apply(store, Put(elsewhere))
    number = (await store.contents(ACME.id)).number
    for one_more in (policies_on(WEB, 1, 0x2000), [Put(attrs.evolve(POLICY, resource_id=WEB.id))]):
        with pytest.raises(TooMany) as refused:
            await apply(store, *one_more)
        assert (refused.value.kind, refused.value.field) == ("policy", "resource_id")
        assert refused.value.limit == POLICIES_PER_RESOURCE
    assert (await store.contents(ACME.id)).number == number
    await apply(store, Put(attrs.evolve(POLICY, id=UUID(int=0x1000), disabled=True)))
    # What all mutations together leave is what counts.
    await apply(store, *policies_on(WEB, 1, 0x2000), Remove("policy", UUID(int=0x1000)))


async def test_an_account_may_allow_fewer_policies_of_a_resource(store: Store) -> None:
    few = attrs.evolve(ACME, limits=AccountLimits(policies_per_resource=2))
    await apply(store, *map(Put, [ACME, STAFF, HALL, WEB]), *policies_on(WEB, 3))
    await apply(store, Put(few))  # those that are there stay, and may change
    await apply(store, Put(attrs.evolve(POLICY, id=UUID(int=0x1000), disabled=True)))
    with pytest.raises(TooMany):
        await apply(store, *policies_on(WEB, 1, 0x2000))
    await apply(store, *(Remove("policy", UUID(int=0x1000 + number)) for number in range(2)))
    await apply(store, *policies_on(WEB, 1, 0x2000))
    with pytest.raises(TooMany):
        await apply(store, *policies_on(WEB, 1, 0x2001))


async def test_another_accounts_entities_are_not_found(store: Store) -> None:
    await fill(store)
    await store.apply(BETA.id, [Put(BETA)], who="test", at=AT)
    with pytest.raises(NotFound):
        await store.get(BETA.id, "site", HALL.id)
    with pytest.raises(NotFound):
        await store.get(BETA.id, "account", ACME.id)
    assert await store.list(BETA.id, "account") == (BETA,)
    with pytest.raises(NotFound):
        await store.apply(BETA.id, [Remove("site", HALL.id)], who="test", at=AT)


async def test_pages_follow_one_another_by_id(store: Store) -> None:
    sites = [attrs.evolve(HALL, id=UUID(int=100 + n), name=f"site {n}") for n in (3, 1, 4, 0, 2)]
    await apply(store, Put(ACME), *map(Put, sites))
    first = await store.list(ACME.id, "site", limit=2)
    second = await store.list(ACME.id, "site", after=first[-1].id, limit=2)
    third = await store.list(ACME.id, "site", after=second[-1].id, limit=2)
    assert [*first, *second, *third] == sorted(sites, key=lambda site: site.id)
    for limit in (0, MAX_PAGE + 1):
        with pytest.raises(ValueError, match="page"):
            await store.list(ACME.id, "site", limit=limit)


async def test_contents_are_every_entity_and_the_last_number(store: Store) -> None:
    await fill(store)
    contents = await store.contents(ACME.id)
    assert (contents.account, contents.number) == (ACME, len(EVERYTHING))
    assert set(contents.entities) == set(EVERYTHING[1:])


# --- tokens, leases, authorisations, relays ------------------------------------------------------


async def test_a_token_is_found_by_its_id_alone_and_used_as_often_as_it_says(store: Store) -> None:
    await fill(store)
    assert await store.find_token(TOKEN.id) == TOKEN
    assert await store.find_token(UUID(int=99)) is None
    assert await store.use_token(TOKEN.id, at=AT)
    assert not await store.use_token(TOKEN.id, at=AT)
    assert not await store.use_token(UUID(int=99), at=AT)
    await apply(store, Put(attrs.evolve(TOKEN, max_uses=2)))
    assert await store.use_token(TOKEN.id, at=AT), "an edit keeps the count"
    assert not await store.use_token(TOKEN.id, at=AT)


async def test_a_token_that_was_removed_and_comes_back_is_unused(store: Store) -> None:
    await fill(store)
    assert await store.use_token(TOKEN.id, at=AT)
    await apply(store, Remove("token", TOKEN.id), Put(TOKEN))
    assert await store.use_token(TOKEN.id, at=AT)


async def test_a_token_of_the_installation_belongs_to_no_account(store: Store) -> None:
    await store.put_installation_token(RELAY_TOKEN)
    assert await store.find_token(RELAY_TOKEN.id) == RELAY_TOKEN
    assert await store.use_token(RELAY_TOKEN.id, at=AT)
    with pytest.raises(Conflict):
        await store.put_installation_token(RELAY_TOKEN)
    with pytest.raises(Invalid):
        await store.put_installation_token(TOKEN)
    with pytest.raises(Invalid):
        await apply(store, Put(ACME), Put(attrs.evolve(TOKEN, kind="operator")))


async def test_an_epoch_grows_with_each_owner(store: Store) -> None:
    one, two = await joined(store, "one"), await joined(store, "two")
    with pytest.raises(NotFound):
        await store.acquire(ACME.id, **one)
    await apply(store, Put(ACME))
    epochs = []
    for owner in (one, two, one, one):
        epochs.append(await store.acquire(ACME.id, **owner))
        if owner is not one or len(epochs) == 1:
            await store.release(ACME.id, **owner)
    assert epochs == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="not the name of a node"):
        await store.acquire(ACME.id, owner="", incarnation=1)


async def test_an_authorization_lives_until_it_ends_or_expires(store: Store) -> None:
    await fill(store)
    epoch = await store.acquire(ACME.id, **await joined(store, "node"))
    await store.write_authorization(ACCESS, epoch=epoch)
    end = ACCESS.expires_at
    just_before = end - timedelta(microseconds=1)
    assert await store.authorizations(ACME.id, live_at=just_before) == (ACCESS,)
    assert await store.authorizations(ACME.id, live_at=end) == ()
    ended = attrs.evolve(ACCESS, ended_at=AT, end_reason="policy removed")
    await store.write_authorization(ended, epoch=epoch)
    assert await store.authorizations(ACME.id, live_at=AT) == ()
    assert await store.authorizations(ACME.id) == (ended,)
    await apply(store, Remove("policy", POLICY.id), Remove("client", LAPTOP.id))
    assert await store.authorizations(ACME.id) == (ended,), "it is also the record"


async def test_a_relay_is_known_by_a_relay_token_only(store: Store) -> None:
    operator = attrs.evolve(RELAY_TOKEN, id=UUID(int=99), kind="operator")
    await store.put_installation_token(RELAY_TOKEN)
    await store.put_installation_token(operator)
    await store.put_relay(RELAY)
    seen = attrs.evolve(RELAY, last_seen_at=AT + timedelta(minutes=1), addresses=())
    await store.put_relay(seen)
    assert await store.relays() == (seen,)
    for token_id in (operator.id, UUID(int=98)):
        with pytest.raises(InvalidReference):
            await store.put_relay(attrs.evolve(RELAY, token_id=token_id))
