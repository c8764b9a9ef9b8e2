"""Every part killed alone during a session, and bad input at every door: what the specification
promises happens, nothing acknowledged is lost, and all else keeps running.

One installation serves all tests of this file; each test leaves it whole.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.installation import (
    API_PORT,
    CHANNEL_PORT,
    LARGE_FILE,
    PORTAL,
    RELAY,
    Installation,
    wait_until,
)
from simulations.kernel.lab import Lab

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def whole() -> Iterator[Installation]:
    with Lab() as lab:
        installation = Installation(lab)
        installation.start_everything(large_file_bytes=64 << 20)
        installation.allow()
        try:
            wait_until(installation.fetch_page, what="the page arrives")
            yield installation
        except BaseException:
            show_logs(installation)
            raise


@pytest.fixture
def it(whole: Installation) -> Iterator[Installation]:
    """The installation, whole before the test and after it."""
    yield whole
    for name, component in whole.components.items():
        assert component.alive(), f"{name} ended:\n{component.tail()}"
    wait_until(whole.fetch_page, what="the page arrives after the fault", timeout_s=60)


def show_logs(installation: Installation) -> None:
    for log in sorted(installation.directory.glob("*.log")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")


def gateway_in_use(it: Installation) -> str:
    peers = [peer for peer in it.status()["peers"] if peer["path"]]
    return str(peers[0]["name"])


def postgres_pids(it: Installation) -> list[int]:
    """The postmaster of the portal's embedded PostgreSQL, by its own pid file."""
    files = it.directory.glob("portal/**/postmaster.pid")
    return [int(file.read_text().splitlines()[0]) for file in files]


# --- kill -9 ---------------------------------------------------------------------------------


def test_a_download_outlives_the_portal_and_nothing_acknowledged_is_lost(it: Installation) -> None:
    group = it.admin.call("POST", "/v1/groups", {"name": "Made just before the kill"})
    with it.download("--limit-rate", "4M") as (process, target):
        wait_until(lambda: target.exists() and target.stat().st_size > 1 << 20, what="it runs")
        it.components["portal"].kill()
        size = target.stat().st_size
        wait_until(lambda: target.stat().st_size > size + (8 << 20), what="the download goes on")
        assert process.poll() is None
        it.components["portal"].start()
        it.wait_for_portal()
        it.wait_until_online(60)
        assert process.poll() is None
    assert it.admin.call("GET", f"/v1/groups/{group['id']}")["name"] == group["name"]
    it.forbid()
    wait_until(lambda: not it.fetch_page(2), what="the restarted portal cuts what it forbids")
    it.allow()


def test_a_session_outlives_the_relay_and_the_relay_comes_back(it: Installation) -> None:
    it.components["relay"].kill()
    assert it.fetch_page()
    it.components["relay"].start()
    it.wait_until_online(60)


def test_another_gateway_takes_over_when_the_one_in_use_is_killed(it: Installation) -> None:
    assert it.fetch_page()
    used = gateway_in_use(it)
    it.components[used].kill()
    wait_until(it.fetch_page, what="the page arrives through the other gateway")
    assert gateway_in_use(it) != used
    it.components[used].start()
    it.wait_until_online(60)


def test_a_killed_client_comes_back_to_where_it_was(it: Installation) -> None:
    it.components["laptop"].kill()
    assert not it.fetch_page(2)
    it.components["laptop"].start()
    wait_until(it.fetch_page, what="the page arrives again")
    assert len(it.admin.call("GET", "/v1/clients")["items"]) == 1


def test_postgresql_is_restarted_and_keeps_what_it_acknowledged(it: Installation) -> None:
    made = []
    pids = postgres_pids(it)
    assert pids
    for number in range(20):
        if number == 10:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        status, answer = it.admin.try_call("POST", "/v1/groups", {"name": f"Group {number}"})
        assert status in (201, 503), answer
        if status == 201:
            made.append(answer["id"])
    assert it.fetch_page()

    def healed() -> bool:
        with contextlib.suppress(OSError):
            return it.admin.try_call("GET", "/v1/groups")[0] == 200
        return False

    wait_until(healed, what="the API answers again", timeout_s=60)
    known = {group["id"] for group in it.admin.call("GET", "/v1/groups?limit=1000")["items"]}
    assert known.issuperset(made)
    it.wait_until_online(60)
    it.forbid()
    wait_until(lambda: not it.fetch_page(2), what="changes reach the agents again")
    it.allow()


def test_a_paused_gateway_is_left_and_may_come_back(it: Installation) -> None:
    assert it.fetch_page()
    used = gateway_in_use(it)
    it.components[used].signal(signal.SIGSTOP)
    try:
        wait_until(it.fetch_page, what="the page arrives through the other gateway")
        assert gateway_in_use(it) != used
    finally:
        it.components[used].signal(signal.SIGCONT)
    it.wait_until_online(90)


# --- bad input -------------------------------------------------------------------------------


def datagrams() -> Iterator[bytes]:
    noise = random.Random(2)
    yield b""
    yield b"\x00" * 1200
    for first in (0x00, 0x01, 0x02, 0x03, 0x04, 0x40, 0x7F, 0xC0, 0xFF):
        for length in (1, 20, 32, 148, 1200):
            yield bytes([first]) + noise.randbytes(length - 1)
    magic = bytes.fromhex("2112a442")
    for kind in (0x0001, 0x0003, 0x0016, 0x0008):
        yield kind.to_bytes(2, "big") + (40).to_bytes(2, "big") + magic + noise.randbytes(52)


