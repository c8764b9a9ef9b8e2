from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from clients.renewal import Renewal, RenewalTimes
from runtime.randomness import SeededRandomness

from .stage import ACK, CLIENT_IPV4, SERVER, SYN, SYN_ACK, WEB, Stage, answer, tcp, udp

MINUTE = 60
MINUTE_NS = MINUTE * 10**9
HOUR_NS = 60 * MINUTE_NS
# A day in twenty minutes: the other times of the world stay as they are.
TIMES = RenewalTimes(
    idle_from_ns=8 * MINUTE_NS,
    idle_spread_ns=2 * MINUTE_NS,
    always_from_ns=14 * MINUTE_NS,
    always_spread_ns=1 * MINUTE_NS,
)


# --- the plan ------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1_000), opened_ns=st.integers(0, 10**18), is_idle=st.booleans())
def test_no_connection_becomes_a_day_old(seed: int, opened_ns: int, is_idle: bool) -> None:
    renewal = Renewal.of_connection(opened_ns, RenewalTimes(), SeededRandomness(seed, "x"))
    attempts = []
    while len(attempts) < 5:
        now = renewal.check_at_ns
        assert not renewal.is_due(now - 1, can_ask=True, is_idle=lambda: True)
        if renewal.is_due(now, can_ask=True, is_idle=lambda: is_idle):
            attempts.append(now - opened_ns)
    assert renewal.begun
    assert attempts[0] >= (23 * HOUR_NS if is_idle else 24 * HOUR_NS - 10 * MINUTE_NS)
    assert attempts[0] <= (23.5 * HOUR_NS if is_idle else 24 * HOUR_NS - 5 * MINUTE_NS)
    assert attempts[4] < 24 * HOUR_NS


def test_who_cannot_ask_looks_again_each_minute() -> None:
    renewal = Renewal.of_connection(0, RenewalTimes(), SeededRandomness(1, "x"))
    for now in range(24 * HOUR_NS, 25 * HOUR_NS, MINUTE_NS):
        assert not renewal.is_due(now, can_ask=False, is_idle=lambda: True)
        assert renewal.check_at_ns == now + MINUTE_NS
    assert not renewal.begun
    assert renewal.is_due(25 * HOUR_NS, can_ask=True, is_idle=lambda: False)


# --- the agent -----------------------------------------------------------------------------------


def connected() -> Stage:
    """A client with a connection that is in use, and leases that last."""
    stage = Stage(lease_ns=24 * HOUR_NS, renewal_times=TIMES)
    stage.client_sends(udp())
    stage.run_until(lambda: stage.to_servers[0])
    return stage


def connection_of(stage: Stage) -> str:
    peers: Any = stage.client.status(stage.now)["peers"]
    (peer,) = peers
    return str(peer["connection_id"])


def until_replaced(stage: Stage, keep_busy: Callable[[], None] = lambda: None) -> None:
    """Let time pass until there is another connection."""
    first, began = connection_of(stage), stage.now
    while connection_of(stage) == first:
        assert stage.now - began < 20 * MINUTE_NS, "never replaced"
        stage.advance(20)
        keep_busy()


def passes(stage: Stage) -> bool:
    stage.to_client.clear()
    stage.client_sends(udp())
    stage.advance(5)
    stage.server_answers(answer())
    return stage.to_client == [answer()]


def test_an_idle_connection_is_replaced_with_a_fresh_key() -> None:
    stage = connected()
    opened = stage.now
    stage.advance(7.9 * MINUTE)
    assert len(stage.requests) == 1
    until_replaced(stage)
    assert 8 * MINUTE_NS <= stage.now - opened <= 10.5 * MINUTE_NS
    first, second = stage.requests
    assert first.kem_public_key != second.kem_public_key
    assert second.resource_id == WEB.id
    assert second.connected_gateway_ids == second.failed_gateway_ids == ()
    assert stage.acks[1].kem_ciphertext is not None
    assert stage.acks[1].kem_ciphertext != stage.acks[0].kem_ciphertext
    assert len(stage.gateways[0].engine.connection_ids) == 1
    assert passes(stage)
    stage.advance(6 * MINUTE)
    assert len(stage.requests) == 2, "the new one is young"


def test_a_connection_in_use_is_replaced_at_last_and_its_packets_wait() -> None:
    stage = connected()
    opened = stage.now
    sent: list[bytes] = []
    stage.to_servers[0].clear()

    def keep_busy() -> None:
        sent.append(udp(b"%d" % len(sent)))
        stage.client_sends(sent[-1])

    until_replaced(stage, keep_busy)
    assert 14 * MINUTE_NS <= stage.now - opened <= 15.5 * MINUTE_NS
    keep_busy()
    stage.advance(5)
    assert stage.to_servers[0] == sent
    assert passes(stage)


def test_an_open_tcp_flow_is_left_in_peace_until_it_has_to_go() -> None:
    stage = connected()
    opened = stage.now
    stage.advance(7 * MINUTE)
    stage.client_sends(tcp(SYN))
    to_client = {"source": SERVER, "destination": str(CLIENT_IPV4)}
    stage.server_answers(tcp(SYN_ACK, ports=(80, 40_000), **to_client))
    stage.client_sends(tcp(ACK))
    until_replaced(stage)
    assert stage.now - opened >= 14 * MINUTE_NS
    assert stage.client.counts.reset_flows == 1


def test_nothing_is_replaced_while_the_portal_is_away_and_soon_when_it_is_back() -> None:
    stage = connected()
    stage.portal_away = True
    stage.client.channel_lost(stage.now)
    stage.advance(20 * MINUTE)
    assert len(stage.requests) == 1
    assert passes(stage)
    stage.portal_away = False
    stage.tell(stage.client, stage.client_init())
    back = stage.now
    until_replaced(stage)
    assert stage.now - back <= 1.5 * MINUTE_NS
    assert passes(stage)


def test_a_replacement_that_is_refused_leaves_what_there_is_and_is_tried_again() -> None:
    stage = connected()
    stage.allowed.clear()
    stage.advance(13 * MINUTE)
    assert len(stage.requests) > 2
    assert len(stage.authorizations) == 1
    assert passes(stage)
    stage.allowed.add(WEB.id)
    until_replaced(stage)
    assert passes(stage)
