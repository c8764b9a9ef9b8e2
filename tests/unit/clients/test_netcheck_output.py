"""`holloway netcheck` on a terminal of 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from clients.netcheck.findings import (
    FamilyFinding,
    Link,
    Nat,
    PortalFinding,
    Report,
    ServerFinding,
)
from clients.netcheck.output import render
from runtime.net.address import Address

from .nat_model import A, B, ModelNat, Outside, netcheck

NONE6 = FamilyFinding(family="ipv6", local_host=None, udp="not_measured")
SERVERS = (Address(A, 3478), Address(A, 3479), Address(B, 3478))


def shown(report: Report) -> str:
    text = io.StringIO()
    render(report, Console(file=text, width=80, highlight=False))
    return text.getvalue()


def behind(outside: Outside, **fields: object) -> Report:
    _, found = netcheck(outside, *SERVERS)
    whole: dict[str, object] = {"ipv4": found, "ipv6": NONE6, **fields}
    return Report(**whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outside", "verdict"),
    [
        (Outside(None), "No NAT in the way: direct paths are likely."),
        (Outside(ModelNat()), "An easy NAT: direct paths are likely."),
        (Outside(ModelNat(mapping="address_dependent", ports="random")), "A hard NAT: direct only"),
        (Outside(ModelNat(), dead=frozenset(SERVERS)), "UDP does not leave this network."),
    ],
)
def test_it_ends_with_what_that_means_for_tunnels(outside: Outside, verdict: str) -> None:
    assert shown(behind(outside)).splitlines()[-1].startswith(verdict)


def test_where_udp_is_blocked_it_says_whether_tcp_is_not() -> None:
    report = behind(
        Outside(ModelNat(), dead=frozenset(SERVERS)),
        portal=PortalFinding(address="portal:443", reachable=True, proved=True, handshake_ns=1),
    )
    assert shown(report).endswith("UDP does not leave this network; TCP does.\n")


def test_a_portal_that_is_not_the_tokens_is_said_to_be_none() -> None:
    report = behind(
        Outside(None),
        portal=PortalFinding(address="p:443", reachable=True, proved=False, error="another CA"),
    )
    assert "it is NOT the portal of the token: another CA" in " ".join(shown(report).split())


def test_whole_addresses_fit_into_eighty_columns_and_names_are_no_markup() -> None:
    long = "[2001:db8:1234:5678:9abc:def0:1234:5678]:65535"
    server = ServerFinding(name="[red]x", address=long, reachable=True, round_trip_ns=1)
    ipv6 = FamilyFinding(
        family="ipv6", local_host="2001:db8::[bold]", udp="works", servers=(server,),
        nat=Nat(present=False), notes=("[blink]",),
    )  # fmt: skip
    text = shown(
        behind(Outside(None), ipv6=ipv6, link=Link(name="[red]eth0", mtu=1500), notes=("[red]",))
    )
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("2001:db8::[bold]", "[blink]", "[red]eth0", "not measured: [red]"):
        assert whole in text
