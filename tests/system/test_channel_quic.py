"""The control channel over real QUIC on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from uuid import UUID

import pytest
import trio

from channel.dialer import Dialer, DialerOptions, Refused
from channel.frames import CLOSE_CODES, encode_frame
from channel.listener import (
    ALPN,
    Channel,
    ChannelLimits,
    ChannelServer,
    serve_channels,
)
from channel.messages import (
    TO_CLIENT,
    Candidates,
    Challenge,
    ClientInit,
    Disconnect,
    Heartbeat,
    Join,
    Resource,
    ResourceRemoved,
)
from runtime.clock import SystemClock
from runtime.net.address import Address
from runtime.net.quic import QuicConnection, connect_quic
from runtime.net.udp import UdpSocket
from runtime.randomness import SystemRandomness
from tests.system.rebinding import Rebinding
from tests.unit.channel.agents import INIT, JOIN, TOKEN, Agent, Desk
from tests.unit.channel.certificates import Authority

pytestmark = pytest.mark.system

AUTHORITY = Authority("installation")
CHAIN, KEY = AUTHORITY.issue_pem("localhost", "127.0.0.1")
ANY = Address("127.0.0.1", 0)
MS = 10**6
S = 10**9
UNTIL_S = 60
CANDIDATES = Candidates(connection_id=UUID(int=5), generation=0)
QUICK = DialerOptions(
    heartbeat_interval_ns=200 * MS, backoff_base_ns=100 * MS, backoff_cap_ns=400 * MS
)


class Portal:
    """A portal in this process, and everybody who came to it."""

    def __init__(self) -> None:
        self.desks: list[Desk] = []
        self.answer: Callable[[Desk], None] = Desk.accept
        self.server: ChannelServer

    def connected(self, channel: Channel, challenge: Challenge) -> Desk:
        desk = Desk(channel, answer=self.answer)
        self.desks.append(desk)
        return desk

    @property
    def at(self) -> str:
        return f"127.0.0.1:{self.server.address.port}"


@asynccontextmanager
async def portal(
    limits: ChannelLimits | None = None, chain: bytes = CHAIN, key: bytes = KEY
) -> AsyncIterator[Portal]:
    desk = Portal()
    async with trio.open_nursery() as nursery:
        desk.server = await nursery.start(
            lambda task_status: serve_channels(
                ANY,
                chain,
                key,
                desk.connected,
                portal="localhost",
                clock=SystemClock(),
                randomness=SystemRandomness(),
                limits=limits,
                task_status=task_status,
            )
        )
        yield desk
        nursery.cancel_scope.cancel()


def dialer_for(
    at: str, agent: Agent, *, pin: bytes = AUTHORITY.pin, options: DialerOptions = QUICK
) -> Dialer:
    return Dialer(
        at,
        pin,
        TO_CLIENT,
        agent,
        SystemClock(),
        SystemRandomness(),
        on_frame=lambda: None,
        options=options,
    )


@asynccontextmanager
async def dialing(at: str, agent: Agent, **options: object) -> AsyncIterator[Dialer]:
    dialer = dialer_for(at, agent, **options)  # type: ignore[arg-type]  # passed through
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialer.run)
        yield dialer
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    """A fixture's deadline would not end the test that waits here."""
    with trio.fail_after(UNTIL_S):
        while not condition():
            await trio.sleep(0.005)


# --- the ordinary course -----------------------------------------------------------------------


async def test_an_agent_joins_talks_and_beats() -> None:
    agent = Agent()
    async with portal() as there, dialing(there.at, agent) as dialer:
        await until(lambda: dialer.connected)
        assert agent.messages == [INIT]
        (desk,) = there.desks
        assert desk.channel.remote == "127.0.0.1"
        assert dialer.send(CANDIDATES, ref=3)
        desk.channel.send(ResourceRemoved(resource_id=UUID(int=4)), epoch=1)
        await until(lambda: len(desk.frames) == 2 and len(agent.frames) == 2)
        assert desk.frames[1].ref == 3
        await until(lambda: dialer.statistics().round_trip_ns is not None)
        assert there.server.statistics().unjoined == 0
    assert agent.losses == 1


