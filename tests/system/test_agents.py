"""Client and gateway as processes in a whole installation: what they carry, and what they leave.

One installation serves all tests that need one; each test leaves it whole.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from channel.credentials import encode_token
from simulations.installation import GATEWAYS, WEB, Installation, wait_until
from simulations.kernel.lab import Host, Lab

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
ROOT = Path(__file__).resolve().parents[2]
HOLLOWAY = [sys.executable, "-m", "holloway"]


@pytest.fixture(scope="module")
def whole() -> Iterator[Installation]:
    with Lab() as lab:
        installation = Installation(lab)
        for name, host in installation.gateway_hosts.items():
            host.ip(f"addr add fd00:20::{GATEWAYS.index(name) + 11:x}/64 dev eth0 nodad")
        installation.web.ip("addr add fd00:20::80/64 dev eth0 nodad")
        installation.start_everything(large_file_bytes=16 << 20)
        installation.allow()
        try:
            yield installation
        except BaseException:
            for log in sorted(installation.directory.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
            raise


@pytest.fixture
def it(whole: Installation) -> Iterator[Installation]:
    wait_until(whole.fetch_page, what="the page arrives before the test", timeout_s=60)
    yield whole
    for name, component in whole.components.items():
        assert component.alive(), f"{name} ended:\n{component.tail()}"


@contextlib.contextmanager
def allowed(it: Installation, name: str, address: str, kind: str) -> Iterator[None]:
    """One more resource in the site with the policy for it, within the block."""
    body = {"name": name, "kind": kind, "address": address, "site_ids": [it.ids["site"]]}
    resource = it.admin.call("POST", "/v1/resources", body)
    policy = it.admin.call(
        "POST",
        "/v1/policies",
        {"group_id": it.ids["group"], "resource_id": resource["id"]},
    )
    yield
    it.admin.call("DELETE", f"/v1/policies/{policy['id']}")
    it.admin.call("DELETE", f"/v1/resources/{resource['id']}")


def move(host: Host, before: str, after: str) -> None:
    """Another address on the same network, as after a new lease or a new network."""
    host.ip(
        f"addr del {before} dev eth0",
        f"addr add {after} dev eth0",
        "route replace default via 192.168.1.1 dev eth0",
    )


def rules(host: Host) -> str:
    return host.run("ip", "rule", "show") + host.run("ip", "-6", "rule", "show")


def tun_devices(host: Host) -> list[str]:
    return re.findall(r"hlw\d+", host.run("ip", "-brief", "link", "show"))


# --- starts that fail ----------------------------------------------------------------------------


def attempt(*argv: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [*HOLLOWAY, *argv], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60
    )
    return done.returncode, done.stderr


def test_a_start_without_a_token_or_with_a_wrong_one_says_so_in_one_line(tmp_path: Path) -> None:
    code, said = attempt("up", "--state-dir", str(tmp_path))
    assert code == 1
    assert "no token is given: set --token-file, HOLLOWAY_UP_TOKEN, or" in said
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("hlw_client_garbage")
    code, said = attempt("up", "--state-dir", str(tmp_path), "--token-file", str(path))
    assert code == 1
    assert "garbage" not in said
    token = encode_token("gateway", UUID(int=1), bytes(32), "192.0.2.1:443", bytes(32))
    path.write_text(token.reveal_text())
    code, said = attempt("up", "--state-dir", str(tmp_path), "--token-file", str(path))
    assert code == 1
    assert said.splitlines()[-1] == "holloway up: the token is for a gateway, and this is a client"
    path.chmod(0o644)
    code, said = attempt("gateway", "--token-file", str(path))
    assert code == 1
    assert "chmod 0600" in said
    path.chmod(0o600)
    code, said = attempt("gateway", "--token-file", str(path), "--allow", "10.0.0.1/8")
    assert code == 1
    assert "allow: 10.0.0.1/8 has host bits set" in said


def test_netcheck_asks_the_relays_that_the_running_client_was_told_of(it: Installation) -> None:
    said = it.laptop.run(
        *HOLLOWAY, "netcheck", "--json", "--state-dir", str(it.directory / "laptop"),
        "--token-file", str(it.directory / "client-token"),
    )  # fmt: skip
    found = json.loads(said)
    assert [each["address"] for each in found["ipv4"]["servers"]] == ["203.0.113.6:3478"]
    assert (found["ipv4"]["udp"], found["ipv4"]["nat"]["present"]) == ("works", True)
    assert (found["portal"]["reachable"], found["portal"]["proved"]) == (True, True)
    assert "password" not in json.dumps(it.status()).lower()


def test_status_without_a_running_client_says_so(tmp_path: Path) -> None:
    code, said = attempt("status", "--state-dir", str(tmp_path))
    assert code == 1
    assert "is it running?" in said


def test_a_live_access_is_among_what_a_revocation_would_end_at_once(it: Installation) -> None:
    assert it.fetch_page()
    found = it.admin.call("GET", "/v1/policies/exposure")["items"]
    assert sum(each["connected"] for each in found) >= 1
    assert [each["away"] for each in found] == [[] for _ in found]


# --- what is carried -----------------------------------------------------------------------------


def test_icmp_fragments_and_ipv6_pass(it: Installation) -> None:
    ping = ["ping", "-i", "0.2", "-W", "5"]

    def answers(*options: str) -> bool:
        return " 0% packet loss" in it.laptop.run(*ping, *options, check=False)

    with (
        allowed(it, "All of the web server", "10.20.0.80/32", "cidr"),
        allowed(it, "Its other address", "fd00:20::80", "ip"),
    ):
        wait_until(lambda: answers("-c", "1", WEB), what="the web server answers")
        assert answers("-c", "3", "-s", "3000", WEB)
        wait_until(lambda: answers("-c", "1", "fd00:20::80"), what="IPv6 answers")
        # The first large answer teaches the server the path's MTU: routers cut up no IPv6.
        it.laptop.run(*ping, "-c", "1", "-s", "3000", "fd00:20::80", check=False)
        assert answers("-c", "3", "-s", "3000", "fd00:20::80")


def test_a_client_tells_what_its_device_is(it: Installation) -> None:
    def reported() -> dict[str, object]:
        changes = it.admin.call("GET", "/v1/changes?limit=1000")["items"]
        rows = [each["after"] for each in changes if each["kind"] == "client" and each["after"]]
        facts = [{fact["name"]: fact["value"] for fact in row["posture"]} for row in rows]
        return facts[-1] if facts else {}

    facts = wait_until(reported, what="the portal knows the client's posture")
    assert re.fullmatch(r"\d+(\.\d+)*", str(facts["kernel_version"]))
    assert facts.keys() <= {
        "agent_version",
        "disk_encrypted",
        "kernel_version",
        "os_name",
        "os_version",
    }


def test_a_person_reads_who_is_reached_how(it: Installation) -> None:
    shown = it.laptop.run(*HOLLOWAY, "status", "--state-dir", str(it.directory / "laptop"))
    assert "client laptop: connected to the portal" in shown
    assert "direct" in shown
    assert any(name in shown for name in GATEWAYS)
    status = it.status()
    [peer] = [peer for peer in status["peers"] if peer["path"]]
    assert peer["bytes_in"] > 0
    gateway = it.status(peer["name"])
    assert [client["name"] for client in gateway["peers"]] == ["laptop"]
    assert "token" not in json.dumps(status).lower()


def test_secrets_and_sockets_are_private(it: Installation) -> None:
    state = it.directory / "laptop"
    assert (state / "device.key").stat().st_mode & 0o777 == 0o600
    assert (state / "control.sock").stat().st_mode & 0o777 == 0o600
    token = (it.directory / "client-token").read_text()
    for log in it.directory.glob("*.log"):
        assert token[-40:] not in log.read_text(errors="replace")


def test_agents_keep_only_the_right_to_administer_the_network(it: Installation) -> None:
    for name in ("laptop", *GATEWAYS):
        [pid] = {
            pid
            for pid in it.components[name].host.pids()
            if b"holloway" in Path(f"/proc/{pid}/cmdline").read_bytes()
        }
        status = Path(f"/proc/{pid}/status").read_text()
        for field in ("CapEff", "CapPrm", "CapBnd"):
            assert f"{field}:\t{1 << 12:016x}" in status


def test_no_component_leaves_a_core_dump_and_neither_does_the_database(it: Installation) -> None:
    for name, component in it.components.items():
        for pid in component.host.pids():
            limits = Path(f"/proc/{pid}/limits").read_text()
            if b"holloway" in Path(f"/proc/{pid}/cmdline").read_bytes() or "portal" in name:
                assert re.search(r"Max core file size +0 +0 ", limits), name


def test_health_and_metrics_are_served(it: Installation) -> None:
    program = (
        "import sys, urllib.request\n"
        "for path in ('readyz', 'metrics'):\n"
        "    with urllib.request.urlopen(f'http://127.0.0.1:{sys.argv[1]}/{path}') as answer:\n"
        "        print(answer.read().decode())\n"
    )
    said = it.laptop.run(sys.executable, "-c", program, "9480")
    assert '"ready":true' in said
    assert "holloway_client_packets_delivered_total" in said
    used = next(peer["name"] for peer in it.status()["peers"] if peer["path"])
    said = it.gateway_hosts[used].run(sys.executable, "-c", program, "9479")
    assert "holloway_gateway_bytes_out_total" in said


def test_routes_that_cover_portal_relay_and_gateways_do_not_loop(it: Installation) -> None:
    def routed() -> bool:
        return "dev hlw" in it.laptop.run("ip", "route", "get", "203.0.113.2")

    with allowed(it, "Half of the world", "192.0.0.0/3", "cidr"):
        wait_until(routed, what="the portal's own address is routed into the tunnel")
        it.components["laptop"].kill()
        it.start_client()
        wait_until(lambda: it.status().get("connected_to_portal"), what="the client is back")
        wait_until(routed, what="the routes are back")
        wait_until(it.fetch_page, what="the page arrives although everything is routed")
    wait_until(lambda: not routed(), what="the route goes with its resource")


def test_a_client_that_changes_its_address_goes_on(it: Installation) -> None:
    with it.download("--limit-rate", "1M") as (_, target):
        wait_until(
            lambda: target.exists() and target.stat().st_size > 1 << 20, what="it is under way"
        )
        move(it.laptop, "192.168.1.10/24", "192.168.1.77/24")
        moved_at = target.stat().st_size
        wait_until(
            lambda: target.stat().st_size > moved_at + (2 << 20), what="the download goes on"
        )
    assert "local': '198.51.100.2" in str(it.status()["peers"])
    move(it.laptop, "192.168.1.77/24", "192.168.1.10/24")


# --- what is left --------------------------------------------------------------------------------


def test_a_killed_client_starts_again_and_leaves_one_rule(it: Installation) -> None:
    it.components["laptop"].kill()
    assert rules(it.laptop).count("26727") == 2  # one for each family
    it.start_client()
    wait_until(lambda: it.fetch_page(2), what="the page arrives again", timeout_s=60)
    assert rules(it.laptop).count("26727") == 2


def test_down_takes_everything_back(it: Installation) -> None:
    component = it.components["laptop"]
    it.laptop.run(*HOLLOWAY, "down", "--state-dir", str(it.directory / "laptop"))
    assert component.process is not None
    assert component.process.wait(timeout=30) == 0
    assert "26727" not in rules(it.laptop)
    assert tun_devices(it.laptop) == []
    assert not (it.directory / "laptop" / "control.sock").exists()
    code, _ = it.curl(timeout_s=2)
    assert code != 0
    it.start_client()
    wait_until(lambda: it.fetch_page(2), what="the page arrives again", timeout_s=60)


def test_a_gateway_that_is_told_to_end_leaves_the_machine_as_it_was(it: Installation) -> None:
    used = next(peer["name"] for peer in it.status()["peers"] if peer["path"])
    host, component = it.gateway_hosts[used], it.components[used]
    assert host.run("sysctl", "-n", "net.ipv4.ip_forward").strip() == "1"
    component.signal(signal.SIGTERM)
    assert component.process is not None
    assert component.process.wait(timeout=30) == 0
    assert host.run("sysctl", "-n", "net.ipv4.ip_forward").strip() == "0"
    assert host.run("nft", "list", "tables").strip() == ""
    assert tun_devices(host) == []
    wait_until(it.fetch_page, what="the other gateway serves", timeout_s=60)
    it.start_gateway(used)
    it.wait_until_online()


# --- two on one machine --------------------------------------------------------------------------


def test_a_second_agent_in_the_namespace_is_refused_and_harms_nothing(it: Installation) -> None:
    for name, command, kind, thing in (
        ("laptop", "up", "client", "routing table 26727"),
        ("gateway-1", "gateway", "gateway", "forwarding"),
    ):
        host = it.components[name].host
        before = rules(host) + host.run("nft", "list", "ruleset")
        second = it.directory / f"second-{name}"
        token_file = str(it.directory / f"{kind}-token")
        flags = ["--token-file", token_file, "--state-dir", str(second), "--observability", ""]
        done = subprocess.run(
            ["ip", "netns", "exec", host.name, *HOLLOWAY, command, *flags],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert done.returncode == 1
        process = it.components[name].process
        assert process is not None
        assert done.stderr == (
            f"holloway {command}: {thing} of this machine (network namespace) is taken by process "
            f"{process.pid} of user 0: end that first\n"
        )
        assert rules(host) + host.run("nft", "list", "ruleset") == before
    assert it.fetch_page()