def test_garbage_datagrams_at_every_socket_change_nothing(it: Installation) -> None:
    assert it.fetch_page()
    targets = [
        (it.relay_host, (RELAY, 3478)),
        (it.relay_host, (PORTAL, CHANNEL_PORT)),
    ]
    listing = ["ip", "netns", "exec", it.gateway_hosts[gateway_in_use(it)].name, "ss", "-Hlun"]
    for line in subprocess.run(listing, capture_output=True, text=True).stdout.splitlines():
        host, _, port = line.split()[3].rpartition(":")
        if host.startswith("10.20.0."):
            targets.append((it.web, (host, int(port))))
    assert len(targets) > 2, "the gateway has a socket on its network"
    for host, address in targets:
        with host.entered():
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            for data in datagrams():
                sender.sendto(data, address)
    assert it.fetch_page()


def try_to_join(it: Installation, token: str) -> subprocess.CompletedProcess[str]:
    """`holloway up` with this token on a machine of its own, to its end."""
    path = it.directory / "intruders-token"
    path.touch(mode=0o600)
    path.write_text(token)
    environment = {"HOLLOWAY_UP_TOKEN_FILE": str(path), "HOLLOWAY_UP_OBSERVABILITY": ""}
    try:
        return subprocess.run(
            ["ip", "netns", "exec", it.web.name, *it.components["laptop"].argv[:3], "up",
             "--state-dir", str(it.directory / "intruder")],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip
    finally:
        path.unlink()


def test_a_mistyped_token_is_refused_with_a_reason_and_without_its_text(it: Installation) -> None:
    good = (it.directory / "client-token").read_text().strip()
    done = try_to_join(it, good[:70] + ("A" if good[70] != "A" else "B") + good[71:])
    assert done.returncode != 0
    assert "token" in done.stderr
    assert good[80:110] not in done.stderr + done.stdout


def test_a_deleted_token_is_refused_at_the_channel(it: Installation) -> None:
    made = it.admin.call(
        "POST",
        "/v1/tokens",
        {"kind": "client", "name": "Short-lived", "principal_id": it.ids["principal"]},
    )
    it.admin.call("DELETE", f"/v1/tokens/{made['id']}")
    done = try_to_join(it, made["token"])
    assert done.returncode != 0
    assert "invalid_token" in done.stderr
    log = it.components["portal"].log.read_text()
    assert "invalid_token" in log
    assert made["token"] not in log + done.stderr


def test_a_body_of_10_mb_and_wrong_types_are_refused_by_the_api(it: Installation) -> None:
    status, answer = it.admin.try_call("POST", "/v1/groups", {"name": "x" * (10 << 20)})
    assert status == 413
    assert answer["code"]
    status, answer = it.admin.try_call("POST", "/v1/groups", {"name": 7})
    assert status == 422
    assert answer["errors"][0]["field"] == "name"
    status, answer = it.admin.try_call("POST", "/v1/groups", ["no", "object"])
    assert 400 <= status < 500
    assert answer["code"]
    lines = it.components["portal"].log.read_text().splitlines()
    assert [line for line in lines if "path=/v1/groups" in line and "status=413" in line]


def test_half_a_request_and_a_stranger_at_the_door_of_the_api(it: Installation) -> None:
    context = ssl.create_default_context(cafile=str(it.directory / "portal" / "ca.pem"))
    plain = it.portal_host.connect((PORTAL, API_PORT))
    plain.sendall(b"\x16\x03\x01 this is no TLS")
    plain.close()
    with context.wrap_socket(
        it.portal_host.connect((PORTAL, API_PORT)), server_hostname=PORTAL
    ) as stream:
        stream.sendall(b"POST /v1/groups HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert it.admin.call("GET", "/v1/groups?limit=1")["items"]


def test_garbage_at_the_control_socket_of_an_agent_changes_nothing(it: Installation) -> None:
    sockets = [path for path in (it.directory / "laptop").rglob("*") if path.is_socket()]
    assert sockets
    for request in (b"\n", b"{", b"[1]\n", b'{"command":"nonsense"}\n', b"\xff" * 100_000 + b"\n"):
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
            contextlib.suppress(BrokenPipeError, ConnectionResetError),
        ):
            client.settimeout(5)
            client.connect(str(sockets[0]))
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            client.recv(1000)
    assert it.status()["peers"]


def test_no_secret_is_in_any_log(it: Installation) -> None:
    secrets_known = [path.read_text().strip() for path in it.directory.glob("*-token")]
    secrets_known.append((it.directory / "portal" / "operator-token").read_text().strip())
    for log in it.directory.glob("*.log"):
        text = log.read_text(errors="replace")
        assert not [1 for secret in secrets_known if secret in text], log.name


def test_the_large_file_arrives_whole(it: Installation) -> None:
    with it.download() as (process, target):
        assert process.wait(timeout=120) == 0
        ours = subprocess.run(["sha256sum", str(target)], capture_output=True, text=True).stdout
    theirs = subprocess.run(
        ["sha256sum", str(it.directory / "web" / LARGE_FILE)], capture_output=True, text=True
    ).stdout
    assert ours.split()[0] == theirs.split()[0]
