"""Both ends of a tunnel tell the portal what flowed: the real agents, in virtual time."""

from __future__ import annotations

import random
from collections import Counter
from uuid import UUID

import attrs
import pytest

from channel.messages import (
    Filter,
    FlowReport,
    ReportedFlow,
    ResourceUpdated,
    ResourceUpserted,
    Revoke,
)
from tests.unit.clients.stage import (
    ACK,
    CLIENT_IPV4,
    FIN_ACK,
    RST,
    SERVER,
    SYN,
    SYN_ACK,
    WEB,
    Stage,
    answer,
    echo,
    tcp,
    udp,
)
from tunnel.agent import Outgoing, TunnelAgent

CLIENT, GATEWAY = True, False
OTHER = attrs.evolve(WEB, id=UUID(int=101), name="other", address="10.1.0.0/24", filters=())


def web_answers(flags: int, data: bytes = b"", number: int = 0) -> bytes:
    ports = (80, 40_000 + number)
    return tcp(flags, source=SERVER, destination=str(CLIENT_IPV4), ports=ports, data=data)


def reached(stage: Stage) -> UUID:
    """The client asked a server, and was answered; which authorisation let it."""
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    stage.server_answers(answer())
    [authorization_id] = stage.authorizations
    return authorization_id


def told(stage: Stage, side: bool) -> list[tuple[str, str, int, int, int, int]]:
    return [
        (row.protocol, row.ending, row.packets_sent, row.packets_received, row.bytes_sent,
         row.bytes_received)
        for row in stage.flows[side]
    ]  # fmt: skip


def lose_portal(stage: Stage) -> None:
    stage.portal_away = True
    for agent in stage.agents.values():
        agent.channel_lost(stage.now)


def find_portal(stage: Stage) -> None:
    stage.portal_away = False
    for number, gateway in enumerate(stage.gateways):
        stage.tell(gateway, stage.gateway_init(number))
    stage.tell(stage.client, stage.client_init())
    stage.settle()


def test_both_sides_tell_the_same_of_one_flow() -> None:
    stage = Stage()
    authorization_id = reached(stage)
    stage.advance(400)
    assert told(stage, CLIENT) == told(stage, GATEWAY) == [("udp", "idle", 1, 1, 36, 34)]
    for row in (*stage.flows[CLIENT], *stage.flows[GATEWAY]):
        assert row.authorization_id == authorization_id
        assert (row.source, row.source_port) == (str(CLIENT_IPV4), 40_000)
        assert (row.destination, row.destination_port) == (SERVER, 53)


def test_a_tcp_flow_stands_in_the_log_seconds_after_it_closed() -> None:
    stage = Stage()
    reached(stage)
    stage.client_sends(tcp(SYN))
    stage.server_answers(web_answers(SYN_ACK))
    for _ in range(3):
        stage.client_sends(*[tcp(ACK, data=b"x" * 100)] * 5)
        stage.server_answers(*[web_answers(ACK, b"y" * 1_000)] * 7)
    stage.client_sends(tcp(FIN_ACK))
    stage.server_answers(web_answers(FIN_ACK))
    stage.advance(15)
    sent, received = 2 * 40 + 15 * 140, 2 * 40 + 21 * 1_040
    assert (
        told(stage, CLIENT) == told(stage, GATEWAY) == [("tcp", "closed", 17, 23, sent, received)]
    )


def test_a_new_authorisation_on_the_same_connection_answers_for_what_follows() -> None:
    stage = Stage()
    older = reached(stage)
    stage.client._requests.want(WEB.id, None, stage.now)  # asks anew
    stage.run_until(lambda: older not in stage.authorizations)
    [newer] = stage.authorizations
    stage.client_sends(udp(b"more"))
    stage.tell(stage.gateways[0], Revoke(authorization_id=older))
    stage.client_sends(udp(b"and more"))
    stage.advance(400)
    for rows in stage.flows.values():
        assert [(row.authorization_id, row.packets_sent, row.ending) for row in rows] == [
            (older, 1, ""), (newer, 2, "idle")
        ]  # fmt: skip
    assert len(stage.client.engine.connection_ids) == 1


