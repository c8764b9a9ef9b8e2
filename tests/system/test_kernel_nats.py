"""The kernel's NATs are what they claim to be, as sockets on both sides of them see it."""

from __future__ import annotations

import errno
import os
import socket
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import get_args

import attrs
import pytest

from simulations.kernel.lab import Host, Lab, LabError
from simulations.kernel.links import Quality, impaired
from simulations.kernel.nats import (
    FIRST_PORT,
    RACING,
    Behaviour,
    Hairpinning,
    KernelNat,
    install,
    install_ipv6_firewall,
    unsupported,
)
from tests.system.udp_probes import SERVERS, Prober, nothing_but, seen_from, udp_socket

pytestmark = pytest.mark.system

BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)
EIM, ADM, APDM = BEHAVIOURS
PUBLIC = "198.51.100.2"
KNOWN, OTHER_IP = (SERVERS[0], 3478), (SERVERS[1], 3478)


@attrs.frozen
class Site:
    """A NAT with two hosts behind it, and a server with two addresses."""

    lab: Lab
    core: Host
    nat: Host
    inside: Host
    neighbour: Host
    prober: Prober


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Lab() as lab:
        core = lab.router("core")
        server = lab.public_host("server", core, f"{SERVERS[0]}/29")
        server.ip(f"addr add {SERVERS[1]}/29 dev eth0")
        nat = lab.nat("home", core, wan=f"{PUBLIC}/30", lan="192.168.1.1/24")
        inside = lab.host("inside", nat, "192.168.1.10/24")
        neighbour = lab.host("neighbour", nat, "192.168.1.11/24")
        with Prober(server, inside, "192.168.1.10").open() as prober:
            yield Site(lab, core, nat, inside, neighbour, prober)


@pytest.mark.parametrize("filters_per", ["endpoint", "mapping"])
@pytest.mark.parametrize("filtering", BEHAVIOURS)
@pytest.mark.parametrize("mapping", BEHAVIOURS)
def test_each_of_the_nine_behaves_as_it_is_named(
    site: Site, mapping: Behaviour, filtering: Behaviour, filters_per: str
) -> None:
    install(site.nat, KernelNat(mapping=mapping, filtering=filtering, filters_per=filters_per))  # type: ignore[arg-type]
    assert (site.prober.mapping(), site.prober.filtering()) == (mapping, filtering)


@pytest.mark.parametrize("filters_per", ["endpoint", "mapping"])
@pytest.mark.parametrize("filtering", [ADM, APDM])
@pytest.mark.parametrize("mapping", [ADM, APDM])
def test_what_one_mapping_opens_is_open_to_the_others_as_it_says(
    site: Site, mapping: Behaviour, filtering: Behaviour, filters_per: str
) -> None:
    install(site.nat, KernelNat(mapping=mapping, filtering=filtering, filters_per=filters_per))  # type: ignore[arg-type]
    prober = site.prober
    with prober.fresh() as inside:
        first = prober.mapped(inside, KNOWN)
        second = prober.mapped(inside, OTHER_IP)
        assert first != second
        [through_the_other] = prober.arriving(inside, first, [OTHER_IP], KNOWN)
    assert through_the_other == (filters_per == "endpoint")


@pytest.mark.parametrize("mapping", BEHAVIOURS)
def test_answers_to_what_was_let_in_leave_from_where_it_came(
    site: Site, mapping: Behaviour
) -> None:
    """The rule of bindings that connection tracking has, `reply_binding` of the oracle: also where
    an own flow to that peer has another mapping already."""
    install(site.nat, KernelNat(mapping=mapping, filtering=EIM))
    prober = site.prober
    for own_flow_first in (False, True):
        with prober.fresh() as inside:
            mapped = prober.mapped(inside, KNOWN)
            if own_flow_first:
                prober.mapped(inside, OTHER_IP)
            prober.sockets[OTHER_IP].sendto(b"hello", mapped)
            data, source = inside.recvfrom(100)
            assert data == b"hello"
            assert source[0] == OTHER_IP[0]
            inside.sendto(b"hello yourself", source)
            assert seen_from(prober.sockets[OTHER_IP]) == mapped


def test_ports_are_kept_drawn_or_counted(site: Site) -> None:
    prober = site.prober

    def own_and_mapped(ports: str, mapping: Behaviour) -> list[tuple[int, int]]:
        install(site.nat, KernelNat(mapping=mapping, ports=ports))  # type: ignore[arg-type]
        pairs = []
        for _ in range(5):
            with prober.fresh() as inside:
                pairs.append((inside.getsockname()[1], prober.mapped(inside, KNOWN)[1]))
        return pairs

    assert all(own == mapped for own, mapped in own_and_mapped("preserve", EIM))
    for mapping in BEHAVIOURS:
        drawn = own_and_mapped("random", mapping)
        assert all(own != mapped for own, mapped in drawn)
        assert any(abs(b - a) > 10 for (_, a), (_, b) in pairwise(drawn))
    for mapping in BEHAVIOURS:
        counted = [mapped for _, mapped in own_and_mapped("sequential", mapping)]
        assert counted == list(range(counted[0], counted[0] + 5))
        assert counted[0] >= FIRST_PORT
        assert prober.mapping() == mapping


