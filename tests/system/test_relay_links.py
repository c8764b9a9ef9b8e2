"""Two relays of different failure domains where the laptop's network lets no UDP out: it holds a
connection to each by TLS, and a long download goes on while relays die, connections fall silent and
the laptop gets another address.

As in test_relay_death.py, stalls are printed, and only generous bounds asserted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from simulations.installation import Installation, wait_until
from tests.system.two_relays import (
    GENEROUS_S,
    Download,
    come_back,
    downloading,
    other,
    ready_by,
    relay_in_use,
    whole,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

TLS_PORT = 5349


@pytest.fixture(scope="module")
def it() -> Iterator[Installation]:
    yield from whole(blocked=True)


@pytest.fixture
def download(it: Installation) -> Iterator[Download]:
    with downloading(it) as running:
        yield running


def ports_of_links(it: Installation) -> list[str]:
    """The laptop's ports of its connections to relays."""
    shown = it.laptop.run("ss", "-Htn", "state", "established", "dport", "=", f":{TLS_PORT}")
    return [line.split()[2].rpartition(":")[2] for line in shown.splitlines()]


def test_there_is_a_connection_to_each_relay_and_the_death_of_one_moves_the_tunnel(
    it: Installation, download: Download
) -> None:
    wait_until(lambda: ready_by(it) == ["tls", "tls"], what="both relays stand by")
    assert len(ports_of_links(it)) == 2
    used = relay_in_use(it)
    it.components[used].kill()
    assert download.stalled_s("the relay in use by TLS was killed") < GENEROUS_S
    assert relay_in_use(it) == other(it, used)
    come_back(it, it.components[used], "tls")


def test_connections_that_a_firewall_swallows_are_opened_anew(
    it: Installation, download: Download
) -> None:
    ports = ports_of_links(it)
    assert len(ports) == 2
    swallowed = ", ".join(ports)
    it.laptop.nft(
        "table inet swallowing {\n"
        f" chain input {{ type filter hook input priority 0; tcp dport {{ {swallowed} }} drop; }}\n"
        f" chain output {{ type filter hook output priority 0; tcp sport {{ {swallowed} }} drop;"
        " }\n"
        "}\n"
    )
    assert download.stalled_s("both connections to relays fell silent") < GENEROUS_S
    wait_until(lambda: ready_by(it) == ["tls", "tls"], what="both relays stand by")
    wait_until(lambda: not set(ports) & set(ports_of_links(it)), what="the silent ones are closed")
    it.laptop.run("nft", "delete", "table", "inet", "swallowing")


def test_a_laptop_that_gets_another_address_opens_its_connections_anew(
    it: Installation, download: Download
) -> None:
    it.laptop.ip(
        "addr del 192.168.1.10/24 dev eth0",
        "addr add 192.168.1.77/24 dev eth0",
        "route add default via 192.168.1.1",
    )
    assert download.stalled_s("the laptop has another address") < GENEROUS_S
    wait_until(lambda: ready_by(it) == ["tls", "tls"], what="both relays stand by", timeout_s=60)
    assert len(ports_of_links(it)) == 2


def test_a_relay_that_drains_is_left_and_ends(it: Installation, download: Download) -> None:
    used = relay_in_use(it)
    relay = it.components[used]
    relay.signal(signal.SIGTERM)
    wait_until(lambda: not relay.alive(), what="the drained relay ends", timeout_s=90)
    assert download.stalled_s("the relay in use by TLS drained") < GENEROUS_S
    assert relay_in_use(it) == other(it, used)
    come_back(it, relay, "tls")
