"""NAT behaviour discovery through the relay as a process, by foreign clients: coturn's turnutils
(RFC 5780) and Debian's `stun` (RFC 3489); in the open, and behind two kinds of NAT."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.kernel.lab import Host, Lab
from tests.system.test_relay_foreign import is_bound, running, wait_until

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parent.parent.parent
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
    output = hosts["nothing"].run("turnutils_natdiscovery", "-f", "-P", A, timeout_s=60)
    assert "NAT with Endpoint Independent Filtering!" in output
    output = hosts["nothing"].run("turnutils_stunclient", A, timeout_s=60)
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
