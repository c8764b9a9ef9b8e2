"""The relay's end of the control channel, and the settings of a relay."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from channel.frames import Frame
from channel.messages import Challenge, Drain, IpText, Load, RelayInit, SocketAddress
from relays.agent import DrainRequested, Joined, RelayAgent
from relays.settings import RelaySettings, SettingsError, check, parse_users
from relays.turn import NS
from runtime.net.address import Address
from runtime.secret import Secret

CHALLENGE = Challenge(nonce=bytes(32), portal="localhost")
INIT = Frame(event="init", message=RelayInit(relay_id=UUID(int=7)))


def relay_agent() -> RelayAgent:
    return RelayAgent(
        token=Secret("hlw_relay_abc"),
        addresses=[SocketAddress(address=IpText("203.0.113.6"), port=3478)],
        stamp_secret=b"s" * 32,
        name="lyon",
        region="eu",
        failure_domain="rack-7",
        software="test",
        incarnation=1000,
    )


def test_each_join_has_a_higher_incarnation_and_the_same_stamp_secret() -> None:
    agent = relay_agent()
    first, second = agent.join(CHALLENGE, 0), agent.join(CHALLENGE, 0)
    assert 1000 < first.incarnation < second.incarnation
    assert first.stamp_secret == second.stamp_secret == b"s" * 32
    assert first.token == "hlw_relay_abc"
    assert (first.region, first.failure_domain) == ("eu", "rack-7")
    assert "hlw_relay" not in repr(first)


def test_it_reports_its_load_at_once_then_rarely_and_sooner_when_much_changed() -> None:
    agent = relay_agent()
    assert agent.poll_timeout() is None
    agent.load_changed(3, 0.01, 0)
    agent.join(CHALLENGE, 0)
    agent.receive(INIT, 0)
    assert agent.drain_events() == [Joined(relay_id=UUID(int=7))]
    assert agent.drain_messages() == [Load(allocations=3, load=0.01)]
    assert agent.poll_timeout() == 30 * NS
    agent.load_changed(400, 0.5, NS // 2)
    assert agent.poll_timeout() == NS
    agent.handle_timeout(NS // 2)
    assert agent.drain_messages() == []
    agent.handle_timeout(NS)
    assert agent.drain_messages() == [Load(allocations=400, load=0.5)]
    assert agent.poll_timeout() == 31 * NS


def test_a_lost_channel_silences_it_until_the_next_join() -> None:
    agent = relay_agent()
    agent.join(CHALLENGE, 0)
    agent.receive(INIT, 0)
    agent.channel_lost(NS)
    agent.handle_timeout(100 * NS)
    assert agent.drain_messages() == []
    assert agent.relay_id == UUID(int=7)


def test_a_drain_is_passed_on() -> None:
    agent = relay_agent()
    agent.receive(Frame(event="drain", message=Drain()), 0)
    assert agent.drain_events() == [DrainRequested()]


def test_a_relay_with_another_certificate_has_to_join_anew() -> None:
    agent = relay_agent()
    assert agent.join(CHALLENGE, 0).certificate_pins == ()
    agent.receive(INIT, 0)
    assert not agent.is_outdated
    agent.certificates_changed(["ab" * 32])
    assert agent.is_outdated
    agent.channel_lost(0)
    assert not agent.is_outdated
    assert agent.join(CHALLENGE, 0).certificate_pins == ("ab" * 32,)


# --- settings ------------------------------------------------------------------------------------


def checked(**settings: Any) -> Any:
    return check(RelaySettings(**settings))


def test_the_hosts_of_listen_are_the_relayed_addresses() -> None:
    addresses = checked(listen=("203.0.113.6:3478", "[2001:db8::6]:3478", "203.0.113.7:3478"))
    assert addresses.bind_hosts == {1: "203.0.113.6", 2: "2001:db8::6"}
    assert addresses.told_hosts == addresses.bind_hosts
    listen = addresses.listen_by_transport["udp"]
    assert [each for transport, each in addresses.announced if transport == "udp"] == [*listen]
    assert (addresses.first_port, addresses.last_port) == (49_152, 65_535)


def test_a_relay_behind_one_to_one_nat_tells_its_external_address() -> None:
    addresses = checked(
        listen=("0.0.0.0:3478",), relay_address=("10.0.0.6",), external_ip=("203.0.113.6",)
    )
    assert addresses.bind_hosts == {1: "10.0.0.6"}
    assert addresses.told_hosts == {1: "203.0.113.6"}
    external = Address("203.0.113.6", 3478)
    assert addresses.announced == (
        ("udp", external),
        ("tcp", external),
        ("tls", Address("203.0.113.6", 5349)),
        ("quic", Address("203.0.113.6", 5349)),
    )
    assert addresses.external_hosts == {"203.0.113.6"}


def test_several_listeners_may_each_have_their_external_address() -> None:
    addresses = checked(
        listen=("10.0.0.6:3478", "10.0.0.7:3478"),
        external_ip=("203.0.113.6/10.0.0.6", "203.0.113.7/10.0.0.7"),
        listen_tcp=(),
        listen_tls=("10.0.0.7:443",),
    )
    assert addresses.announced == (
        ("udp", Address("203.0.113.6", 3478)),
        ("udp", Address("203.0.113.7", 3478)),
        ("tls", Address("203.0.113.7", 443)),
        ("quic", Address("203.0.113.7", 443)),
    )


def test_tcp_is_where_udp_is_and_tls_and_quic_at_5349_where_that_is_3478() -> None:
    def places(**settings: Any) -> list[str]:
        announced = checked(**settings).announced
        return [f"{transport} {address}" for transport, address in announced]

    one, other = {"listen": ("203.0.113.6:3478",)}, {"listen": ("203.0.113.6:5000",)}
    tls_files = {"tls_certificate": Path("chain"), "tls_key": Path("key")}
    alone = {"standalone": True, "user": ("alice",)}
    udp, tcp, tls = "udp 203.0.113.6:3478", "tcp 203.0.113.6:3478", "tls 203.0.113.6:5349"
    quic = "quic 203.0.113.6:5349"
    assert places(**one) == [udp, tcp, tls, quic]
    assert places(**one, **alone, **tls_files) == [udp, tcp, tls]
    assert places(**one, listen_quic=("",)) == [udp, tcp, tls]
    assert places(**one, listen_quic=("203.0.113.6:443",)) == [udp, tcp, tls, quic[:-4] + "443"]
    assert places(**one, **alone) == [udp, tcp]
    assert places(**one, listen_tcp=("",), listen_tls=("",)) == [udp]
    assert places(**other) == ["udp 203.0.113.6:5000", "tcp 203.0.113.6:5000"]
    assert places(**other, listen_tls=("203.0.113.9:443",), listen_tcp=()) == [
        "udp 203.0.113.6:5000",
        "tls 203.0.113.9:443",
        "quic 203.0.113.9:443",
    ]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"listen": ()}, "listen"),
        ({"listen": ("relay.example:3478",)}, "listen"),
        ({"listen": ("0.0.0.0:3478",)}, "relay_address"),
        ({"listen": ("[::]:3478",), "relay_address": ("203.0.113.6",)}, "relay_address"),
        ({"relay_address": ("nonsense",)}, "relay_address"),
        ({"listen": ("203.0.113.6:3478",), "external_ip": ("2001:db8::6",)}, "external_ip"),
        ({"listen": ("203.0.113.6:3478",), "relayed_ports": "9-5"}, "relayed_ports"),
        ({"listen": ("203.0.113.6:3478",), "relayed_ports": "many"}, "relayed_ports"),
        ({"listen": ("203.0.113.6:3478",), "allowed_peer_ranges": ("10/33",)}, "allowed_peer"),
        ({"listen": ("203.0.113.6:3478",), "alternate_server": ("x",)}, "alternate_server"),
        ({"listen": ("203.0.113.6:3478",), "region": "x" * 65}, "region"),
        ({"listen": ("203.0.113.6:3478",), "failure_domain": "a\nb"}, "failure_domain"),
        ({"standalone": True}, "users_file"),
        ({"listen": ("203.0.113.6:3478",), "user": ("alice",)}, "user"),
        ({"standalone": True, "user": ("a:b",)}, "user"),
        ({"standalone": True, "users_file": Path("u"), "password_file": Path("p")}, "password"),
        ({"listen": ("203.0.113.6:3478",), "tls_key": Path("key")}, "tls_certificate"),
        (
            {"listen": ("203.0.113.6:9",), "tls_key": Path("k"), "tls_certificate": Path("c")},
            "listen_tls",
        ),
        ({"listen": ("203.0.113.6:9",), "listen_tls": ("203.0.113.6:9",)}, "listen_tls"),
        ({"listen": ("203.0.113.6:9",), "listen_tcp": ("relay.example:9",)}, "listen_tcp"),
        ({"listen": tuple(f"203.0.113.{n}:9" for n in range(9))}, "at most 16"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        checked(**settings)


def test_users_are_lines_with_a_colon() -> None:
    assert parse_users("# staff\nalice:open:sesame\n\nbob:x\n") == {
        "alice": "open:sesame",
        "bob": "x",
    }
    for text in ("", "# nobody\n", "alice\n", ":x\n", "alice:\n"):
        with pytest.raises(SettingsError) as caught:
            parse_users(text)
        assert "alice" not in str(caught.value)