@pytest.mark.parametrize("hairpinning", ["internal_source", "external_source"])
@pytest.mark.parametrize("filtering", BEHAVIOURS)
def test_hairpinning_shows_the_source_that_it_says_and_obeys_the_filter(
    site: Site, filtering: Behaviour, hairpinning: Hairpinning
) -> None:
    install(site.nat, KernelNat(filtering=filtering, hairpinning=hairpinning))
    prober = site.prober
    with prober.fresh() as inside, udp_socket(site.neighbour, ("192.168.1.11", 45_000)) as near:
        mapped = prober.mapped(inside, KNOWN)
        near_mapped = prober.mapped(near, KNOWN)
        near.sendto(b"too early", mapped)
        inside.sendto(b"opens", near_mapped)
        near.sendto(b"last", mapped)
        received = [inside.recvfrom(100)]
        if received[0][0] == b"too early":
            received.append(inside.recvfrom(100))
        assert [data for data, _ in received][-1] == b"last"
        assert (len(received) == 2) == (filtering == EIM)
        seen = near_mapped if hairpinning == "external_source" else ("192.168.1.11", 45_000)
        assert {source for _, source in received} == {seen}


def test_without_hairpinning_neighbours_do_not_meet_at_the_public_address(site: Site) -> None:
    install(site.nat, KernelNat(filtering=EIM))
    prober = site.prober
    with prober.fresh() as inside, udp_socket(site.neighbour, ("192.168.1.11", 45_001)) as near:
        mapped = prober.mapped(inside, KNOWN)
        near.sendto(b"through the NAT", mapped)
        near.sendto(b"last", inside.getsockname())
        assert inside.recv(100) == b"last"


def test_blocked_udp_is_silence_or_an_error_and_tcp_goes_through(site: Site) -> None:
    prober = site.prober
    with prober.server.entered():
        listening = socket.create_server((SERVERS[0], 8080))
    with listening:
        for udp in ("drop", "reject"):
            install(site.nat, KernelNat(udp=udp))  # type: ignore[arg-type]
            with prober.fresh() as inside:
                inside.connect(KNOWN)
                inside.send(b"out?")
                site.inside.connect((SERVERS[0], 8080)).close()
                listening.accept()[0].close()
                if udp == "reject":
                    with pytest.raises(OSError, match=os.strerror(errno.EHOSTUNREACH)):
                        inside.recv(100)
                prober.sockets[KNOWN].setblocking(False)
                with pytest.raises(BlockingIOError):
                    prober.sockets[KNOWN].recv(100)
                prober.sockets[KNOWN].settimeout(2)


def test_a_binding_ends_after_its_timeout(site: Site) -> None:
    install(site.nat, KernelNat(filtering=EIM, timeout_s=1, stream_timeout_s=1))
    prober = site.prober
    with prober.fresh() as inside:
        mapped = prober.mapped(inside, KNOWN)
        deadline = time.monotonic() + 20
        while "udp" in site.nat.run("conntrack", "-L", "-p", "udp") or (
            "expires" in site.nat.run("nft", "list", "map", "ip", "nat_of_lab", "eim")
        ):
            assert time.monotonic() < deadline, "the binding stays"
        prober.sockets[KNOWN].sendto(b"too late", mapped)
        assert prober.mapped(inside, KNOWN) == mapped
        prober.sockets[KNOWN].sendto(b"in time", mapped)
        assert inside.recv(100) == b"in time"


def test_plain_masquerade_gives_the_place_of_a_binding_to_what_comes_too_early(site: Site) -> None:
    install(site.nat, RACING)
    prober = site.prober
    with prober.fresh() as inside:
        mapped = prober.mapped(inside, KNOWN)
        prober.sockets[OTHER_IP].sendto(b"too early", mapped)
        prober.sockets[KNOWN].sendto(b"last", mapped)
        assert inside.recv(100) == b"last"
        assert prober.mapped(inside, OTHER_IP) != mapped
        prober.sockets[OTHER_IP].sendto(b"shut out", mapped)
        prober.sockets[KNOWN].sendto(b"last", mapped)
        assert inside.recv(100) == b"last"


def test_what_the_kernel_cannot_do_is_refused_with_the_reason(site: Site) -> None:
    impossible = [
        KernelNat(mapping=ADM, ports="preserve"),
        KernelNat(mapping=APDM, ports="preserve"),
        KernelNat(mapping=APDM, hairpinning="external_source"),
        attrs.evolve(RACING, filtering=EIM),
    ]
    for nat in impossible:
        assert unsupported(nat)
        with pytest.raises(LabError):
            install(site.nat, nat)


