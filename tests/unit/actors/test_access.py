from __future__ import annotations

from channel.messages import (
    AuthorizationCreated,
    AuthorizationDenied,
    AuthorizationRevoked,
    Authorize,
    Revoke,
)

from .world import CIPHERTEXT, World


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
