"""Both cores of the channel, joined by two queues of bytes, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from channel.dialer import AgentSession, Backoff, DialerOptions
from channel.frames import (
    CLOSE_CODES,
    LocalProtocolError,
    RemoteProtocolError,
    encode_frame,
)
from channel.listener import Channel, ChannelLimits, PortalChannel
from channel.messages import (
    FROM_CLIENT,
    TO_CLIENT,
    AuthorizationDenied,
    Candidates,
    Challenge,
    Disconnect,
    DoorAddress,
    Heartbeat,
    Held,
    HeldWanted,
    IpText,
    Join,
    MoreHeld,
    Portals,
    RelayJoin,
    ResourceRemoved,
    SocketAddress,
)
from runtime.randomness import SeededRandomness
from tests.unit.channel.agents import INIT, JOIN, TOKEN, Agent, Desk

S = 10**9
CANDIDATES = Candidates(connection_id=UUID(int=5), generation=0)
GATEWAY_JOIN = attrs.evolve(JOIN, kind="gateway")
RELAY_JOIN = RelayJoin(
    token=TOKEN,
    addresses=(SocketAddress(address=IpText("192.0.2.7"), port=3478),),
    stamp_secret=b"s" * 32,
    name="relay",
    incarnation=0,
)


class Pipe:
    """The portal's transport: what it carries to the agent, and how it ended."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.room = 1 << 30
        self.end: tuple[int, str] | None = None
        self.pings = 0

    def send(self, data: bytes) -> bool:
        if len(self.bytes) + len(data) > self.room:
            return False
        self.bytes += data
        return True

    def ping(self) -> None:
        self.pings += 1

    def close(self, code: int, reason: str, linger_ns: int) -> None:
        self.end = (code, reason)

    def drain(self) -> bytes:
        data = bytes(self.bytes)
        self.bytes.clear()
        return data


class Pair:
    """A portal's channel and an agent's session."""

    def __init__(
        self,
        *,
        answer: Callable[[Desk], None] | None = None,
        join: Join | RelayJoin = JOIN,
        highest_epoch: int = 0,
        nonce: bytes = b"n" * 32,
    ) -> None:
        self.now = 0
        self.down = Pipe()
        self.up = bytearray()
        self.portal = PortalChannel(
            self.down,
            remote=IpText("192.0.2.1"),
            portal="portal.example.com",
            nonce=nonce,
            limits=ChannelLimits(),
            now=0,
        )
        self.agent = Agent(join)
        self.doors: list[Sequence[str]] = []
        self.pings: list[int] = []
        self.keepalives: list[int] = []
        self.transport_lives = False
        self.session = AgentSession(
            self.agent,
            TO_CLIENT,
            send=self._take,
            ping=self._ask,
            keepalive=lambda: self.keepalives.append(self.now),
            learned=self.doors.append,
            options=DialerOptions(),
            highest_epoch=highest_epoch,
            now=0,
        )

        def connected(channel: Channel, challenge: Challenge) -> Desk:
            self.desk = Desk(channel, answer=answer)
            return self.desk

        self.portal.start(connected)

    def _take(self, data: bytes) -> bool:
        self.up += data
        return True

    def _ask(self) -> None:
        self.pings.append(self.now)
        if self.transport_lives:
            self.session.alive()

    def exchange(self) -> None:
        """Carry bytes until there are none."""
        while self.up or self.down.bytes:
            data = self.down.drain()
            if data:
                self.session.receive(data, self.now)
            up = bytes(self.up)
            self.up.clear()
            if up:
                self.portal.receive(up, self.now)

    def run_for(self, duration: int, *, connected: bool = True) -> None:
        """Let time pass; without `connected` the bytes of both sides get lost."""
        end = self.now + duration
        while self.session.outcome is None:
            deadlines = [self.session.poll_timeout(), self.portal.poll_timeout()]
            due = min(one for one in deadlines if one is not None)
            if due > end:
                break
            self.now = max(self.now, due)
            self.session.handle_timeout(self.now)
            self.portal.handle_timeout(self.now)
            if connected:
                self.exchange()
            else:
                self.up.clear()
                self.down.bytes.clear()
        self.now = end