async def test_the_socket_of_an_agent_carries_its_mark() -> None:
    agent = Agent()
    async with portal() as there, trio.open_nursery() as nursery:
        dialer = Dialer(
            there.at,
            AUTHORITY.pin,
            TO_CLIENT,
            agent,
            SystemClock(),
            SystemRandomness(),
            mark=0x484C,
            on_frame=lambda: None,
            options=QUICK,
        )
        nursery.start_soon(dialer.run)
        await until(lambda: dialer.connected)
        assert 0x484C in marks_of_own_sockets()
        nursery.cancel_scope.cancel()


def marks_of_own_sockets() -> set[int]:
    """SO_MARK of every socket of this process."""
    marks = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as one:
                marks.add(one.getsockopt(socket.SOL_SOCKET, socket.SO_MARK))
        except OSError:
            continue
    return marks


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_the_name_in_the_token_may_be_an_address_or_a_dns_name(host: str) -> None:
    async with portal() as there:
        at = f"{host}:{there.server.address.port}"
        async with dialing(at, Agent()) as dialer:
            await until(lambda: dialer.connected)


async def test_an_init_of_many_megabytes_arrives() -> None:
    resources = tuple(
        Resource(id=UUID(int=n), name="n" * 250, kind="cidr", address="a" * 250)
        for n in range(10_000)
    )
    init = ClientInit(
        account_id=INIT.account_id,
        client_id=INIT.client_id,
        interface=INIT.interface,
        resources=resources,
        relays=(),
        authorizations=(),
    )

    def accept(desk: Desk) -> None:
        desk.channel.joined("client")
        desk.channel.send(init, epoch=1)

    agent = Agent()
    async with portal() as there:
        there.answer = accept
        async with dialing(there.at, agent, options=DialerOptions()) as dialer:
            await until(lambda: dialer.connected)
            assert agent.messages == [init]


async def test_a_disconnect_that_forbids_it_is_the_last_word() -> None:
    agent = Agent()
    async with portal() as there:
        there.answer = Desk.refuse
        with pytest.raises(Refused) as caught:
            await dialer_for(there.at, agent).run()
        assert caught.value.code == "invalid_token"
        assert len(there.desks) == 1
        await until(lambda: there.desks[0].ends == ["invalid_token"])


async def test_a_disconnect_with_a_time_is_followed_by_a_new_join_of_a_later_incarnation() -> None:
    def later(desk: Desk) -> None:
        desk.channel.close(Disconnect(reason="unavailable", retry=True, retry_after_ns=100 * MS))

    async with portal() as there:
        there.answer = later
        async with dialing(there.at, Agent()) as dialer:
            await until(lambda: there.desks and there.desks[0].ends)
            there.answer = Desk.accept
            await until(lambda: dialer.connected)
            joins = [desk.messages[0] for desk in there.desks]
            incarnations = [join.incarnation for join in joins if isinstance(join, Join)]
            assert incarnations == sorted(set(incarnations))
            assert dialer.statistics().last_error == "unavailable"


async def test_draining_sends_agents_away_and_takes_no_new_one() -> None:
    agent = Agent()
    async with portal() as there, dialing(there.at, agent) as dialer:
        await until(lambda: dialer.connected)
        there.server.drain(spread_ns=MS)
        await until(lambda: dialer.statistics().last_error == "draining")
        await until(lambda: there.server.statistics().shed > 0)
        assert there.desks[0].ends == ["draining"]
        assert len(there.desks) == 1


# --- losses ------------------------------------------------------------------------------------


