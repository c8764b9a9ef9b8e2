"""A laptop whose network lets no UDP out: real processes, and a firewall that drops every datagram.
Its tunnel goes through the relay by TLS, and back to UDP when that passes again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simulations.installation import Installation, wait_until
from simulations.kernel.lab import Lab

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]


def path(it: Installation) -> str:
    kinds = [peer["path"]["kind"] for peer in it.status()["peers"] if peer.get("path")]
    return kinds[0] if kinds else "none"


@pytest.fixture(scope="module")
def it() -> Iterator[Installation]:
    with Lab() as lab:
        installation = Installation(lab)
        installation.block_udp()
        try:
            installation.start_everything(large_file_bytes=1 << 20, timeout_s=90)
            yield installation
        except BaseException:
            for log in sorted(installation.directory.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
            raise


def test_an_access_comes_about_through_the_relay(it: Installation) -> None:
    it.allow()
    wait_until(it.fetch_page, what="the page arrives", timeout_s=60)
    assert path(it) == "relayed"
    status = it.status()
    (relay,) = status["relays"]
    assert relay["by"] == "tls"
    assert [peer["path"]["by"] for peer in status["peers"] if peer["path"]] == ["tls"]


def test_a_relay_that_was_killed_is_reached_again(it: Installation) -> None:
    relay = it.components["relay"]
    relay.kill()
    wait_until(lambda: not it.fetch_page(timeout_s=2), what="nothing passes", timeout_s=60)
    relay.start()
    wait_until(it.fetch_page, what="the page arrives", timeout_s=90)


def test_once_udp_passes_the_path_is_direct_and_the_connection_is_closed(it: Installation) -> None:
    it.unblock_udp()
    wait_until(lambda: path(it) == "direct", what="the path is direct", timeout_s=60)
    assert it.fetch_page()
    wait_until(
        lambda: [each["by"] for each in it.status()["relays"]] == ["udp"],
        what="the relay is used over UDP",
        timeout_s=60,
    )


def test_udp_that_is_blocked_in_the_middle_costs_seconds(it: Installation) -> None:
    it.block_udp()
    wait_until(it.fetch_page, what="the page arrives", timeout_s=60)
    wait_until(lambda: path(it) == "relayed", what="the path is relayed", timeout_s=60)
