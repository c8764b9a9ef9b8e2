from __future__ import annotations

import attrs

from actors.messages import DecideAccess, Grant
from actors.model import Resource, Site
from actors.services import Limits
from channel.frames import Frame
from channel.messages import (
    Ack,
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRevoked,
    Authorize,
    Candidates,
    RequestAuthorization,
    Revoke,
)

from .world import CIPHERTEXT, KEM, ClientAgent, World


def test_a_client_reaches_a_resource_that_a_policy_allows() -> None:
    world = World()
    world.policy()
    gateway, client = world.gateway(), world.client()
    answer = client.ask(world.web)
    assert isinstance(answer, AuthorizationCreated)
    assert answer.kem_ciphertext == CIPHERTEXT
    assert answer.gateway.id == gateway.id
    assert answer.gateway.public_key == gateway.tunnel_key
    assert answer.expires_in_ns == 86_400 * 10**9
    (asked,) = gateway.heard(Authorize)
    assert asked.client.public_key == client.tunnel_key
    assert asked.ice == answer.ice
    assert world.live() == set(world.rows(live=True)) == {answer.authorization_id}
    assert not world.crashes


def test_without_a_policy_the_denial_says_so() -> None:
    world = World()
    world.gateway()
    client = world.client()
    answer = client.ask(world.web)
    assert isinstance(answer, AuthorizationDenied)
    assert (answer.reason, answer.violated) == ("forbidden", ("policy",))


def test_the_end_of_a_policy_reaches_store_gateway_and_client_in_this_order() -> None:
    world = World()
    policy = world.policy()
    world.gateway()
    client = world.client()
    answer = client.ask(world.web)
    assert isinstance(answer, AuthorizationCreated)
    world.log.clear()
    world.remove("policy", policy.id)
    told = [(name, type(message)) for name, message in world.log]
    assert told[:2] == [("gateway", Revoke), ("laptop", AuthorizationRevoked)]
    assert world.rows()[answer.authorization_id].end_reason == "policy"
    assert not world.live()


def test_a_further_resource_joins_the_connection_that_stands() -> None:
    world = World()
    world.policy(world.web)
    world.policy(world.db)
    gateway, client = world.gateway(), world.client()
    first = client.ask(world.web)
    assert isinstance(first, AuthorizationCreated)
    second = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(second, AuthorizationCreated)
    assert second.connection_id == first.connection_id
    assert second.kem_ciphertext is None
    assert second.ice == first.ice
    assert gateway.heard(Authorize)[1].kem_public_key is None


def test_two_requests_at_once_make_one_connection() -> None:
    world = World()
    world.policy(world.web)
    world.policy(world.db)
    gateway, client = world.gateway(), world.client()
    client.request(world.web)
    client.request(world.db)
    world.host.run_until_idle()
    first, second = client.heard(AuthorizationCreated)
    assert first.connection_id == second.connection_id
    assert [first.kem_ciphertext, second.kem_ciphertext] == [CIPHERTEXT, None]
    assert len(gateway.connections) == 1


def test_a_silent_gateway_is_left_for_the_next_after_one_second() -> None:
    world = World()
    world.policy()
    first, second = world.gateway("one"), world.gateway("two")
    first.is_silent = second.is_silent = True
    client = world.client()
    assert client.ask(world.web) is None
    asked = first if first.heard(Authorize) else second
    other = second if asked is first else first
    other.is_silent = False
    world.run_for(0.9)
    assert client.answer() is None
    assert not other.heard(Authorize)
    world.run_for(0.2)
    answer = client.answer()
    assert isinstance(answer, AuthorizationCreated)
    assert answer.gateway.id == other.id
    (given_up,) = [row for row in world.rows().values() if row.gateway_id == asked.id]
    assert given_up.end_reason == "gateway: no answer"
    assert asked.heard(Revoke)[0].authorization_id == given_up.id
    assert world.live() == {answer.authorization_id}


def test_when_no_gateway_answers_the_client_is_told_offline() -> None:
    world = World()
    world.policy()
    for name in ("one", "two", "three"):
        world.gateway(name).is_silent = True
    client = world.client()
    client.request(world.web)
    world.run_for(6.9)
    assert client.answer() is None
    world.run_for(0.2)
    answer = client.answer()
    assert isinstance(answer, AuthorizationDenied)
    assert answer.reason == "offline"
    assert not world.live()
    assert not world.rows(live=True)


def test_a_silent_gateway_is_asked_once_more_when_no_other_is_left() -> None:
    world = World()
    world.policy()
    gateway = world.gateway()
    gateway.is_silent = True
    client = world.client()
    client.request(world.web)
    world.run_for(0.9)
    gateway.is_silent = False
    world.run_for(0.2)
    answer = client.answer()
    assert isinstance(answer, AuthorizationCreated)
    assert world.live() == set(client.live) == set(gateway.live)


