"""Every door of a whole installation: health and metrics on every component, and bad input that
gets a clear answer and a line in the log while all else goes on. And a relay that dies while it
carries the traffic.

One installation serves all tests of this file; each test leaves it whole.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from channel.credentials import encode_token
from channel.frames import encode_frame
from channel.messages import Join
from simulations.installation import (
    CHANNEL_PORT,
    PORTAL,
    RELAY,
    Installation,
    wait_until,
)
from simulations.kernel.lab import Host, Lab

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
ROOT = Path(__file__).resolve().parents[2]
OBSERVABILITY = {
    "portal": 9470,
    "relay": 9478,
    "gateway-1": 9479,
    "gateway-2": 9479,
    "laptop": 9480,
}


@pytest.fixture(scope="module")
def whole() -> Iterator[Installation]:
    with Lab() as lab:
        installation = Installation(lab)
        installation.start_everything(large_file_bytes=1 << 20)
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
    wait_until(whole.fetch_page, what="the page arrives after the test", timeout_s=60)


def http_get(host: Host, port: int, path: str) -> tuple[int, str]:
    with host.connect(("127.0.0.1", port)) as stream:
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while piece := stream.recv(65_536):
            data += piece
    head, _, body = data.decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


# --- looking at the components -------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVABILITY)
def test_every_component_tells_its_health_its_readiness_and_its_metrics(
    it: Installation, name: str
) -> None:
    host, port = it.components[name].host, OBSERVABILITY[name]
    assert http_get(host, port, "/healthz")[0] == 200
    wait_until(lambda: http_get(host, port, "/readyz")[0] == 200, what="it is ready")
    assert json.loads(http_get(host, port, "/readyz")[1])["ready"] is True
    status, metrics = http_get(host, port, "/metrics")
    assert status == 200
    noun = {"portal": "api", "laptop": "client"}.get(name, name.partition("-")[0])
    assert f"\nholloway_{noun}_" in metrics
    assert http_get(host, port, "/nothing")[0] == 404


def test_an_agent_without_its_portal_is_healthy_and_not_ready(it: Installation) -> None:
    host, port = it.components["laptop"].host, OBSERVABILITY["laptop"]
    portal = it.components["portal"]
    portal.signal(signal.SIGTERM)
    assert portal.process is not None
    assert portal.process.wait(timeout=60) == 0
    wait_until(
        lambda: http_get(host, port, "/readyz")[0] == 503,
        what="the client says that it is not ready",
        timeout_s=90,
    )
    assert http_get(host, port, "/healthz")[0] == 200
    assert it.fetch_page()
    portal.start()
    it.wait_for_portal()
    it.wait_until_online(90)
    wait_until(lambda: http_get(host, port, "/readyz")[0] == 200, what="it is ready", timeout_s=60)


# --- the door of the control channel -------------------------------------------------------------

STRANGER = """
import sys, trio
from channel.listener import ALPN
from runtime.net.address import Address
from runtime.net.quic import connect_quic

async def main():
    async with connect_quic(Address(sys.argv[1], int(sys.argv[2])), server_name=sys.argv[1],
                            alpn=ALPN, verify=lambda chain: None) as connection:
        await connection.receive()  # the challenge
        connection.send(bytes.fromhex(sys.stdin.read()))
        said = b""
        with trio.fail_after(60):
            while piece := await connection.receive():
                said += piece
        sys.stdout.write(said.decode(errors="replace"))

