"""Ports of several nodes: which are looked at, and what is said of one that is taken."""

from __future__ import annotations

import socket

import attrs
import pytest

from portal.ports import check_ports
from portal.settings import PortalSettings, SettingsError
from runtime.net.binding import CannotListen
from tests.ports import free_ports

NODES = 3


def settings_at(port: int) -> PortalSettings:
    """Three nodes with four ports each: UDP and TCP from `port` on, and two more of TCP."""
    return PortalSettings(
        nodes=NODES,
        listen=f"127.0.0.1:{port}",
        api_listen=f"127.0.0.1:{port}",
        observability=f"127.0.0.1:{port + NODES}",
        link_listen=f"127.0.0.1:{port + 2 * NODES}",
    )


def test_free_ports_are_free_afterwards_too() -> None:
    settings = settings_at(free_ports(3 * NODES))
    check_ports(settings)
    check_ports(settings)


@pytest.mark.parametrize("number", [1, NODES])
@pytest.mark.parametrize(
    ("flag", "offset", "kind", "transport"),
    [
        ("--listen", 0, socket.SOCK_DGRAM, "UDP"),
        ("--api-listen", 0, socket.SOCK_STREAM, "TCP"),
        ("--observability", NODES, socket.SOCK_STREAM, "TCP"),
        ("--link-listen", 2 * NODES, socket.SOCK_STREAM, "TCP"),
    ],
)
def test_a_port_that_is_taken_is_named_with_flag_and_node(
    number: int, flag: str, offset: int, kind: socket.SocketKind, transport: str
) -> None:
    first = free_ports(3 * NODES)
    port = first + offset + number - 1
    with socket.socket(type=kind) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
        other.bind(("127.0.0.1", port))
        if kind == socket.SOCK_STREAM:
            other.listen()
        with pytest.raises(CannotListen) as said:
            check_ports(settings_at(first))
    assert str(said.value).startswith(
        f"{flag} of portal-{number}: cannot listen on 127.0.0.1:{port} ({transport}):"
        " Address already in use ("
    )


def test_two_nodes_with_one_port_are_told_so_before_they_meet() -> None:
    first = free_ports(NODES + 1)
    settings = PortalSettings(
        nodes=NODES,
        listen=f"127.0.0.1:{first}",
        api_listen=f"127.0.0.1:{first}",
        observability=f"127.0.0.1:{first + 1}",
    )
    with pytest.raises(SettingsError) as said:
        check_ports(settings)
    assert str(said.value) == (
        f"--api-listen of portal-2: 127.0.0.1:{first + 1} (TCP) is the port of"
        " --observability of portal-1 too: set them further apart"
    )


def test_an_address_of_another_machine_is_named_too() -> None:
    listen = f"127.0.0.1:{free_ports(2)}"
    with pytest.raises(CannotListen, match=r"^--api-listen of portal-1: .*no such address"):
        check_ports(PortalSettings(nodes=2, listen=listen, api_listen="192.0.2.1:444"))


def test_where_the_api_has_another_port_the_channels_is_looked_at_for_tcp_too() -> None:
    first = free_ports(2)
    settings = PortalSettings(
        nodes=1, listen=f"127.0.0.1:{first}", api_listen=f"127.0.0.1:{first + 1}", observability=""
    )
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", first))
        other.listen()
        with pytest.raises(CannotListen, match=rf"^--listen of .*127.0.0.1:{first} \(TCP\)"):
            check_ports(settings)
        check_ports(attrs.evolve(settings, websocket=False))
    check_ports(settings)