def test_without_any_gateway_the_client_is_told_offline_at_once() -> None:
    world = World()
    world.policy()
    answer = world.client().ask(world.web)
    assert isinstance(answer, AuthorizationDenied)
    assert answer.reason == "offline"


def test_a_whole_request_ends_after_fifteen_seconds() -> None:
    world = World()
    world.policy()
    for number in range(20):
        world.gateway(f"gateway-{number}").is_silent = True
    client = world.client()
    client.request(world.web)
    world.run_for(14.9)
    assert client.answer() is None
    world.run_for(0.2)
    answer = client.answer()
    assert isinstance(answer, AuthorizationDenied)
    assert answer.reason == "offline"


def test_a_gateway_that_left_a_request_without_an_answer_is_asked_last() -> None:
    world = World()
    world.policy(world.web)
    world.policy(world.db)
    one, two = world.gateway("one"), world.gateway("two")
    one.is_silent = two.is_silent = True
    client = world.client()
    client.request(world.web)
    world.run_for(0.5)
    silent, other = (one, two) if one.heard(Authorize) else (two, one)
    other.is_silent = False
    world.run_for(1)
    answer = client.ask(world.db)
    assert isinstance(answer, AuthorizationCreated)
    assert answer.gateway.id == other.id
    assert len(silent.heard(Authorize)) == 1


def test_a_gateway_that_the_client_lost_comes_last_and_its_connection_is_forgotten() -> None:
    world = World()
    world.policy()
    one, two = world.gateway("one"), world.gateway("two")
    client = world.client()
    first = client.ask(world.web)
    assert isinstance(first, AuthorizationCreated)
    lost, other = (one, two) if first.gateway.id == one.id else (two, one)
    second = client.ask(world.web, failed=(lost.id,))
    assert isinstance(second, AuthorizationCreated)
    assert second.gateway.id == other.id
    assert second.kem_ciphertext == CIPHERTEXT
    assert world.live() == set(client.live) == {second.authorization_id}
    assert world.rows()[first.authorization_id].end_reason == "replaced"
    third = client.ask(world.web, failed=(lost.id, other.id))
    assert isinstance(third, AuthorizationCreated)
    assert third.kem_ciphertext == CIPHERTEXT
    assert third.connection_id not in (first.connection_id, second.connection_id)


def test_the_ceiling_of_every_gateway_is_named_in_the_denial() -> None:
    world = World()
    world.policy()
    for name in ("one", "two"):
        world.gateway(name).refusal = "ceiling"
    answer = world.client().ask(world.web)
    assert isinstance(answer, AuthorizationDenied)
    assert (answer.reason, answer.violated) == ("forbidden", ("gateway_ceiling",))
    assert not world.rows(live=True)


def test_a_connection_that_the_gateway_does_not_know_is_made_anew() -> None:
    world = World()
    world.policy(world.web)
    world.policy(world.db)
    gateway, client = world.gateway(), world.client()
    first = client.ask(world.web)
    assert isinstance(first, AuthorizationCreated)
    gateway.connections.clear()
    second = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(second, AuthorizationCreated)
    assert second.kem_ciphertext == CIPHERTEXT
    assert second.connection_id != first.connection_id
    # Both ends have given up the old connection, so what it carried has ended.
    assert world.live() == {second.authorization_id}


def test_a_connection_without_any_authorisation_is_forgotten() -> None:
    world = World()
    policy = world.policy(world.web)
    world.policy(world.db)
    gateway, client = world.gateway(), world.client()
    first = client.ask(world.web)
    assert isinstance(first, AuthorizationCreated)
    world.remove("policy", policy.id)
    second = client.ask(world.db, connected=(gateway.id,))
    assert isinstance(second, AuthorizationCreated)
    assert second.connection_id != first.connection_id
    assert second.kem_ciphertext == CIPHERTEXT


def test_a_revocation_on_the_way_to_the_gateway_wins_over_the_grant() -> None:
    world = World()
    policy = world.policy()
    gateway = world.gateway()
    gateway.is_silent = True
    client = world.client()
    client.request(world.web)
    world.host.run_until_idle()
    (asked,) = gateway.heard(Authorize)
    world.remove("policy", policy.id)
    assert gateway.heard(Revoke)[0].authorization_id == asked.authorization_id
    gateway.say(
        Ack(authorization_id=asked.authorization_id, kem_ciphertext=CIPHERTEXT),
        ref=gateway.frame(Authorize).ref,
    )
    world.host.run_until_idle()
    answer = client.answer()
    assert isinstance(answer, AuthorizationDenied)
    assert (answer.reason, answer.violated) == ("forbidden", ("policy",))
    assert not world.live()


