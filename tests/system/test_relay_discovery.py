"""NAT behaviour discovery through the relay as a process, by foreign clients: coturn's turnutils
(RFC 5780) and Debian's `stun` (RFC 3489), and by `holloway netcheck`; in the open, and behind two
kinds of NAT."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.kernel.lab import Host, Lab
from tests.system.relay_lab import ROOT, running, wait_until
from tests.system.test_relay_foreign import is_bound

pytestmark = pytest.mark.system

A, B = "203.0.113.6", "203.0.113.5"
CORNERS = [(host, port) for host in (A, B) for port in (3478, 3479)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    """Who asks, by what is before him; a relay with two addresses and two ports answers."""
    with Lab() as lab:
        core = lab.router("core")
        relay = lab.public_host("relay", core, f"{A}/29")
        relay.ip(f"addr add {B}/29 dev {relay.device}")
        easy = lab.nat("easy", core, wan="198.51.100.2/30", lan="192.168.1.1/24")
        hard = lab.nat("hard", core, wan="198.51.100.6/30", lan="192.168.2.1/24", kind="symmetric")
        users = lab.directory / "users"
        users.write_text("alice:opensesame\n")
        users.chmod(0o600)
        argv = [
            sys.executable, "-m", "holloway", "relay", "--standalone", "--users-file", str(users),
            "--relay-address", A, "--observability", "",
        ]  # fmt: skip
        for host, port in CORNERS:
            argv += ["--listen", f"{host}:{port}"]
        with running(relay.spawn(argv, cwd=ROOT)):
            wait_until(lambda: all(is_bound(relay, corner) for corner in CORNERS), "listening")
            yield {
                "nothing": lab.public_host("open", core, "198.51.100.10/30"),
                "an easy NAT": lab.host("inside", easy, "192.168.1.10/24"),
                "a hard NAT": lab.host("deep", hard, "192.168.2.10/24"),
            }


@pytest.mark.parametrize(
    ("before", "mapping", "filtering"),
    [
        ("nothing", "Endpoint Independent Mapping", "Endpoint Independent Filtering"),
        ("an easy NAT", "Endpoint Independent Mapping", "Address and Port Dependent Filtering"),
        ("a hard NAT", "Address and Port Dependent Mapping", "Address and Port Dependent Filter"),
    ],
)
def test_coturns_client_finds_out_the_nat(
    hosts: dict[str, Host], before: str, mapping: str, filtering: str
) -> None:
    output = hosts[before].run("turnutils_natdiscovery", "-m", "-f", A, timeout_s=120)
    assert f"NAT with {mapping}!" in output
    assert f"NAT with {filtering}" in output
    assert f"Other addr: : {B}:3479" in output
    assert "Not received mapped address" not in output


def test_coturns_client_gets_padded_answers_and_such_to_another_port(
    hosts: dict[str, Host],
) -> None:
    output = hosts["nothing"].run("turnutils_natdiscovery", "-m", "-f", "-H", "-P", A, timeout_s=60)
    assert "NAT with Endpoint Independent Mapping!" in output
    assert "NAT with Endpoint Independent Filtering!" in output
    assert "Received a request (maybe a successful hairpinning)" in output
    output = hosts["nothing"].run("turnutils_stunclient", "-f", A, timeout_s=60)
    assert output.count("RFC 5780 response") == 3
    assert f"Response origin: : {B}:3479" in output


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("nothing", "Primary: Open"),
        ("an easy NAT", "Primary: Independent Mapping, Port Dependent Filter"),
        ("a hard NAT", "Primary: Dependent Mapping"),
    ],
)
def test_debians_client_of_rfc_3489_finds_out_the_nat(
    hosts: dict[str, Host], before: str, words: str
) -> None:
    output = hosts[before].run("stun", A, check=False, timeout_s=60)
    assert words in output


@pytest.mark.parametrize(
    ("before", "mapping", "filtering"),
    [
        ("nothing", "endpoint_independent", "endpoint_independent"),
        ("an easy NAT", "endpoint_independent", "address_and_port_dependent"),
        ("a hard NAT", "address_and_port_dependent", "address_and_port_dependent"),
    ],
)
def test_netcheck_finds_out_the_nat_by_one_relay(
    hosts: dict[str, Host], before: str, mapping: str, filtering: str, tmp_path: Path
) -> None:
    file = tmp_path / "captured.toml"
    argv = [sys.executable, "-m", "holloway", "netcheck", "--stun", A, "--json"]
    output = hosts[before].run("env", f"PYTHONPATH={ROOT}", *argv, "--export", str(file))
    nat = json.loads(output)["ipv4"]["nat"]
    assert (nat["mapping"], nat["filtering"]) == (mapping, filtering)
    assert nat["present"] == (before != "nothing")
    if nat["present"]:
        exported = file.read_text()
        assert f'mapping = "{mapping}", filtering = "{filtering}"' in exported
        assert "# mapping: measured\n# filtering: measured\n" in exported
