"""What `holloway netcheck --export` writes is a part of a scenario, whatever was found."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import IPv6Network
from pathlib import Path
from typing import get_args

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.netcheck.export import to_fragment
from clients.netcheck.findings import (
    FamilyFinding,
    Filtering,
    Hairpinning,
    Link,
    MappingBehaviour,
    Nat,
    PortalFinding,
    Ports,
    Report,
    ServerFinding,
    Udp,
)
from runtime.net.address import Address
from simulations.scenario.capture import add, load_capture
from simulations.scenario.load import ScenarioError, load_part
from simulations.scenario.schema import NatBehaviour, Scenario, Traffic
from tests.small_scenario import SCENARIO
from tests.unit.clients.nat_model import A, B, ModelNat, Outside, netcheck

AT = datetime(2026, 1, 2, tzinfo=UTC)
NONE6 = FamilyFinding(family="ipv6", local_host=None, udp="not_measured")
SERVER = ServerFinding(name="relay", address="203.0.113.2:3478", reachable=True)


def report_on(ipv4: FamilyFinding, **fields: object) -> Report:
    whole: dict[str, object] = {"ipv4": ipv4, "ipv6": NONE6, **fields}
    return Report(**whole)  # type: ignore[arg-type]


def capture(folder: Path, report: Report, *, name: str = "flat", user: str = "grace") -> Scenario:
    file = folder / "capture.toml"
    file.write_text(to_fragment(report, name=name, user=user, at=AT))
    return load_capture(file)


def found_behind(nat: ModelNat | None) -> Report:
    servers = (Address(A, 3478), Address(A, 3479), Address(B, 3478))
    return report_on(netcheck(Outside(nat), *servers)[1])


families = st.builds(
    FamilyFinding,
    family=st.just("ipv4"),
    local_host=st.sampled_from((None, "192.168.1.10", "8.8.8.8", "100.64.0.7")),
    udp=st.sampled_from(get_args(Udp)),
    servers=st.lists(
        st.builds(
            ServerFinding,
            name=st.text(max_size=20),
            address=st.just("203.0.113.2:3478"),
            reachable=st.booleans(),
            round_trip_ns=st.none() | st.integers(0, 2 * 10**9),
        ),
        max_size=2,
    ).map(tuple),
    nat=st.builds(
        Nat,
        present=st.sampled_from((None, True, False)),
        mapping=st.sampled_from(get_args(MappingBehaviour)),
        filtering=st.sampled_from(get_args(Filtering)),
        ports=st.sampled_from(get_args(Ports)),
        hairpinning=st.sampled_from(get_args(Hairpinning)),
        public_hosts=st.just(("198.51.100.2",)),
    ),
)
links = st.builds(
    Link,
    name=st.just("eth0"),
    mtu=st.integers(68, 70_000),
    prefix=st.sampled_from(("192.168.1.0/24", "10.0.0.0/8", "8.8.8.0/24", "192.168.1.10/32")),
)


@given(
    ipv4=families,
    ipv6=families,
    link=st.none() | links,
    portal=st.none() | st.just(PortalFinding(address="portal:443", reachable=False)),
)
def test_whatever_was_found_can_be_added_to_a_scenario(
    tmp_path_factory: pytest.TempPathFactory,
    ipv4: FamilyFinding,
    ipv6: FamilyFinding,
    link: Link | None,
    portal: PortalFinding | None,
) -> None:
    report = report_on(ipv4, ipv6=ipv6, link=link, portal=portal)
    text = to_fragment(report, name="flat", user="grace", at=AT)
    assert "198.51.100.2" not in text, "a public address is told"
    assert "203.0.113.2" not in text
    whole = add(SCENARIO, capture(tmp_path_factory.mktemp("capture"), report))
    assert whole.networks[-1].name == "flat"
    assert whole.clients[-1].network == "flat"


def test_what_was_measured_is_what_is_written(tmp_path: Path) -> None:
    nat = ModelNat(
        mapping="address_dependent", filtering="endpoint_independent",
        ports="sequential", hairpinning="internal_source",
    )  # fmt: skip
    servers = (Address(A, 3478), Address(A, 3479), Address(B, 3478))
    outside = Outside(nat, other={servers[0]: Address("203.0.113.3", 3479)})
    report = report_on(
        netcheck(outside, *servers)[1], link=Link(name="w0", mtu=1_400, prefix="10.1.0.0/16")
    )
    (network,) = capture(tmp_path, report).networks
    assert network.nat == NatBehaviour(
        mapping="address_dependent",
        filtering="endpoint_independent",
        ports="sequential",
        hairpinning="internal_source",
    )
    assert (network.prefix, network.uplink.latency, network.uplink.mtu) == (
        "10.1.0.0/16", "10000us", 1_400,
    )  # fmt: skip


def test_what_was_not_measured_is_assumed_to_be_hard_and_the_file_says_so(tmp_path: Path) -> None:
    report = report_on(netcheck(Outside(ModelNat(ports="random")), Address(A, 3478))[1])
    (network,) = capture(tmp_path, report).networks
    assert network.nat is not None
    assert network.nat.mapping == network.nat.filtering == "address_and_port_dependent"
    text = (tmp_path / "capture.toml").read_text()
    assert "# mapping: assumed" in text
    assert "# filtering: assumed" in text
    assert "# timeout: assumed" in text


def test_where_udp_is_blocked_the_network_drops_it(tmp_path: Path) -> None:
    server = Address(A, 3478)
    _, found = netcheck(Outside(ModelNat(), dead=frozenset({server})), server)
    (network,) = capture(tmp_path, report_on(found)).networks
    assert network.firewall.udp == "drop"


def test_a_network_without_a_nat_has_none(tmp_path: Path) -> None:
    (network,) = capture(tmp_path, found_behind(None)).networks
    assert network.nat is None


@pytest.mark.parametrize("name", ["", "Home", 'x"\ny', "a" * 51, "-a"])
def test_a_name_that_no_scenario_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="lower-case"):
        to_fragment(found_behind(None), name=name, user="grace", at=AT)
    with pytest.raises(ValueError, match="lower-case"):
        to_fragment(found_behind(None), name="flat", user=name, at=AT)


# --- adding ---------------------------------------------------------------------------------------


def test_names_and_placeholders_that_are_taken_are_changed(tmp_path: Path) -> None:
    ipv6 = FamilyFinding(family="ipv6", local_host="2a00::1", udp="works", servers=(SERVER,))
    report = report_on(found_behind(ModelNat()).ipv4, ipv6=ipv6)
    captured = capture(tmp_path, report, name="home")
    whole = add(add(SCENARIO, captured), captured)
    assert [each.name for each in whole.networks[-2:]] == ["home-2", "home-3"]
    assert [(each.name, each.network) for each in whole.clients[-2:]] == [
        ("home-client", "home-2"),
        ("home-client-2", "home-3"),
    ]
    first, second = (IPv6Network(each.prefix6) for each in whole.networks[-2:])
    assert not first.overlaps(second)


def test_added_clients_ask_for_what_they_may_reach_in_whatever_scenario(tmp_path: Path) -> None:
    captured = capture(tmp_path, found_behind(None))
    named = attrs.evolve(SCENARIO, traffic=(Traffic(source=("laptop",)),))
    assert [each.source for each in add(named, captured).traffic] == [("laptop",), ("flat-client",)]
    of_all = attrs.evolve(SCENARIO, traffic=(Traffic(),))
    assert add(of_all, captured).traffic == of_all.traffic


def test_whose_the_client_is_can_be_said_and_has_to_be_known(tmp_path: Path) -> None:
    captured = capture(tmp_path, found_behind(None), user="someone")
    assert add(SCENARIO, captured, user="grace").clients[-1].user == "grace"
    with pytest.raises(ScenarioError, match=r"no user 'someone'.*\(--as"):
        add(SCENARIO, captured)
    with pytest.raises(ScenarioError, match="no user 'grade'; did you mean 'grace'"):
        add(SCENARIO, captured, user="grade")


def test_a_capture_holds_networks_and_clients_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "capture.toml"
    client = '[[clients]]\nname = "c"\nnetwork = "internet"\nuser = "grace"\n'
    for more, why in (
        ('duration = "1s"\n' + client, "duration: has no place in a capture"),
        (client + '[account]\nsites = ["hq"]\n', "account: has no place in a capture"),
        (client + "[chaos]\nfaults = 3\n", "chaos: has no place in a capture"),
        ("", "clients: are missing"),
    ):
        file.write_text(f'format = 1\nname = "x"\n{more}')
        with pytest.raises(ScenarioError, match=why):
            load_capture(file)
    file.write_text('format = 1\nname = "x"\n[[networks]]\nname = "A"\n')
    with pytest.raises(ScenarioError):
        load_part(file)
