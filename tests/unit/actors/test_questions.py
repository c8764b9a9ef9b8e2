"""What the API asks of the actors."""

from __future__ import annotations

from uuid import UUID

from actors.messages import (
    AccountStatistics,
    AccountStatisticsRequest,
    AskExposure,
    AwayGateway,
    Explain,
    ExplainAnswer,
    Exposures,
    FlowsFrom,
    PostureReported,
    ResourceExposure,
)
from actors.model import Fact
from actors.policy.engine import Allowed, Denied
from actors.wire import node_codec
from channel.messages import IpText

from .test_life import from_network, opened
from .test_logs import flow
from .world import S, World, hours


def test_an_access_can_be_explained_for_a_connected_client() -> None:
    world = World()
    policy = world.policy(conditions=from_network("203.0.113.0/24"))
    gateway, client, _ = opened(world)
    answer: ExplainAnswer = world.call(Explain(client_id=client.id, resource_id=world.web.id))
    assert isinstance(answer.explanation.decision, Allowed)
    assert answer.online_gateway_ids == (gateway.id,)
    (trace,) = answer.explanation.policies
    assert (trace.policy_id, trace.member, trace.allows) == (policy.id, True, True)
    elsewhere = Explain(
        client_id=client.id, resource_id=world.web.id, remote_ip=IpText("192.0.2.1")
    )
    told = world.call(elsewhere).explanation
    assert told.decision == Denied("forbidden", ("remote_ip",))


def test_an_access_can_be_explained_for_a_principal_without_devices_and_for_another_time() -> None:
    world = World()
    world.policy(expires_at=world.clock.utc_now() + hours(1))
    ask = Explain(principal_id=world.user.id, resource_id=world.web.id)
    assert isinstance(world.call(ask).explanation.decision, Allowed)
    late = Explain(
        principal_id=world.user.id,
        resource_id=world.web.id,
        at=world.clock.utc_now() + hours(2),
    )
    assert world.call(late).explanation.decision == Denied("forbidden", ("policy_expired",))


def test_an_explanation_of_what_is_not_there_is_an_answer_too() -> None:
    world = World()
    ask = Explain(client_id=world.new_id(), resource_id=world.new_id())
    answer = world.call(ask)
    assert answer.explanation.decision == Denied("not_found")
    assert answer.online_gateway_ids == ()
    assert not world.crashes


def test_an_account_counts_what_it_did() -> None:
    world = World()
    policy = world.policy()
    _, client, _ = opened(world)
    client.ask(world.db)
    world.remove("policy", policy.id)
    counts: AccountStatistics = world.call(AccountStatisticsRequest())
    assert (counts.granted, counts.denied, counts.ended) == (1, 1, 1)
    assert (counts.clients, counts.gateways, counts.live_authorizations) == (1, 1, 0)
    assert counts.change_number == len(world.changes())
    assert "sessions" in world.plane.tree()


def test_how_late_a_revocation_takes_effect_depends_on_who_is_connected() -> None:
    world = World()
    world.policy(lease_s=3_600)
    gateway, _, _ = opened(world)
    world.run_for(600)

    def asked() -> ResourceExposure:
        answer: Exposures = world.call(AskExposure((world.web.id, world.new_id())))
        (told,) = answer.resources
        return told

    now = asked()
    assert (now.resource_id, now.connected, now.away) == (world.web.id, 1, ())
    gateway.lose_channel()
    away = AwayGateway(gateway_id=gateway.id, authorizations=1, longest_ns=3_000 * S)
    assert (asked().connected, asked().away) == (0, (away,))
    world.run_for(3_001)
    assert world.call(AskExposure((world.web.id,))) == Exposures(())


def test_what_is_asked_and_reported_travels_between_nodes() -> None:
    codec = node_codec()
    away = AwayGateway(gateway_id=UUID(int=3), authorizations=2, longest_ns=4)
    told = Exposures((ResourceExposure(resource_id=UUID(int=1), connected=1, away=(away,)),))
    report = FlowsFrom(
        sender="gateway",
        sender_id=UUID(int=1),
        number=2,
        flows=(flow(UUID(int=3)),),
    )
    posture = PostureReported(
        client_id=UUID(int=1),
        number=2,
        facts=(Fact(name="a", value=True), Fact(name="b", value=1), Fact(name="c", value="1")),
    )
    for message in (told, report, posture):
        kind, body = codec.pack(message)
        assert codec.decode(kind, body) == message