@contextmanager
def portal_process(
    port: int, directory: Path, *doors: str, websocket: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    (directory / "chain").write_bytes(CHAIN)
    (directory / "key").write_bytes(KEY)
    arguments = [str(port), str(directory / "chain"), str(directory / "key"), *doors]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.system.channel_portal", *arguments],
        env=os.environ | ({"WEBSOCKET_ALONE": "1"} if websocket else {}),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def test_an_agent_comes_back_to_a_portal_that_was_killed_and_restarted(
    tmp_path: Path,
) -> None:
    agent = Agent()
    with portal_process(0, tmp_path) as (first, port):
        async with dialing(f"127.0.0.1:{port}", agent) as dialer:
            await until(lambda: dialer.connected)
            first.kill()
            first.wait()
            with portal_process(port, tmp_path):
                await until(lambda: len(agent.messages) == 2)
                assert dialer.connected
    assert agent.messages == [INIT, INIT]
    assert [len(challenge.nonce) for challenge in agent.challenges] == [32, 32]
    assert agent.challenges[0].nonce != agent.challenges[1].nonce


async def test_a_portal_that_falls_silent_is_noticed_and_dialled_again() -> None:
    agent = Agent()
    async with portal() as there, behind_nat(there) as nat, dialing(nat.at, agent) as dialer:
        await until(lambda: dialer.connected)
        with UdpSocket.bind(ANY) as nobody:
            nat.server = nobody.local_address
            await until(lambda: agent.losses == 1)
            assert not dialer.send(CANDIDATES)
        nat.server = there.server.address
        await until(lambda: dialer.connected)


async def test_a_poke_tells_the_portal_of_a_new_path_at_once() -> None:
    agent = Agent()
    slow = DialerOptions()
    async with (
        portal() as there,
        behind_nat(there) as nat,
        dialing(nat.at, agent, options=slow) as dialer,
    ):
        await until(lambda: dialer.connected)
        nat.rebind("127.0.0.2")
        dialer.poke()
        await until(lambda: len(there.desks[0].remotes) == 2)
        assert there.desks[0].remotes == ["127.0.0.1", "127.0.0.2"]
        assert there.desks[0].channel.remote == "127.0.0.2"
        assert dialer.send(CANDIDATES)
        await until(lambda: len(there.desks[0].frames) == 2)
        assert agent.losses == 0


async def test_a_poke_on_a_dead_path_leads_to_another_connection() -> None:
    options = DialerOptions(probe_timeout_ns=300 * MS, backoff_base_ns=MS)
    agent = Agent()
    async with (
        portal() as there,
        behind_nat(there) as nat,
        dialing(nat.at, agent, options=options) as dialer,
    ):
        await until(lambda: dialer.connected)
        with UdpSocket.bind(ANY) as nobody:
            nat.server = nobody.local_address
            dialer.poke()
            await until(lambda: dialer.statistics().last_error)
            assert dialer.statistics().last_error == "no answer to a probe"
            assert agent.losses == 1


class PortalNat(Rebinding):
    @property
    def at(self) -> str:
        return str(self.inside.local_address)


@asynccontextmanager
async def behind_nat(there: Portal) -> AsyncIterator[PortalNat]:
    nat = PortalNat(there.server.address)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(nat.run)
        yield nat
        nursery.cancel_scope.cancel()


# --- distrust ----------------------------------------------------------------------------------


async def test_a_portal_of_another_authority_never_sees_the_token() -> None:
    agent, stranger = Agent(), Authority("installation")
    chain, key = stranger.issue_pem("localhost", "127.0.0.1")
    async with portal(chain=chain, key=key) as there, dialing(there.at, agent) as dialer:
        await until(lambda: dialer.statistics().dials >= 2)
        assert "not the one that the token names" in dialer.statistics().last_error
        assert agent.challenges == []
        assert there.desks == []
        assert there.server.statistics().connections == 0


async def test_who_shows_the_true_chain_without_its_key_never_sees_the_token() -> None:
    _, other_key = AUTHORITY.issue_pem("localhost", "127.0.0.1")
    agent = Agent()
    async with (
        portal(chain=CHAIN, key=other_key) as there,
        dialing(there.at, agent) as dialer,
    ):
        await until(lambda: dialer.statistics().dials >= 2)
        assert dialer.statistics().connections == 0
        assert agent.challenges == []
        assert there.desks == []


async def test_a_portal_under_another_name_never_sees_the_token() -> None:
    chain, key = AUTHORITY.issue_pem("other.example.com")
    agent = Agent()
    async with portal(chain=chain, key=key) as there, dialing(there.at, agent) as dialer:
        await until(lambda: dialer.statistics().dials >= 2)
        assert "does not hold" in dialer.statistics().last_error
        assert agent.challenges == []


@asynccontextmanager
async def bare_connection(there: Portal) -> AsyncIterator[QuicConnection]:
    async with connect_quic(
        there.server.address, server_name="localhost", alpn=ALPN, verify=lambda chain: None
    ) as connection:
        await connection.receive()
        yield connection


JOINED = encode_frame(JOIN, limit=10_000)


@pytest.mark.parametrize(
    "garbage",
    [
        (10 * 1024 * 1024).to_bytes(4, "big"),
        JOINED + (10 * 1024 * 1024).to_bytes(4, "big"),
        b"GET / HTTP/1.1\r\n\r\n",
        JOINED + b"\x00\x00\x00\x05hello",
        JOINED + JOINED,
        JOINED + b"\x00\x01\x00\x00" + b"[" * 65_536,
    ],
    ids=["ten_megabytes", "ten_megabytes_joined", "http", "text", "second_join", "nested"],
)
async def test_garbage_closes_its_own_channel_with_a_code_and_no_other(garbage: bytes) -> None:
    bystander = Agent()
    async with portal() as there, dialing(there.at, bystander) as dialer:
        await until(lambda: dialer.connected)
        async with bare_connection(there) as connection:
            connection.send(garbage)
            data = b""
            while piece := await connection.receive():
                data += piece
            assert b'"reason":"protocol_error"' in data
            await until(lambda: connection.closed)
            assert connection.closed is not None
            assert connection.closed.code == CLOSE_CODES["protocol_error"]
        await until(lambda: there.desks[1].ends == ["protocol_error"])
        assert there.server.statistics().protocol_errors == 1
        assert dialer.connected
        assert bystander.losses == 0


async def test_who_does_not_join_is_sent_away() -> None:
    limits = ChannelLimits(join_deadline_ns=200 * MS)
    async with portal(limits) as there, bare_connection(there) as connection:
        connection.send(encode_frame(Heartbeat(), limit=1000))
        while await connection.receive():
            pass
        await until(lambda: there.desks[0].ends == ["protocol_error"])


async def test_too_many_that_have_not_joined_are_told_to_come_again() -> None:
    async with portal(ChannelLimits(max_unjoined=1)) as there, bare_connection(there):
        async with connect_quic(
            there.server.address, server_name="localhost", alpn=ALPN, verify=lambda chain: None
        ) as second:
            assert b'"reason":"unavailable"' in await second.receive()
        assert there.server.statistics().shed == 1


async def test_a_desk_that_fails_costs_one_agent_its_channel(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(desk: Desk) -> None:
        raise KeyError("a mistake")

    bystander = Agent()
    async with portal() as there, dialing(there.at, bystander) as dialer:
        await until(lambda: dialer.connected)
        there.answer = fail
        async with bare_connection(there) as connection:
            connection.send(JOINED)
            while await connection.receive():
                pass
        await until(lambda: there.server.statistics().failures == 1)
        assert there.desks[1].ends == ["unavailable"]
        assert dialer.connected
    written = capfd.readouterr()
    assert TOKEN not in written.out + written.err


async def test_who_ended_a_channel_is_told_by_its_reason() -> None:
    """An agent that goes is no end of the portal."""
    async with portal() as there:
        async with dialing(there.at, Agent()) as dialer:
            await until(lambda: dialer.connected)
        await until(lambda: there.desks[0].ends)
        async with bare_connection(there) as connection:
            connection.send(JOINED)
            await connection.receive()
            connection.close(7, "that was all")
        await until(lambda: there.desks[1].ends)
        assert there.desks[0].ends == ["lost: closed (code 0)"]
        assert there.desks[1].ends == ["lost: that was all (code 7)"]
        async with dialing(there.at, Agent()) as dialer:
            await until(lambda: dialer.connected)
            desk = there.desks[2]
            there.server.drain(spread_ns=MS)
            await until(lambda: desk.ends)
            assert desk.ends == ["draining"]


async def test_stopping_a_portal_tells_its_agents_to_come_again() -> None:
    agent = Agent()
    serving = trio.CancelScope()
    stopped = trio.Event()
    started: list[str] = []
    desks: list[Desk] = []

    async def serve() -> None:
        async with portal() as there:
            started.append(there.at)
            there.desks = desks
            with serving:
                await trio.sleep_forever()
        stopped.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await until(lambda: started)
        async with dialing(started[0], agent) as dialer:
            await until(lambda: dialer.connected)
            serving.cancel()
            await stopped.wait()
            await until(lambda: dialer.statistics().last_error)
            assert dialer.statistics().last_error == "shutting_down"
            assert agent.losses == 1
            assert desks[0].ends == ["shutting_down"]