def joined(**options: int) -> Pair:
    pair = Pair(**options)  # type: ignore[arg-type]  # the only options used are integers
    pair.exchange()
    assert pair.session.connected
    return pair


# --- joining -----------------------------------------------------------------------------------


def test_an_agent_joins_by_answering_the_challenge() -> None:
    pair = Pair()
    assert not pair.session.send(CANDIDATES), "nothing is sent before the portal took us in"
    pair.exchange()
    assert pair.agent.challenges == [Challenge(nonce=b"n" * 32, portal="portal.example.com")]
    assert pair.desk.messages == [attrs.evolve(JOIN, incarnation=1)]
    assert pair.agent.messages == [INIT]
    assert pair.session.connected
    assert pair.portal.is_open


def test_frames_travel_both_ways_with_ref_epoch_and_rising_seq() -> None:
    pair = joined()
    denied = AuthorizationDenied(resource_id=UUID(int=9), reason="forbidden")
    pair.portal.send(denied, ref=4, epoch=2)
    pair.portal.send(ResourceRemoved(resource_id=UUID(int=9)), epoch=2)
    assert pair.session.send(CANDIDATES, ref=8)
    pair.exchange()
    init, first, second = pair.agent.frames
    assert (first.message, first.ref, first.epoch) == (denied, 4, 2)
    assert init.seq is not None
    assert (first.seq, second.seq) == (init.seq + 1, init.seq + 2)
    assert (pair.desk.frames[-1].message, pair.desk.frames[-1].ref) == (CANDIDATES, 8)


def test_a_refusal_reaches_the_agent_and_ends_the_channel() -> None:
    pair = Pair(answer=Desk.refuse)
    pair.exchange()
    assert isinstance(pair.session.outcome, Disconnect)
    assert pair.session.outcome.reason == "invalid_token"
    assert pair.down.end == (CLOSE_CODES["invalid_token"], "invalid_token")
    pair.portal.lost("gone")
    pair.portal.lost("gone again")
    assert pair.desk.ends == ["invalid_token"]


def test_what_comes_while_the_portal_decides_waits_for_the_decision() -> None:
    pair = Pair(answer=lambda desk: None)
    pair.exchange()
    pair.portal.receive(
        encode_frame(Heartbeat(sent_ns=3), limit=1000) + encode_frame(CANDIDATES, limit=1000), 1
    )
    assert len(pair.desk.frames) == 1
    assert not pair.down.bytes
    pair.portal.joined("client")
    assert pair.desk.messages[1:] == [CANDIDATES]
    assert pair.down.bytes, "the heartbeat was answered"


def test_an_agent_that_floods_instead_of_waiting_is_cut_off() -> None:
    pair = Pair(answer=lambda desk: None)
    pair.exchange()
    for _ in range(5):
        pair.portal.receive(encode_frame(CANDIDATES, limit=1000) + bytes(40_000), 1)
    assert pair.down.end == (CLOSE_CODES["protocol_error"], "protocol_error")


def test_no_join_in_time_and_no_decision_in_time_end_the_channel() -> None:
    idle = Pair()
    idle.portal.handle_timeout(10 * S - 1)
    assert idle.portal.poll_timeout() == 10 * S
    idle.portal.handle_timeout(10 * S)
    assert idle.down.end == (CLOSE_CODES["protocol_error"], "protocol_error")
    undecided = Pair(answer=lambda desk: None)
    undecided.exchange()
    undecided.portal.handle_timeout(20 * S)
    assert undecided.down.end == (CLOSE_CODES["unavailable"], "unavailable")
    assert undecided.portal.poll_timeout() is None