def test_a_revocation_ends_flows_at_both_sides() -> None:
    stage = Stage()
    authorization_id = reached(stage)
    stage.revoke(authorization_id)
    stage.advance(2)
    assert [row[1] for row in told(stage, CLIENT)] == ["revoked"]
    assert [row[1] for row in told(stage, GATEWAY)] == ["revoked"]


def test_filters_that_forbid_a_flow_end_it_at_both_sides() -> None:
    stage = Stage()
    reached(stage)
    narrowed = attrs.evolve(WEB, filters=(Filter(protocol="icmp"),))
    stage.tell(stage.client, ResourceUpserted(resource=narrowed))
    stage.tell(stage.gateways[0], ResourceUpdated(resource=narrowed))
    stage.advance(2)
    assert [row[1] for row in told(stage, CLIENT)] == ["revoked"]
    assert [row[1] for row in told(stage, GATEWAY)] == ["revoked"]


def test_flows_of_a_dead_gateway_are_lost() -> None:
    stage = Stage(gateways=2)
    reached(stage)
    stage.client_sends(tcp(SYN))
    stage.server_answers(web_answers(SYN_ACK))
    stage.offline.add(0)
    stage.client_sends(tcp(ACK, data=b"is anybody there?"))
    stage.run_until(
        lambda: stage.client._lease_by_resource[WEB.id].connection.gateway_name[-1] == "1"
    )
    stage.advance(5)
    assert ("tcp", "lost") in {row[:2] for row in told(stage, CLIENT)}


def test_what_ended_while_the_portal_was_away_is_told_after_the_rejoin() -> None:
    stage = Stage()
    reached(stage)
    lose_portal(stage)
    stage.advance(500)
    assert stage.flows == {CLIENT: [], GATEWAY: []}
    assert stage.client.sizes()["flows_unreported"] == 1
    find_portal(stage)
    stage.advance(2)
    for side in (CLIENT, GATEWAY):
        [row] = stage.flows[side]
        assert 499 < row.ended_ns_ago / 10**9 < 503


def test_an_agent_that_ends_tells_of_what_lives() -> None:
    stage = Stage()
    reached(stage)
    for agent in stage.agents.values():
        agent.finish(stage.now)
    stage.settle()
    assert told(stage, CLIENT) == told(stage, GATEWAY) == [("udp", "stopped", 1, 1, 36, 34)]
    assert stage.client.sizes()["flows"] == 0


def test_an_agent_that_ends_without_a_portal_says_nothing() -> None:
    stage = Stage()
    reached(stage)
    lose_portal(stage)
    stage.client.finish(stage.now)
    assert stage.client.drain_messages() == []


def test_a_report_that_the_channel_did_not_take_comes_again() -> None:
    stage = Stage()
    reached(stage)
    gateway = stage.gateways[0]
    at = stage.now
    while not (drained := [each for each in gateway.drain_messages()
                           if isinstance(each.message, FlowReport)]):  # fmt: skip
        at += 10**9
        gateway.handle_timeout(at)
    gateway.unsent(drained[0], at)
    gateway.unsent(Outgoing(message=WEB), at)  # nothing else is kept
    gateway.handle_timeout(at + 2 * 10**9)
    [again] = [each for each in gateway.drain_messages() if isinstance(each.message, FlowReport)]
    assert isinstance(again.message, FlowReport)
    assert (
        again.message.flows[0].ended_ns_ago == drained[0].message.flows[0].ended_ns_ago + 2 * 10**9
    )  # type: ignore[attr-defined]


def test_a_report_that_was_not_fetched_when_the_channel_broke_comes_again() -> None:
    stage = Stage()
    reached(stage)
    client, at = stage.client, stage.now
    while not any(isinstance(each.message, FlowReport) for each in client._messages):
        at += 10**9
        client.handle_timeout(at)
    client.channel_lost(at)
    stage.now = at
    find_portal(stage)
    stage.advance(2)
    assert [row[1] for row in told(stage, CLIENT)] == ["idle"]


# --- whatever happens ----------------------------------------------------------------------------