@pytest.mark.parametrize(
    ("home", "carrier"),
    [
        ((EIM, EIM), (EIM, APDM)),
        ((APDM, EIM), (EIM, EIM)),
        ((EIM, APDM), (ADM, ADM)),
        ((EIM, ADM), (APDM, EIM)),
    ],
)
def test_of_stacked_nats_the_stricter_one_decides(
    stacked: tuple[Host, Host, Prober],
    home: tuple[Behaviour, Behaviour],
    carrier: tuple[Behaviour, Behaviour],
) -> None:
    inner, outer, prober = stacked
    install(inner, KernelNat(mapping=home[0], filtering=home[1]))
    install(outer, KernelNat(mapping=carrier[0], filtering=carrier[1]))
    stricter = tuple(max(pair, key=BEHAVIOURS.index) for pair in zip(home, carrier, strict=True))
    assert (prober.mapping(), prober.filtering()) == stricter


@pytest.fixture(scope="module")
def stacked() -> Iterator[tuple[Host, Host, Prober]]:
    with Lab() as lab:
        core = lab.router("core")
        server = lab.public_host("server", core, f"{SERVERS[0]}/29")
        server.ip(f"addr add {SERVERS[1]}/29 dev eth0")
        outer = lab.nat("carrier", core, wan=f"{PUBLIC}/30", lan="100.64.0.1/24")
        inner = lab.nat("home", outer, wan="100.64.0.2/24", lan="192.168.1.1/24")
        inside = lab.host("inside", inner, "192.168.1.10/24")
        with Prober(server, inside, "192.168.1.10").open() as prober:
            yield inner, outer, prober


def test_ipv6_firewalls_translate_nothing_and_are_opened_from_inside() -> None:
    with Lab() as lab:
        core = lab.router("core")
        ends = []
        for n, name in enumerate(("left", "right"), start=1):
            nat = lab.nat(name, core, wan=f"198.51.100.{4 * n + 2}/30", lan="192.168.1.1/24")
            lab.route_ipv6(nat, core, wan=f"2001:db8:{n}::2/64", lan=f"2001:db8:{n}0::1/64")
            install_ipv6_firewall(nat)
            host = lab.host(f"{name}-host", nat, "192.168.1.10/24")
            lab.ipv6(host, f"2001:db8:{n}0::10/64")
            ends.append((host, f"2001:db8:{n}0::10"))
        (one, one_ip), (other, other_ip) = ends
        with udp_socket(one, (one_ip, 41_000)) as a, udp_socket(other, (other_ip, 41_000)) as b:
            a.sendto(b"dropped, but opens", (other_ip, 41_000))
            b.sendto(b"gets in", (one_ip, 41_000))
            assert a.recvfrom(100)[0] == b"gets in"
            a.sendto(b"gets in too", (other_ip, 41_000))
            data, source = b.recvfrom(100)
            assert (data, source[:2]) == (b"gets in too", (one_ip, 41_000))


def test_a_long_way_is_long_and_a_lossy_one_loses(site: Site) -> None:
    install(site.nat, KernelNat())
    prober = site.prober
    here = prober.sockets[KNOWN]

    def round_trips(count: int) -> list[float]:
        took = []
        with prober.fresh() as inside:
            for _ in range(count):
                began = time.monotonic()
                mapped = prober.mapped(inside, KNOWN)
                here.sendto(b"back", mapped)
                inside.recv(100)
                took.append(time.monotonic() - began)
        return took

    with impaired(site.core, [(site.nat, Quality(latency_us=20_000))]):
        took = round_trips(20)
        assert min(took) >= 0.040
        print(f"median round trip with 2 x 20 ms: {statistics.median(took) * 1e3:.1f} ms")
    with impaired(site.core, [(site.nat, Quality(loss=0.5))]), prober.fresh() as inside:
        for _ in range(1_000):
            inside.sendto(b"perhaps", KNOWN)
        for _ in range(30):  # some of these arrive
            inside.sendto(b"last", KNOWN)
        arrived = len(nothing_but(here, b"last"))
    assert 400 < arrived < 600


def test_a_narrow_way_takes_its_time(site: Site) -> None:
    install(site.nat, KernelNat())
    prober = site.prober
    here = prober.sockets[KNOWN]
    with impaired(site.core, [(site.nat, Quality(rate_bit_s=2_000_000))]), prober.fresh() as inside:
        began = time.monotonic()
        for _ in range(40):
            inside.sendto(bytes(1_000), KNOWN)
        arrived = 0
        while arrived < 40:
            arrived += len(here.recv(2_000)) == 1_000
        assert time.monotonic() - began > (40 * 1_028 - 16_384) * 8 / 2_000_000
