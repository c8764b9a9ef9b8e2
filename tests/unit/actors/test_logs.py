"""What is written down: who was connected, when devices and tokens were seen, what flowed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import attrs

from actors.clerk import MAX_ROWS
from actors.ledger import REPORT_NS
from actors.logs import FlowLog, Log, SessionLog
from actors.messages import CLERK, ClerkStatistics, ClerkStatisticsRequest, LogRows
from channel.credentials import decode_token
from channel.messages import (
    AuthorizationCreated,
    FlowReport,
    IpText,
    ReportedFlow,
)
from runtime.actor import NamedRef

from .test_life import opened
from .world import START, S, World, hours, run


def logs(world: World, kind: Any) -> list[Any]:
    """The oldest first."""
    rows: tuple[Log, ...] = run(world.store.logs(world.account.id, kind, limit=1_000))
    return list(reversed(rows))


def events(world: World) -> list[tuple[str, str, str]]:
    return [(each.agent, each.event, each.reason) for each in logs(world, "session")]


def statistics(world: World) -> ClerkStatistics:
    answer: ClerkStatistics = world.host.call(NamedRef(CLERK), ClerkStatisticsRequest())
    return answer


# --- sessions ------------------------------------------------------------------------------------


def test_a_session_is_logged_from_join_to_parting() -> None:
    world = World()
    client = world.client()
    world.run_for(10)
    client.lose_channel()
    world.run_for(1)
    first, last = logs(world, "session")
    assert isinstance(first, SessionLog)
    assert (first.agent, first.event, first.reason) == ("client", "connected", "")
    assert (first.device_id, first.principal_id) == (client.id, world.user.id)
    assert first.token_id == decode_token(world.user_token).id
    assert (first.remote_ip, first.version) == ("203.0.113.7", "holloway")
    assert (last.event, last.reason) == ("disconnected", "lost")
    assert last.at - first.at == timedelta(seconds=10)


def test_why_an_agent_was_sent_away_is_logged() -> None:
    world = World()
    gateway = world.gateway()
    world.client()
    world.put(attrs.evolve(world.get("gateway", gateway.id), approved=False))
    world.put(attrs.evolve(world.user, disabled=True))
    world.run_for(1)
    assert sorted(events(world)) == [
        ("client", "connected", ""),
        ("client", "disconnected", "account_disabled"),
        ("gateway", "connected", ""),
        ("gateway", "disconnected", "awaiting_approval"),
    ]
    assert [each.principal_id for each in logs(world, "session") if each.agent == "gateway"] == [
        None,
        None,
    ]


def test_a_refusal_of_a_known_token_is_logged_once_in_ten_minutes() -> None:
    world = World()
    world.change_token(world.site_token, approves_devices=False)
    gateway = world.gateway()
    for _ in range(5):
        gateway.join()
    world.run_for(1)
    assert events(world) == [("gateway", "refused", "awaiting_approval")]
    world.run_for(600)
    gateway.join()
    world.run_for(1)
    assert len(events(world)) == 2


def test_nothing_is_logged_of_who_knows_no_secret() -> None:
    world = World()
    known = decode_token(world.user_token)
    forged = world.token("client", principal_id=world.user.id, hash=bytes(32))
    assert decode_token(forged).id != known.id
    client = world.client(token=forged)
    assert client.refused == "invalid_token"
    world.run_for(1)
    assert not events(world)


def test_devices_and_tokens_are_seen_at_join_hourly_and_at_parting() -> None:
    world = World()
    client = world.client()
    world.run_for(1)
    token_id = decode_token(world.user_token).id

    def seen() -> Any:
        return run(world.store.seen(world.account.id, [client.id]))[client.id]

    def used() -> Any:
        return run(world.store.last_used(world.account.id, [token_id]))[token_id]

    assert (seen().at, used()) == (START, START)
    assert (seen().version, seen().remote_ip) == ("holloway", "203.0.113.7")
    world.run_for(3 * 3_600)
    assert START + hours(2) <= seen().at <= START + hours(3.1)
    assert used() == seen().at
    client.move("198.51.100.77")
    client.lose_channel()
    world.run_for(1)
    assert seen().remote_ip == "198.51.100.77"
    assert seen().at == START + timedelta(hours=3, seconds=1)


# --- the clerk -----------------------------------------------------------------------------------


def row(world: World, **fields: Any) -> SessionLog:
    base: dict[str, Any] = {
        "id": world.new_id(),
        "account_id": world.account.id,
        "at": world.clock.utc_now(),
        "agent": "client",
        "event": "connected",
        "token_id": world.new_id(),
        "remote_ip": IpText("192.0.2.1"),
    }
    return SessionLog(**base | fields)


def tell(world: World, *rows: Log) -> None:
    ref = world.scheduler.registry.whereis(CLERK)
    assert ref is not None
    assert world.scheduler.cast(ref, LogRows(rows))
    world.host.run_until_idle()


def test_a_store_that_is_away_delays_rows_and_the_oldest_are_lost_above_the_limit() -> None:
    world = World()
    world.store.is_away = True
    rows = [row(world) for _ in range(5)]
    world.run_for(1)  # ids of one millisecond are in no order
    rows += [row(world) for _ in range(MAX_ROWS)]
    tell(world, *rows)
    world.run_for(5)
    assert statistics(world) == ClerkStatistics(
        rows_waiting=MAX_ROWS, devices_waiting=0, rows_written=0, rows_lost=5
    )
    world.store.is_away = False
    world.run_for(5)
    assert statistics(world).rows_written == MAX_ROWS
    lost = run(
        world.store.logs(
            world.account.id, "session", before=min(each.id for each in rows[5:]), limit=1_000
        )
    )
    assert not lost
    assert not world.crashes


def test_a_row_that_no_store_takes_costs_no_other_row() -> None:
    world = World()
    good = [row(world), row(world)]
    stray = row(world, account_id=UUID(int=5))
    broken = row(world, version="\x1b[31m")
    tell(world, good[0], stray, broken, good[1])
    world.run_for(1)
    assert {each.id for each in logs(world, "session")} == {each.id for each in good}
    assert (statistics(world).rows_written, statistics(world).rows_lost) == (2, 2)
    assert not world.crashes


def test_a_clerk_that_fails_again_and_again_takes_nobody_along() -> None:
    world = World()
    client = world.client()
    for _ in range(50):
        world.crash(world.scheduler.registry.whereis(CLERK))
    assert client.is_connected
    gateway = world.gateway()
    world.run_for(1)
    assert gateway.is_connected
    assert ("gateway", "connected", "") in events(world)


# --- flows ---------------------------------------------------------------------------------------


def flow(authorization_id: UUID, **fields: Any) -> ReportedFlow:
    base: dict[str, Any] = {
        "authorization_id": authorization_id,
        "protocol": "tcp",
        "source": IpText("100.64.0.1"),
        "source_port": 40_000,
        "destination": IpText("10.0.0.1"),
        "destination_port": 443,
        "began_ns_ago": 20 * S,
        "ended_ns_ago": 5 * S,
        "packets_sent": 3,
        "packets_received": 4,
        "bytes_sent": 300,
        "bytes_received": 4_000,
        "ending": "idle",
        "flows": 2,
    }
    return ReportedFlow(**base | fields)


def reporting() -> tuple[World, Any, Any, AuthorizationCreated]:
    world = World()
    world.policy()
    gateway, client, answer = opened(world)
    world.run_for(60)
    return world, gateway, client, answer


def test_both_sides_report_their_flows() -> None:
    world, gateway, client, answer = reporting()
    for agent in (client, gateway):
        agent.say(FlowReport(flows=(flow(answer.authorization_id),)))
    world.run_for(1)
    by_client, by_gateway = sorted(logs(world, "flow"), key=lambda each: each.reporter)
    assert isinstance(by_client, FlowLog)
    assert (by_client.reporter, by_gateway.reporter) == ("client", "gateway")
    assert by_client.client_id == client.id
    assert by_client.gateway_id == gateway.id
    assert by_client.resource_id == world.web.id
    assert by_client.principal_id == world.user.id
    assert by_client.started_at == START + timedelta(seconds=40)
    assert by_client.ended_at == START + timedelta(seconds=55)
    assert (by_client.packets_sent, by_client.bytes_received) == (3, 4_000)
    assert (by_client.ending, by_client.flows) == ("idle", 2)


def test_a_flow_of_an_authorisation_that_has_ended_counts_for_a_while() -> None:
    world, gateway, _, answer = reporting()
    world.remove("policy", world.entities("policy")[0].id)
    world.run_for(REPORT_NS // S - 1)
    gateway.say(FlowReport(flows=(flow(answer.authorization_id),)))
    world.run_for(2)
    assert len(logs(world, "flow")) == 1
    gateway.say(FlowReport(flows=(flow(answer.authorization_id),)))
    world.run_for(2)
    assert len(logs(world, "flow")) == 1


def test_nobody_reports_what_another_carried() -> None:
    world, _, _, answer = reporting()
    stranger, other = world.client(), world.gateway("other")
    for agent in (stranger, other):
        agent.say(FlowReport(flows=(flow(answer.authorization_id), flow(UUID(int=7)))))
    world.run_for(1)
    assert not logs(world, "flow")
    assert stranger.is_connected
    assert other.is_connected


def test_an_end_before_the_beginning_is_no_flow_that_lasts() -> None:
    world, gateway, _, answer = reporting()
    odd = flow(answer.authorization_id, began_ns_ago=1, ended_ns_ago=9 * S)
    gateway.say(FlowReport(flows=(odd,)))
    world.run_for(1)
    (logged,) = logs(world, "flow")
    assert logged.started_at == logged.ended_at == START + timedelta(seconds=51)


def test_what_comes_too_fast_is_dropped_and_nobody_is_sent_away() -> None:
    world, _, client, answer = reporting()
    for _ in range(200):
        client.say(FlowReport(flows=(flow(answer.authorization_id),)))
    world.run_for(1)
    assert len(logs(world, "flow")) == world.plane._services.limits.flow_logs_burst
    assert client.is_connected