class Chance:
    """Traffic and events by a seed; `told` at the end has to be what the agents let pass."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.stage = Stage(gateways=2, lease_ns=900 * 10**9)
        self.stage.resources[OTHER.id] = OTHER
        self.stage.allowed.add(OTHER.id)
        self.stage.tell(self.stage.client, ResourceUpserted(resource=OTHER))

    def run(self) -> None:
        steps = (self.send, self.send, self.send, self.answer, self.answer, self.wait, self.trouble)
        for _ in range(120):
            self.random.choice(steps)()

    def send(self) -> None:
        number = self.random.randrange(4)
        where = self.random.choice((SERVER, "10.1.0.9"))
        flags = self.random.choice((SYN, SYN, ACK, ACK, ACK, FIN_ACK, RST))
        packet = self.random.choice((
            tcp(flags, destination=where, ports=(40_000 + number, 80), data=b"x" * number),
            udp(destination=where, ports=(40_000 + number, 53)),
            echo(8, destination=where),
        ))  # fmt: skip
        self.stage.client_sends(*[packet] * self.random.choice((1, 1, 5)))

    def answer(self) -> None:
        number = self.random.randrange(4)
        flags = self.random.choice((SYN_ACK, ACK, ACK, FIN_ACK, RST))
        packet = self.random.choice((
            web_answers(flags, b"y" * 9, number),
            answer(ports=(53, 40_000 + number)),
            echo(0, source=SERVER, destination=str(CLIENT_IPV4)),
        ))  # fmt: skip
        times = self.random.choice((1, 1, 5))
        self.stage.server_answers(*[packet] * times, number=self.random.randrange(2))

    def wait(self) -> None:
        self.stage.advance(self.random.choice((0.1, 0.5, 2, 10, 70)))

    def trouble(self) -> None:
        stage = self.stage
        what = self.random.randrange(7)
        if what == 0 and stage.authorizations:
            stage.revoke(self.random.choice(list(stage.authorizations)))
        elif what == 1:
            stage.offline ^= {self.random.randrange(2)}
        elif what == 2:
            lose_portal(stage)
            stage.advance(self.random.choice((1, 30)))
            find_portal(stage)
        elif what == 3:
            protocols = self.random.sample(("tcp", "udp", "icmp"), 2)
            narrowed = attrs.evolve(
                WEB, filters=tuple(Filter(protocol=each) for each in protocols)  # type: ignore[arg-type]
            )  # fmt: skip
            stage.tell(stage.client, ResourceUpserted(resource=narrowed))
            for gateway in stage.gateways:
                stage.tell(gateway, ResourceUpdated(resource=narrowed))
        elif what == 4:
            for lease in list(stage.client._lease_by_resource.values()):
                stage.client._requests.want(lease.resource_id, None, stage.now)  # asks anew
        else:
            stage.advance(1)


def total(rows: list[ReportedFlow]) -> Counter[str]:
    count: Counter[str] = Counter()
    for row in rows:
        count["sent"] += row.packets_sent
        count["received"] += row.packets_received
        count["bytes_sent"] += row.bytes_sent
        count["bytes_received"] += row.bytes_received
    return count


@pytest.mark.parametrize("seed", range(25))
def test_what_passed_is_told_once_whatever_happens(seed: int) -> None:
    chance = Chance(seed)
    stage = chance.stage
    chance.run()
    stage.offline.clear()
    stage.advance(5)
    for agent in stage.agents.values():
        agent.finish(stage.now)
    stage.settle()
    client = total(stage.flows[CLIENT])
    assert client["sent"] == stage.client.counts.sent
    assert client["received"] == stage.client.counts.delivered
    gateways = total(stage.flows[GATEWAY])
    assert gateways["sent"] == sum(map(len, stage.to_servers.values()))
    assert gateways["received"] == sum(gateway.counts.returned for gateway in stage.gateways)
    assert gateways["bytes_sent"] == sum(
        sum(map(len, packets)) for packets in stage.to_servers.values()
    )
    assert gateways["sent"] > 0
    agents: list[TunnelAgent] = list(stage.agents.values())
    assert not any(agent.reports.counts.lost for agent in agents)
    for rows in stage.flows.values():
        assert all(row.began_ns_ago >= row.ended_ns_ago for row in rows)