def test_candidates_travel_both_ways_and_only_on_own_connections() -> None:
    world = World()
    world.policy()
    gateway, client, other = world.gateway(), world.client(), world.client(remote="192.0.2.1")
    answer = client.ask(world.web)
    assert isinstance(answer, AuthorizationCreated)
    said = Candidates(connection_id=answer.connection_id, generation=1)
    other.say(said)
    client.say(attrs.evolve(said, connection_id=world.new_id()))
    world.host.run_until_idle()
    assert not gateway.heard(Candidates)
    client.say(said)
    gateway.say(attrs.evolve(said, generation=2))
    world.host.run_until_idle()
    assert gateway.heard(Candidates) == [said]
    assert [each.generation for each in client.heard(Candidates)] == [2]
    assert not other.heard(Candidates)


def test_the_candidates_of_a_gateway_never_reach_the_client_before_its_answer() -> None:
    world = World()
    world.policy()
    gateway = world.gateway()
    gateway.is_silent = True
    client = world.client()
    client.request(world.web)
    world.host.run_until_idle()
    frame = gateway.frame(Authorize)
    gateway.say(Candidates(connection_id=frame.message.connection_id, generation=1))
    world.host.run_until_idle()
    assert not client.heard(Candidates)
    gateway.say(
        Ack(authorization_id=frame.message.authorization_id, kem_ciphertext=CIPHERTEXT),
        ref=frame.ref,
    )
    world.host.run_until_idle()
    assert client.line is not None
    kinds = [type(each.message) for each in client.line.frames]
    assert kinds[-2:] == [AuthorizationCreated, Candidates]


def test_an_acknowledgement_that_nobody_asked_for_changes_nothing() -> None:
    world = World()
    world.policy()
    gateway, client = world.gateway(), world.client()
    answer = client.ask(world.web)
    assert isinstance(answer, AuthorizationCreated)
    for ref in (None, 1, 2, 99):
        gateway.say(Ack(authorization_id=world.new_id(), kem_ciphertext=CIPHERTEXT), ref=ref)
        gateway.say(Ack(authorization_id=answer.authorization_id), ref=ref)
    world.host.run_until_idle()
    assert world.live() == {answer.authorization_id}
    assert gateway.is_connected
    assert not world.crashes


def test_requests_above_the_limit_are_shed_with_a_time_to_ask_again() -> None:
    world = World(limits=Limits(requests_per_s=1, requests_burst=3))
    client = world.client()
    for _ in range(5):
        client.ask(world.web)
    reasons = [each.reason for each in client.heard(AuthorizationDenied)]
    assert reasons == ["forbidden"] * 3 + ["limits_exceeded"] * 2
    assert client.heard(AuthorizationDenied)[-1].retry_after_ns > 0


def test_an_unapproved_gateway_and_one_of_another_site_are_never_asked() -> None:
    world = World()
    world.policy()
    site = Site(name="elsewhere", **world.common())
    world.put(site)
    elsewhere = world.gateway("far", token=world.token("gateway", site_id=site.id))
    near = world.gateway("near")
    world.put(attrs.evolve(world.get("gateway", near.id), approved=False))
    answer = world.client().ask(world.web)
    assert isinstance(answer, AuthorizationDenied)
    assert answer.reason == "offline"
    assert near.refused == "awaiting_approval"
    assert not elsewhere.heard(Authorize)


def test_who_never_heard_the_answer_asks_once_more_and_does_not_wait_for_itself() -> None:
    world = World()
    world.policy()
    world.gateway()
    client = world.client()
    (online,) = world.presence().clients
    request = RequestAuthorization(resource_id=world.web.id, kem_public_key=KEM)
    ask = DecideAccess(client_id=client.id, number=online.number, request=request)
    first, second = world.call(ask), world.call(ask)
    assert isinstance(first, Grant)
    assert isinstance(second, Grant)
    assert first.authorize.connection_id != second.authorize.connection_id
    assert world.live() == set(world.rows(live=True)) == {second.authorization_id}
    assert not world.crashes


class Eager(ClientAgent):
    """Asks for `wanted` once more in the moment in which it is told that it may have it."""

    wanted: Resource | None = None

    def hear(self, frame: Frame) -> None:
        super().hear(frame)
        if isinstance(frame.message, AuthorizationCreated) and self.wanted is not None:
            wanted, self.wanted = self.wanted, None
            self.request(wanted)


def test_a_client_that_asks_again_as_soon_as_it_is_answered_is_answered_again() -> None:
    world = World()
    world.policy()
    world.gateway()
    client = Eager(world, "laptop", world.user_token, "203.0.113.7")
    client.join()
    client.wanted = world.web
    client.ask(world.web)
    first, second = client.heard(AuthorizationCreated)
    assert world.live() == {second.authorization_id} != {first.authorization_id}
    assert not world.crashes