def test_what_a_join_has_no_room_for_follows_as_it_is_asked_for() -> None:
    held = tuple(
        Held(authorization_id=UUID(int=n), connection_id=UUID(int=n)) for n in range(5_000)
    )
    pair = Pair(join=attrs.evolve(JOIN, held=held), answer=lambda desk: None)
    pair.exchange()
    (join,) = pair.desk.messages
    assert isinstance(join, Join)
    assert join.held_follow
    assert 500 < len(join.held) < 600
    pair.portal.joined("client")
    pair.exchange()
    assert pair.desk.messages == [join], "nothing follows before it is asked for"
    said = list(join.held)
    for _ in range(20):
        pair.portal.send(HeldWanted())
    pair.exchange()
    parts = pair.desk.messages[1:]
    for part in parts:
        assert isinstance(part, MoreHeld)
        said += part.held
    assert tuple(said) == held
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]  # type: ignore[attr-defined]  # seen above
    pair.portal.send(INIT, epoch=1)
    pair.exchange()
    assert pair.session.connected


def test_the_parts_of_a_join_put_the_end_of_the_wait_for_its_answer_off() -> None:
    held = tuple(
        Held(authorization_id=UUID(int=n), connection_id=UUID(int=n)) for n in range(1_500)
    )
    pair = Pair(
        join=attrs.evolve(JOIN, held=held), answer=lambda desk: desk.channel.joined("client")
    )
    pair.exchange()
    for _ in range(3):
        pair.run_for(25 * S)
        pair.portal.send(HeldWanted())
        pair.exchange()
        assert pair.session.outcome is None
    pair.run_for(25 * S)
    pair.portal.send(HeldWanted())  # there is no more: this puts nothing off
    pair.exchange()
    pair.run_for(6 * S)
    assert pair.session.outcome == "the portal did not answer the join"


# --- staying -----------------------------------------------------------------------------------


def test_heartbeats_keep_a_silent_channel_alive_for_ever() -> None:
    pair = joined()
    pair.run_for(3600 * S)
    assert pair.session.outcome is None
    assert pair.portal.is_open
    assert pair.session.round_trip_ns == 0
    assert pair.agent.messages == [INIT], "heartbeats are not the agent's affair"
    assert len(pair.desk.frames) == 1


@pytest.mark.parametrize("join", [GATEWAY_JOIN, RELAY_JOIN], ids=["gateway", "relay"])
def test_a_server_sends_a_keepalive_each_second_whether_or_not_it_hears_anything(
    join: Join | RelayJoin,
) -> None:
    pair = Pair(join=join)
    pair.exchange()
    pair.run_for(60 * S)
    assert pair.session.outcome is None
    pair.run_for(5 * S, connected=False)
    assert pair.keepalives == [n * S for n in range(1, 66)]
    assert pair.pings == []


def test_a_client_sends_none() -> None:
    pair = joined()
    pair.run_for(60 * S)
    assert pair.keepalives == []


def test_a_probe_is_answered_by_the_first_sign_of_life() -> None:
    pair = joined()
    pair.portal.heard()
    assert not pair.desk.signs_of_life, "nobody asked"
    pair.portal.probe()
    assert pair.down.pings == 1
    pair.portal.heard()  # the transport was answered
    pair.portal.heard()
    assert pair.desk.signs_of_life == 1
    pair.portal.probe()
    pair.session.send(CANDIDATES)
    pair.exchange()
    assert pair.desk.signs_of_life == 2
    pair.portal.probe()
    pair.portal.close(None)
    pair.portal.heard()
    pair.portal.probe()
    assert (pair.desk.signs_of_life, pair.down.pings) == (2, 3), "nothing after the end"


def test_three_heartbeats_without_an_answer_end_the_session_and_silence_the_channel() -> None:
    pair = joined()
    pair.transport_lives = True  # its kernel and QUIC answer; the node does not
    pair.run_for(100 * S, connected=False)
    assert pair.session.outcome == "3 heartbeats without an answer"
    assert pair.down.end == (CLOSE_CODES["unavailable"], "silent")
    pair.portal.lost("gone")
    assert pair.desk.ends == ["silent"]