trio.run(main)
"""


def tell_the_portal(it: Installation, data: bytes) -> str:
    """What the portal answers to a stranger who sends this on the control channel."""
    path = it.directory / "stranger.hex"
    path.write_text(data.hex())
    with path.open("rb") as stdin:
        process = it.relay_host.spawn(
            [sys.executable, "-c", STRANGER, PORTAL, str(CHANNEL_PORT)],
            stdin=stdin,
            stdout=-1,
            stderr=-1,
            cwd=ROOT,
        )
        said, failure = process.communicate(timeout=90)
    assert process.returncode == 0, failure.decode()
    return said.decode()


def frame(event: str, payload: object) -> bytes:
    data = json.dumps({"event": event, "payload": payload}).encode()
    return len(data).to_bytes(4, "big") + data


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ((10 << 20).to_bytes(4, "big") + bytes(70_000), "frame_too_large"),
        (b"GET / HTTP/1.1\r\n\r\n", "frame_too_large"),
        (b"\x00\x00\x00\x05hello", "frame_malformed"),
        (frame("join", [1, 2]), "message_malformed"),
        (frame("join", {"kind": "client", "token": 7}), "message_malformed"),
    ],
    ids=["ten_megabytes", "http", "no_json", "payload_of_another_type", "field_of_another_type"],
)
def test_a_malformed_frame_is_answered_with_a_code_logged_and_harms_nobody(
    it: Installation, data: bytes, code: str
) -> None:
    log = it.components["portal"].log
    begin = len(log.read_text())
    said = tell_the_portal(it, data)
    assert '"reason":"protocol_error"' in said
    assert code in said

    def logged() -> bool:
        lines = log.read_text()[begin:].splitlines()
        return any("protocol_error" in line and RELAY in line for line in lines)

    wait_until(logged, what="a line says so, and where the stranger sits")
    assert all(client["online"] for client in it.admin.call("GET", "/v1/clients")["items"])


def test_a_token_that_nobody_was_given_is_refused_by_name_and_logged(it: Installation) -> None:
    token = encode_token("client", UUID(int=7), b"\x07" * 32, f"{PORTAL}:{CHANNEL_PORT}", bytes(32))
    join = Join(
        kind="client",
        token=token.reveal_text(),
        device_key=bytes(32),
        signature=bytes(64),
        tunnel_key=bytes(32),
        name="intruder",
        incarnation=1,
    )
    log = it.components["portal"].log
    begin = len(log.read_text())
    said = tell_the_portal(it, encode_frame(join, limit=65_536))
    assert '"reason":"invalid_token"' in said

    def logged() -> bool:
        lines = log.read_text()[begin:].splitlines()
        return any("invalid_token" in line and RELAY in line for line in lines)

    wait_until(logged, what="a line says so, and where the stranger sits")
    assert token.reveal_text()[-60:] not in log.read_text() + said


def test_calls_that_the_api_refuses_leave_a_line_each(it: Installation) -> None:
    log = it.components["portal"].log
    begin = len(log.read_text())
    assert it.admin.try_call("POST", "/v1/groups", {"name": "x" * (10 << 20)})[0] == 413
    assert it.admin.try_call("POST", "/v1/groups", {"name": ["no", "text"]})[0] == 422

    def logged() -> list[str]:
        calls = [line for line in log.read_text()[begin:].splitlines() if "method=POST" in line]
        return [code for line in calls for code in ("413", "422") if f"status={code}" in line]

    wait_until(lambda: logged() == ["413", "422"], what="a line for each call")


def test_garbage_at_the_relay_is_counted(it: Installation) -> None:
    def dropped() -> float:
        _, metrics = http_get(it.relay_host, OBSERVABILITY["relay"], "/metrics")
        values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[:1] != "#")
        return sum(float(value) for name, value in values.items() if "dropped" in name)

    before = dropped()
    with it.portal_host.entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        for first in (0x00, 0x01, 0x40, 0x7F, 0xFF):
            sender.sendto(bytes([first]) * 60, (RELAY, 3478))
    wait_until(lambda: dropped() >= before + 5, what="they are counted")


# --- a relay that dies while it carries the traffic ---------------------------------------------


def test_a_relay_that_is_killed_under_a_relayed_session_carries_it_again(it: Installation) -> None:
    def kind() -> str:
        paths = [peer["path"] for peer in it.status().get("peers", []) if peer["path"]]
        return str(paths[0]["kind"]) if paths else ""

    it.set_nats("symmetric")
    wait_until(lambda: it.fetch_page(5) and kind() == "relayed", what="relayed", timeout_s=60)
    it.components["relay"].kill()
    assert not it.fetch_page(3)
    it.components["relay"].start()
    wait_until(lambda: it.fetch_page(5) and kind() == "relayed", what="again", timeout_s=90)
    it.set_nats("port_restricted")
    wait_until(lambda: it.fetch_page(5) and kind() == "direct", what="direct", timeout_s=120)
