"""Which gateway a client gets: by country, and by what the versions of both carry."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import attrs
import pytest

from actors.model import Site
from channel.messages import AuthorizationCreated, AuthorizationDenied, Authorize, ResourceUpserted
from channel.versions import SPOKEN, Spoken

from .world import World


class Atlas:
    """203.0.113.0/24 is in Switzerland, 198.51.100.0/24 in France, and nothing else is known."""

    def country(self, address: str) -> str | None:
        known = {"203.0.113": "CH", "198.51.100": "FR"}
        return known.get(address.rpartition(".")[0])


def gateway_of(answer: object) -> UUID:
    assert isinstance(answer, AuthorizationCreated)
    return answer.gateway.id


@pytest.mark.parametrize(("remote", "near"), [("203.0.113.7", "CH"), ("198.51.100.7", "FR")])
def test_a_gateway_of_the_same_country_comes_before_others(remote: str, near: str) -> None:
    for seed in range(5):
        world = World(seed, regions=Atlas())
        world.policy()
        gateways = {
            "FR": world.gateway("paris"),
            "CH": world.gateway("bern", remote="203.0.113.50"),
            "": world.gateway("nowhere", remote="192.0.2.1"),
        }
        assert gateway_of(world.client(remote=remote).ask(world.web)) == gateways[near].id


def test_of_an_unknown_country_no_gateway_is_nearer() -> None:
    chosen = set()
    for seed in range(20):
        world = World(seed, regions=Atlas())
        world.policy()
        names = {
            world.gateway(name, remote=f"192.0.2.{place}").id: name
            for place, name in enumerate(("one", "two"), 1)
        }
        chosen.add(names[gateway_of(world.client(remote="192.0.2.77").ask(world.web))])
    assert chosen == {"one", "two"}


def test_a_gateway_that_is_connected_comes_before_a_near_one() -> None:
    world = World(regions=Atlas())
    world.policy()
    world.policy(world.db)
    far = world.gateway("paris")
    client = world.client()
    assert gateway_of(client.ask(world.web)) == far.id
    near = world.gateway("bern", remote="203.0.113.50")
    assert gateway_of(client.ask(world.db, connected=(far.id,))) == far.id
    assert gateway_of(client.ask(world.db, failed=(far.id,))) == near.id


def test_gateways_of_all_sites_of_a_resource_are_asked() -> None:
    world = World()
    annex = Site(name="annex", **world.common())
    world.put(annex, attrs.evolve(world.web, site_ids=(world.site.id, annex.id)))
    world.policy()
    one = world.gateway("one")
    two = world.gateway("two", token=world.token("gateway", site_id=annex.id))
    client = world.client()
    assert gateway_of(client.ask(world.web, failed=(one.id,))) == two.id
    assert gateway_of(client.ask(world.web, failed=(two.id,))) == one.id


# --- versions ------------------------------------------------------------------------------------


def with_name(world: World) -> Any:
    wiki = world.resource("wiki", "wiki.example", kind="dns")
    world.put(wiki)
    world.policy(wiki)
    return wiki


def test_a_client_is_not_told_of_what_its_version_does_not_carry() -> None:
    world = World()
    wiki = with_name(world)
    pool = world.resource("pool", "", kind="device_pool", site_ids=())
    world.put(pool)
    world.policy(pool)
    world.gateway()
    client = world.client()
    assert not client.init.resources
    for resource in (wiki, pool):
        denied = client.ask(resource)
        assert isinstance(denied, AuthorizationDenied)
        assert (denied.reason, denied.violated) == ("forbidden", ("client_version",))
    world.put(attrs.evolve(wiki, name="renamed"))
    assert not client.heard(ResourceUpserted)
    assert not world.rows()


def test_without_a_policy_a_denial_says_nothing_of_versions() -> None:
    world = World()
    wiki = world.resource("wiki", "wiki.example", kind="dns")
    world.put(wiki)
    world.gateway()
    denied = world.client().ask(wiki)
    assert isinstance(denied, AuthorizationDenied)
    assert denied.violated == ("policy",)


WITH_NAMES = Spoken(
    oldest=1,
    newest=2,
    kinds={1: frozenset({"cidr", "ip"}), 2: frozenset({"cidr", "ip", "dns"})},
)
"""A second version of the protocol, which carries names, too."""


@pytest.mark.parametrize("seed", range(5))
def test_a_gateway_of_an_older_version_is_passed_over(seed: int) -> None:
    world = World(seed, spoken=WITH_NAMES)
    wiki = with_name(world)
    world.gateway("older", versions=(1, 1))
    newer = world.gateway("newer", versions=(1, 2))
    client = world.client(versions=(1, 3))
    assert [each.id for each in client.init.resources] == [wiki.id]
    assert gateway_of(client.ask(wiki)) == newer.id


def test_if_no_gateway_carries_it_the_denial_says_so() -> None:
    world = World(spoken=WITH_NAMES)
    wiki = with_name(world)
    world.policy()
    older = world.gateway("older", versions=(1, 1))
    client = world.client(versions=(1, 2))
    denied = client.ask(wiki)
    assert isinstance(denied, AuthorizationDenied)
    assert (denied.reason, denied.violated) == ("forbidden", ("gateway_version",))
    assert not older.heard(Authorize)
    assert gateway_of(client.ask(world.web)) == older.id
    newer = world.gateway("newer", versions=(1, 2))
    assert gateway_of(client.ask(wiki)) == newer.id
    for gateway in (older, newer):
        gateway.lose_channel()
    world.run_for(10)
    gone = client.ask(wiki)
    assert isinstance(gone, AuthorizationDenied)
    assert gone.reason == "offline"


@pytest.mark.parametrize("refusal", ["ceiling", "unsupported"])
def test_what_every_gateway_refuses_is_named(refusal: str) -> None:
    world = World()
    world.policy()
    for name in ("one", "two"):
        world.gateway(name).refusal = refusal
    answer = world.client().ask(world.web)
    assert isinstance(answer, AuthorizationDenied)
    assert (answer.reason, answer.violated) == ("forbidden", (f"gateway_{refusal}",))


@pytest.mark.parametrize(
    ("versions", "agreed"),
    [((1, 1), 1), ((1, 2), 2), ((2, 9), 2), ((3, 9), None), ((0, 0), None), ((2, 1), None)],
)
def test_the_highest_common_version_is_agreed(
    versions: tuple[int, int], agreed: int | None
) -> None:
    assert WITH_NAMES.agreed(versions) == agreed


def test_every_version_of_this_release_says_what_it_carries() -> None:
    assert set(SPOKEN.kinds) == set(range(SPOKEN.oldest, SPOKEN.newest + 1))
    assert SPOKEN.carried(SPOKEN.newest + 1) == SPOKEN.kinds[SPOKEN.newest]