def test_a_heartbeat_that_nothing_follows_is_doubted_probed_for_and_ends_the_session() -> None:
    options = DialerOptions()
    pair = joined()
    pair.run_for(15 * S)
    assert (pair.pings, pair.session.outcome) == ([], None)
    silent_from = pair.now
    pair.run_for(100 * S, connected=False)
    assert pair.session.outcome == "no answer to a probe"
    doubted = 20 * S + options.doubt_after_ns
    count = options.doubt_timeout_ns // options.probe_interval_ns
    assert pair.pings == [doubted + n * options.probe_interval_ns for n in range(count)]
    given_up = doubted + options.doubt_timeout_ns
    assert given_up - silent_from < options.quic.idle_timeout_ns
    # However soon after a heartbeat's answer it fell silent, QUIC alone would have taken longer:
    # its idle time begins anew with the heartbeat.
    longest = options.heartbeat_interval_ns + given_up - 20 * S
    assert longest < options.heartbeat_interval_ns + options.quic.idle_timeout_ns


@pytest.mark.parametrize("answered", range(1, 7))
def test_one_answered_probe_of_several_keeps_the_session(answered: int) -> None:
    """All that was sent before it, heartbeat and answers too, was lost."""
    pair = joined()
    pair.run_for(13 * S - 1, connected=False)
    while len(pair.pings) < answered:
        pair.run_for(S // 4, connected=False)
    assert pair.session.outcome is None
    pair.session.alive()
    pair.run_for(60 * S)
    assert pair.session.outcome is None
    assert len(pair.pings) == answered


def test_a_poke_repeats_its_probe() -> None:
    pair = joined()
    pair.session.poke(pair.now)
    pair.session.poke(pair.now)
    assert pair.pings == [0, 0]
    pair.run_for(100 * S, connected=False)
    assert pair.pings == [0, *range(0, 5 * S, S // 2)]


def test_a_poke_ends_the_session_soon_unless_something_is_heard() -> None:
    dead = joined()
    dead.session.poke(dead.now)
    dead.run_for(6 * S, connected=False)
    assert dead.session.outcome == "no answer to a probe"
    alive = joined()
    alive.session.poke(alive.now)
    alive.session.alive()
    alive.run_for(60 * S)
    assert alive.session.outcome is None


def test_a_portal_that_does_not_answer_the_join_is_given_up() -> None:
    pair = Pair(answer=lambda desk: None)
    pair.down.drain()
    pair.session.handle_timeout(30 * S)
    assert pair.session.outcome == "the portal did not answer the join"


def test_another_address_is_told_once_and_another_port_is_not() -> None:
    pair = joined()
    for address in ("192.0.2.1", "192.0.2.7", "192.0.2.7"):
        pair.portal.moved(IpText(address))
    assert pair.desk.remotes == ["192.0.2.1", "192.0.2.7"]
    assert pair.portal.remote == "192.0.2.7"


def test_a_reader_that_is_too_slow_loses_its_channel() -> None:
    pair = joined()
    pair.down.room = 10
    pair.portal.send(ResourceRemoved(resource_id=UUID(int=9)))
    assert pair.down.end == (CLOSE_CODES["unavailable"], "overflow")
    pair.portal.send(ResourceRemoved(resource_id=UUID(int=9)))
    pair.portal.lost("gone")
    assert pair.desk.ends == ["overflow"]


def test_the_doors_of_the_portal_are_not_the_affair_of_the_agents_core() -> None:
    pair = joined()
    doors = (DoorAddress("192.0.2.1:443"), DoorAddress("node2.example.com:443"))
    pair.portal.send(Portals(addresses=doors))
    pair.portal.send(Portals(addresses=doors[:1]))
    pair.exchange()
    assert pair.doors == [doors, doors[:1]]
    assert pair.agent.messages == [INIT]


# --- epochs ------------------------------------------------------------------------------------


def test_frames_of_a_lower_epoch_are_refused() -> None:
    pair = joined()
    message = ResourceRemoved(resource_id=UUID(int=9))
    pair.portal.send(message, epoch=7)
    pair.portal.send(message, epoch=6)
    pair.portal.send(message, epoch=7)
    pair.portal.send(message)
    pair.exchange()
    assert [frame.epoch for frame in pair.agent.frames] == [1, 7, 7, None]
    assert pair.session.stale_frames == 1
    assert pair.session.highest_epoch == 7
    assert pair.session.outcome is None


def test_an_init_of_a_former_owner_ends_the_session() -> None:
    pair = Pair(highest_epoch=2)
    pair.exchange()
    assert pair.session.outcome == "answered by a former owner of the account"
    assert pair.agent.frames == []
    assert not pair.session.connected


# --- what breaks the protocol ------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        (10 * 1024 * 1024).to_bytes(4, "big"),
        bytes(4),
        b"\x00\x00\x00\x02{}",
        b"\xff" * 100,
        encode_frame(JOIN, limit=10_000),
    ],
)
def test_an_agent_that_breaks_the_protocol_is_told_so(garbage: bytes) -> None:
    pair = joined()
    pair.portal.receive(garbage + encode_frame(CANDIDATES, limit=1000), 1)
    assert pair.down.end == (CLOSE_CODES["protocol_error"], "protocol_error")
    pair.exchange()
    assert isinstance(pair.session.outcome, Disconnect)
    assert (pair.session.outcome.reason, pair.session.outcome.retry) == ("protocol_error", True)
    assert len(pair.desk.frames) == 1, "nothing behind the garbage is heard"


@given(st.lists(st.binary(max_size=100), max_size=5), st.booleans())
def test_no_bytes_of_an_agent_raise(pieces: list[bytes], join_first: bool) -> None:
    pair = joined() if join_first else Pair()
    for piece in pieces:
        pair.portal.receive(piece, 1)
    pair.portal.lost("gone")
    assert len(pair.desk.ends) == 1


@given(st.lists(st.binary(max_size=100), max_size=5), st.booleans())
def test_no_bytes_of_a_portal_raise_anything_but_a_remote_protocol_error(
    pieces: list[bytes], join_first: bool
) -> None:
    pair = joined() if join_first else Pair()
    try:
        for piece in pieces:
            pair.session.receive(piece, 1)
    except RemoteProtocolError:
        return


def test_a_portal_that_breaks_the_order_is_refused() -> None:
    orders: list[tuple[object, ...]] = [
        (INIT,),
        (Heartbeat(),),
        (Challenge(nonce=b"n" * 16, portal="p"),),
        (Challenge(nonce=b"n" * 32, portal="p"), Challenge(nonce=b"n" * 32, portal="p")),
        (Challenge(nonce=b"n" * 32, portal="p"), ResourceRemoved(resource_id=UUID(int=1))),
        (Challenge(nonce=b"n" * 32, portal="p"), Portals(addresses=(DoorAddress("a:1"),))),
    ]
    for order in orders:
        pair = Pair()
        stream = b"".join(encode_frame(message, limit=10_000) for message in order)
        with pytest.raises(RemoteProtocolError) as caught:
            pair.session.receive(stream, 1)
        assert caught.value.code == "unexpected_message"


def test_our_own_mistakes_are_local_protocol_errors() -> None:
    pair = joined()
    with pytest.raises(LocalProtocolError):
        pair.portal.send("hello")
    with pytest.raises(LocalProtocolError):
        pair.session.send(object())
    assert "candidates" in FROM_CLIENT


# --- back-off ----------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(0, 40))
def test_a_wait_lies_below_a_bound_that_doubles_up_to_its_cap(seed: int, failures: int) -> None:
    backoff = Backoff(DialerOptions(), SeededRandomness(seed, "backoff"))
    for number in range(failures):
        assert 0 <= backoff.delay_ns() < min(60, 2**number) * S
    backoff.succeeded()
    assert backoff.delay_ns() < S


@given(st.integers(0, 2**32), st.integers(1, 3600 * S))
def test_a_wait_is_never_shorter_than_the_portal_asked(seed: int, asked: int) -> None:
    backoff = Backoff(DialerOptions(), SeededRandomness(seed, "backoff"))
    assert asked <= backoff.delay_ns(asked) < asked + max(S, asked // 4)


def test_agents_that_lost_the_same_portal_come_back_at_different_times() -> None:
    delays = {
        Backoff(DialerOptions(), SeededRandomness(seed, "backoff")).delay_ns()
        for seed in range(100)
    }
    assert len(delays) == 100
