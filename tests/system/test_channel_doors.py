"""Agents that learn all doors of their portal and use them, over real QUIC on loopback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns

import attrs
import pytest
import trio

from channel.dialer import Dialer, DialerOptions
from channel.messages import Disconnect, DoorAddress, Portals
from runtime.net.address import Address
from runtime.net.udp import UdpSocket
from tests.ports import free_port
from tests.system.test_channel_quic import (
    AUTHORITY,
    MS,
    QUICK,
    Portal,
    S,
    behind_nat,
    dialing,
    portal,
    portal_process,
    until,
)
from tests.unit.channel.agents import INIT, JOIN, Agent, Desk
from tests.unit.channel.certificates import Authority

pytestmark = pytest.mark.system

PATIENT = DialerOptions(
    heartbeat_interval_ns=200 * MS, backoff_base_ns=3_600 * S, backoff_cap_ns=3_600 * S
)
"""Whoever backs off with these is not back before the test is over."""


def telling(*addresses: str) -> Callable[[Desk], None]:
    """Take an agent in, and tell it these doors."""

    def accept(desk: Desk) -> None:
        desk.accept()
        desk.channel.send(Portals(addresses=tuple(map(DoorAddress, addresses))))

    return accept


def stands_at(dialer: Dialer, there: Portal) -> bool:
    return dialer.connected and dialer.statistics().door == there.at


async def test_an_agent_whose_node_was_killed_goes_to_another_without_a_back_off(
    tmp_path: Path,
) -> None:
    agent = Agent()
    async with portal() as other:
        # The first node is a process of its own, which knows the other's door.
        with portal_process(0, tmp_path, other.at) as (first, port):
            async with dialing(f"127.0.0.1:{port}", agent, options=PATIENT) as dialer:
                await until(lambda: dialer.connected and dialer.statistics().doors == 2)
                first.kill()
                first.wait()
                await until(lambda: stands_at(dialer, other))
                assert agent.losses == 1
    assert agent.messages == [INIT, INIT]


# Of these nothing but a closed port, or QUIC's idle timeout, ends a connection that is silent.
HEARTY = attrs.evolve(
    PATIENT, missed_heartbeats=10**6, doubt_after_ns=3_600 * S, probe_timeout_ns=3_600 * S
)


async def test_a_node_that_was_killed_is_noticed_by_its_closed_port(tmp_path: Path) -> None:
    agent = Agent()
    async with portal() as other:
        with portal_process(0, tmp_path, other.at) as (first, port):
            async with dialing(f"127.0.0.1:{port}", agent, options=HEARTY) as dialer:
                await until(lambda: dialer.connected and dialer.statistics().doors == 2)
                first.kill()
                first.wait()
                killed_ns = monotonic_ns()
                await until(lambda: stands_at(dialer, other))
                # A heartbeat, a second of probes, a handshake: far from the idle timeout.
                assert monotonic_ns() - killed_ns < HEARTY.quic.idle_timeout_ns
                assert "port is closed" in dialer.statistics().last_error
                assert dialer.statistics().dials == 2
                assert agent.losses == 1
    assert agent.messages == [INIT, INIT]


async def test_an_idle_gateway_notices_that_its_node_was_killed(tmp_path: Path) -> None:
    """It has no heartbeat to send and nobody to talk to: what it sends is keepalives."""
    options = attrs.evolve(HEARTY, heartbeat_interval_ns=3_600 * S, keepalive_interval_ns=100 * MS)
    agent = Agent(attrs.evolve(JOIN, kind="gateway"))
    async with portal() as other:
        with portal_process(0, tmp_path, other.at) as (first, port):
            async with dialing(f"127.0.0.1:{port}", agent, options=options) as dialer:
                await until(lambda: dialer.connected and dialer.statistics().doors == 2)
                first.kill()
                first.wait()
                await until(lambda: stands_at(dialer, other))
                assert "port is closed" in dialer.statistics().last_error
                assert dialer.statistics().dials == 2
                assert agent.losses == 1
                await until(lambda: other.server.statistics().dropped_unread)


async def test_a_node_that_fell_silent_is_doubted_and_left_before_quic_gives_it_up() -> None:
    """Its port is open, so that no kernel tells of its end."""
    options = attrs.evolve(
        HEARTY,
        doubt_after_ns=300 * MS,
        doubt_timeout_ns=300 * MS,
        probe_interval_ns=50 * MS,
    )
    agent = Agent()
    async with portal() as first, behind_nat(first) as nat, portal() as other:
        first.answer = telling(other.at)
        async with dialing(nat.at, agent, options=options) as dialer:
            await until(lambda: dialer.statistics().doors == 2 and dialer.connected)
            with UdpSocket.bind(Address("127.0.0.1", 0)) as nobody:
                nat.server = nobody.local_address
                await until(lambda: stands_at(dialer, other))
            assert dialer.statistics().last_error == "no answer to a probe"
            assert agent.losses == 1


async def test_a_door_whose_port_is_closed_is_passed_by_without_a_handshake_timeout() -> None:
    options = attrs.evolve(QUICK, quic=attrs.evolve(QUICK.quic, handshake_timeout_ns=3_600 * S))
    closed = str(Address("127.0.0.1", free_port()))
    async with portal() as only:
        only.answer = telling(closed)
        async with dialing(only.at, Agent(), options=options) as dialer:
            await until(lambda: dialer.statistics().doors == 2 and dialer.connected)
            only.desks[0].channel.close(Disconnect(reason="draining", retry=True))
            await until(lambda: len(only.desks) == 2 and stands_at(dialer, only))
            assert dialer.statistics().dials >= 3
            assert "nobody listens" in dialer.statistics().last_error


async def test_a_draining_node_sends_an_agent_to_the_other_at_once() -> None:
    async with portal() as first, portal() as other:
        first.answer = telling(first.at, other.at)
        async with dialing(first.at, Agent(), options=PATIENT) as dialer:
            await until(lambda: dialer.statistics().doors == 2 and dialer.connected)
            assert stands_at(dialer, first)
            # An hour is what the node asks for, of those who have no other.
            first.desks[0].channel.close(
                Disconnect(reason="draining", retry=True, retry_after_ns=3_600 * S)
            )
            await until(lambda: stands_at(dialer, other))
            assert len(first.desks) == 1


def sent_on(door: str) -> Disconnect:
    """An hour is what the node asks of those who do not know what a door is here."""
    return Disconnect(
        reason="unavailable", retry=True, retry_after_ns=3_600 * S, door=DoorAddress(door)
    )


async def test_an_agent_goes_at_once_where_it_is_sent_on_to() -> None:
    async with portal() as first, portal() as third, portal() as other:
        first.answer = telling(first.at, third.at)  # and not the other
        async with dialing(first.at, Agent(), options=PATIENT) as dialer:
            await until(lambda: dialer.statistics().doors == 2 and dialer.connected)
            first.desks[0].channel.close(sent_on(other.at))
            await until(lambda: stands_at(dialer, other))
            assert dialer.statistics().dials == 2


async def test_an_agent_that_is_sent_on_to_nowhere_goes_to_the_others_at_once() -> None:
    nowhere = str(Address("127.0.0.1", free_port()))
    async with portal() as first, portal() as other:
        first.answer = telling(first.at, other.at, nowhere)
        async with dialing(first.at, Agent(), options=PATIENT) as dialer:
            await until(lambda: dialer.statistics().doors == 3 and dialer.connected)
            first.desks[0].channel.close(sent_on(nowhere))
            await until(lambda: stands_at(dialer, other))
            assert dialer.statistics().dials == 3


async def test_an_agent_that_is_refused_before_it_knows_any_door_goes_where_it_is_sent() -> None:
    async with portal() as first, portal() as other:
        first.answer = lambda desk: desk.channel.close(sent_on(other.at))
        async with dialing(first.at, Agent(), options=PATIENT) as dialer:
            await until(lambda: stands_at(dialer, other))
            assert dialer.statistics().dials == 2


async def test_nodes_that_send_an_agent_to_and_fro_make_it_wait() -> None:
    async with portal() as first, portal() as other:
        first.answer = lambda desk: desk.channel.close(sent_on(other.at))
        other.answer = lambda desk: desk.channel.close(sent_on(first.at))
        async with dialing(first.at, Agent(), options=PATIENT) as dialer:
            await until(lambda: dialer.statistics().dials == 2 and len(other.desks) == 1)
            await trio.sleep(0.5)
            assert dialer.statistics().dials == 2


async def test_a_node_that_was_stopped_sends_its_agents_to_the_other_at_once() -> None:
    stop = trio.Event()

    async def serve(other: Portal, *, task_status: trio.TaskStatus[Portal]) -> None:
        async with portal() as first:
            first.answer = telling(other.at)
            task_status.started(first)
            await stop.wait()

    async with portal() as other, trio.open_nursery() as nursery:
        first = await nursery.start(serve, other)
        async with dialing(first.at, Agent(), options=PATIENT) as dialer:
            await until(lambda: dialer.statistics().doors == 2 and dialer.connected)
            stop.set()
            await until(lambda: stands_at(dialer, other))


async def test_a_node_that_takes_no_newcomers_sends_them_on_and_keeps_those_it_has() -> None:
    async with portal() as first, portal() as other:
        first.answer = telling(first.at, other.at)
        async with (
            dialing(first.at, Agent(), options=PATIENT) as old,
            dialing(other.at, Agent(), options=PATIENT) as new,
        ):
            other.answer = first.answer
            await until(lambda: old.statistics().doors == 2 and new.connected)
            first.server.refuse_newcomers()
            new_desk = other.desks[0]
            new_desk.channel.send(Portals(addresses=(DoorAddress(first.at),)))
            await until(lambda: new.statistics().doors == 2)
            new_desk.channel.close(Disconnect(reason="shutting_down", retry=True))
            await until(lambda: first.server.statistics().shed == 1)
            await until(lambda: new.statistics().last_error == "draining")
            assert stands_at(old, first)


async def test_a_node_without_room_is_left_for_another_after_the_time_it_asked_for() -> None:
    def no_room(desk: Desk) -> None:
        desk.channel.close(
            Disconnect(reason="limits_exceeded", retry=True, retry_after_ns=100 * MS)
        )

    async with portal() as first, portal() as other:
        first.answer = telling(other.at)
        async with dialing(first.at, Agent()) as dialer:
            await until(lambda: dialer.statistics().doors == 2 and dialer.connected)
            first.answer = no_room
            no_room(first.desks[0])
            await until(lambda: stands_at(dialer, other))


async def test_doors_that_lead_nowhere_are_passed_by_and_the_tokens_stays_one() -> None:
    hasty = attrs.evolve(QUICK.quic, handshake_timeout_ns=500 * MS)
    options = attrs.evolve(QUICK, quic=hasty)
    with UdpSocket.bind(Address("127.0.0.1", 0)) as nobody:
        async with portal() as only:
            only.answer = telling("no-such-host.invalid:443", str(nobody.local_address))
            async with dialing(only.at, Agent(), options=options) as dialer:
                await until(lambda: dialer.statistics().doors == 3 and dialer.connected)
                only.desks[0].channel.close(Disconnect(reason="draining", retry=True))
                await until(lambda: len(only.desks) == 2 and dialer.connected)
                assert stands_at(dialer, only)


async def test_every_address_of_a_door_is_tried() -> None:
    """`localhost` has two where IPv6 is there; the nodes listen on IPv4 alone."""
    async with portal() as first, portal() as other:
        first.answer = telling(f"localhost:{other.server.address.port}")
        async with dialing(first.at, Agent(), options=PATIENT) as dialer:
            await until(lambda: dialer.statistics().doors == 2 and dialer.connected)
            first.desks[0].channel.close(Disconnect(reason="draining", retry=True))
            await until(lambda: len(other.desks) == 1 and dialer.connected)


OTHER_CA = Authority("installation").issue_pem("localhost", "127.0.0.1")
OTHER_NAME = AUTHORITY.issue_pem("other.example.com", "127.0.0.1")


@pytest.mark.parametrize(
    ("certificate", "problem"),
    [(OTHER_CA, "not the one that the token names"), (OTHER_NAME, "does not hold")],
    ids=["authority", "name"],
)
async def test_a_learned_door_has_to_show_the_tokens_authority_and_the_portals_name(
    certificate: tuple[bytes, bytes], problem: str
) -> None:
    """The portal's name is `localhost` here. That the door's own address is in the certificate
    counts for nothing."""
    agent = Agent()
    chain, key = certificate
    async with portal() as first, portal(chain=chain, key=key) as stranger:
        first.answer = telling(stranger.at)
        at = f"localhost:{first.server.address.port}"
        async with dialing(at, agent, options=QUICK) as dialer:
            await until(lambda: dialer.statistics().doors == 2 and dialer.connected)
            first.desks[0].channel.close(Disconnect(reason="draining", retry=True))
            await until(lambda: problem in dialer.statistics().last_error)
            await until(lambda: len(first.desks) == 2 and dialer.connected)
    assert stranger.desks == []
    assert stranger.server.statistics().connections == 0
    assert len(agent.challenges) == 2


async def test_a_door_to_which_an_agent_is_sent_on_has_to_prove_itself() -> None:
    agent = Agent()
    chain, key = OTHER_CA
    async with (
        portal() as first,
        portal(chain=chain, key=key) as stranger,
        dialing(first.at, agent, options=QUICK) as dialer,
    ):
        await until(lambda: dialer.connected)
        first.desks[0].channel.close(sent_on(stranger.at))
        await until(lambda: len(first.desks) == 2 and dialer.connected)
        assert dialer.statistics().dials == 3
    assert stranger.desks == []
    assert stranger.server.statistics().connections == 0
