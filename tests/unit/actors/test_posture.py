"""What devices report of themselves, and the countries of their addresses, in policies."""

from __future__ import annotations

import attrs

from actors.following import BY_DEVICES
from actors.model import (
    ClientPostureCondition,
    Conditions,
    Fact,
    FactTest,
    RegionCondition,
)
from actors.services import Limits
from channel.messages import (
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRevoked,
    Posture,
    ReportedFact,
    Revoke,
)

from .world import S, World

NEW, OLD = ReportedFact(name="os_version", value="14.2"), ReportedFact(name="os_version", value="9")
SAFE = ReportedFact(name="disk_encrypted", value=True)


def asking_for_14() -> Conditions:
    test = FactTest(name="os_version", operator="at_least", value="14")
    return Conditions(client_posture=ClientPostureCondition(facts=(test,)))


def posture_changes(world: World) -> list[tuple[Fact, ...]]:
    return [
        each.after.posture  # type: ignore[union-attr]  # a client
        for each in world.changes()
        if each.who == BY_DEVICES
    ]


def test_a_reported_fact_opens_and_closes_access() -> None:
    world = World()
    world.policy(conditions=asking_for_14())
    gateway, client = world.gateway(), world.client()
    denied = client.ask(world.web)
    assert isinstance(denied, AuthorizationDenied)
    assert denied.violated == ("client_posture",)
    client.say(Posture(facts=(NEW, SAFE)))
    world.run_for(1)
    assert isinstance(client.ask(world.web), AuthorizationCreated)
    world.log.clear()
    client.say(Posture(facts=(SAFE, OLD)))
    world.run_for(20)
    assert [type(message) for _, message in world.log] == [Revoke, AuthorizationRevoked]
    assert not gateway.live
    assert not client.live
    assert client.is_connected
    (row,) = world.entities("client")
    assert row.posture == (
        Fact(name="disk_encrypted", value=True),
        Fact(name="os_version", value="9"),
    )


def test_the_same_facts_are_no_change() -> None:
    world = World()
    client = world.client()
    client.say(Posture(facts=(NEW, SAFE)))
    world.run_for(20)
    client.say(Posture(facts=(SAFE, OLD, NEW)))  # of a name that comes twice the last one counts
    world.run_for(20)
    client.lose_channel()
    client.join()
    client.say(Posture(facts=(NEW, SAFE)))
    world.run_for(20)
    assert len(posture_changes(world)) == 1


def test_of_many_reports_the_first_and_the_latest_count() -> None:
    world = World(limits=Limits(posture_interval_ns=10 * S))
    client = world.client()
    for number in range(100):
        client.say(Posture(facts=(ReportedFact(name="number", value=number),)))
    world.run_for(60)
    assert posture_changes(world) == [
        (Fact(name="number", value=0),),
        (Fact(name="number", value=99),),
    ]


def test_the_reports_of_many_devices_are_written_together() -> None:
    world = World()
    clients = [world.client() for _ in range(20)]
    for client in clients:
        client.say(Posture(facts=(NEW,)))
    world.run_for(1)
    changes = [each for each in world.changes() if each.who == BY_DEVICES]
    assert len(changes) == 20
    assert len({each.at for each in changes}) == 1


def test_a_report_that_comes_early_or_over_a_crash_is_written_all_the_same() -> None:
    world = World()
    client = world.client()
    world.store.is_away = True
    client.say(Posture(facts=(NEW,)))
    world.run_for(1)
    world.scheduler.stop(world.account_actor(), "crashed: on purpose")
    world.store.is_away = False
    world.run_for(10)
    assert posture_changes(world) == [(Fact(name="os_version", value="14.2"),)]


def test_a_report_waits_for_a_store_that_is_away() -> None:
    world = World()
    client = world.client()
    world.store.is_away = True
    client.say(Posture(facts=(NEW,)))
    world.run_for(5)
    world.store.is_away = False
    world.run_for(2)
    assert posture_changes(world) == [(Fact(name="os_version", value="14.2"),)]
    assert not world.crashes


def test_a_client_that_is_removed_meanwhile_leaves_nothing_behind() -> None:
    world = World()
    client = world.client()
    client.say(Posture(facts=(NEW,)))
    world.remove("client", client.id)
    world.run_for(20)
    assert not posture_changes(world)
    assert not world.crashes


# --- countries -----------------------------------------------------------------------------------


@attrs.define
class Atlas:
    everywhere: str | None = "CH"

    def country(self, address: str) -> str | None:
        return self.everywhere


def in_country(*values: str) -> Conditions:
    return Conditions(remote_ip_location_region=RegionCondition(operator="is_in", values=values))


def test_another_region_database_cuts_what_it_does_not_place_there_any_more() -> None:
    atlas = Atlas()
    world = World(regions=atlas)
    world.policy(conditions=in_country("CH"))
    world.policy(world.db)
    gateway, client = world.gateway(), world.client()
    swiss, free = client.ask(world.web), client.ask(world.db, connected=(gateway.id,))
    assert isinstance(swiss, AuthorizationCreated)
    assert isinstance(free, AuthorizationCreated)
    assert world.plane.regions_changed()
    world.run_for(1)
    assert world.live() == {swiss.authorization_id, free.authorization_id}
    atlas.everywhere = "FR"
    assert world.plane.regions_changed()
    world.run_for(1)
    assert world.live() == set(gateway.live) == {free.authorization_id}
    assert world.rows()[swiss.authorization_id].end_reason == "remote_ip_location_region"


def test_another_policy_takes_over_when_the_country_is_another() -> None:
    atlas = Atlas()
    world = World(regions=atlas)
    world.policy(conditions=in_country("CH"), lease_s=7_200)
    french = world.policy(conditions=in_country("FR"), lease_s=600)
    gateway, client = world.gateway(), world.client()
    answer = client.ask(world.web)
    assert isinstance(answer, AuthorizationCreated)
    atlas.everywhere = "FR"
    world.plane.regions_changed()
    world.run_for(1)
    assert world.live() == {answer.authorization_id}
    assert world.rows()[answer.authorization_id].policy_id == french.id
    assert not gateway.heard(Revoke)


def test_an_account_whose_store_is_away_decides_as_soon_as_it_is_back() -> None:
    atlas = Atlas()
    world = World(regions=atlas)
    world.policy(conditions=in_country("CH"), lease_s=7_200)
    french = world.policy(conditions=in_country("FR"), lease_s=600)
    world.gateway()
    answer = world.client().ask(world.web)
    assert isinstance(answer, AuthorizationCreated)
    world.store.is_away = True
    atlas.everywhere = "FR"
    world.plane.regions_changed()
    world.run_for(5)
    world.store.is_away = False
    world.run_for(2)
    (row,) = world.rows(live=True).values()
    assert row.policy_id == french.id
    assert not world.crashes
