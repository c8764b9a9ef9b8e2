"""The relay as a process before foreign clients over TCP and TLS: coturn's turnutils, aioice and
OpenSSL; its certificate, its users and its end. Everything runs in namespaces with public-looking
addresses."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relays.client import Allocated
from runtime.net.address import Address
from runtime.net.tcp import connect_tcp
from tests.ports import free_port
from tests.system.relay_lab import (
    AUTHORITY,
    CLIENT,
    MESSAGES,
    PEER,
    RELAY,
    ROOT,
    Network,
    connection_of,
    echoing_peer,
    metrics,
    relay_network,
    relay_process,
    renew_certificate,
    running,
    wait_until,
)
from tests.system.stream_relay import StreamClient

pytestmark = pytest.mark.system

BINDING = b"\0\1\0\0\x21\x12\xa4\x42" + bytes(12)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with relay_network() as network:
        yield network


def tls_of(network: Network) -> ssl.SSLSocket:
    """A connection by the rules of the web: chain and name are checked."""
    context = ssl.create_default_context(cafile=str(network.authority))
    return context.wrap_socket(connection_of(network, 5349), server_hostname=RELAY)


def answers(stream: socket.socket) -> bool:
    stream.sendall(BINDING)
    return stream.recv(100)[:2] == b"\1\1"


def test_coturns_clients_talk_over_tcp_and_tls(network: Network) -> None:
    """Side by side. Over TCP nothing is lost. Over TLS this client takes what OpenSSL gives it for
    one message and overlooks others (with coturn's server too): nothing is lost where they come one
    by one, and otherwise the relay's figures count."""
    forms = {
        "channels over TCP": ("-t", "-y"),
        "indications over TCP": ("-t", "-y", "-s"),
        "a peer over TCP": ("-t", "-e", PEER),
        "more clients over TCP": ("-t", "-e", PEER, "-c", "-l", "180", "-m", "4"),
        "one by one over TLS": (
            "-S", "-t", "-p", "5349", "-e", PEER, "-c", "-z", "250", "-E", str(network.authority),
        ),
        "channels over TLS": ("-S", "-t", "-p", "5349", "-y"),
        "a peer over TLS": ("-S", "-t", "-p", "5349", "-e", PEER, "-c", "-s"),
    }  # fmt: skip
    with (
        relay_process(network),
        echoing_peer(network),
        contextlib.ExitStack() as stack,
    ):
        clients = {
            name: stack.enter_context(
                running(
                    network.client.spawn(
                        ["turnutils_uclient", "-L", CLIENT, *flags, "-u", "alice",
                         "-w", "opensesame", "-n", str(MESSAGES or 10), RELAY],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                    )
                )
            )
            for name, flags in forms.items()
        }  # fmt: skip
        passed_by_transport = {"tcp": 0, "tls": 0}
        for name, client in clients.items():
            output = client.communicate(timeout=90 + MESSAGES)[0].decode()
            told = re.search(r"tot_send_msgs=(\d+), tot_recv_msgs=(\d+)\n.*tot_send_bytes", output)
            assert told is not None, f"{name}:\n{output}"
            sent, received = int(told[1]), int(told[2])
            transport = "tls" if "-S" in forms[name] else "tcp"
            passed_by_transport[transport] += sent if "-y" in forms[name] else 2 * sent
            least = sent if transport == "tcp" or "-z" in forms[name] else 0.8 * sent
            assert received >= least > 0, f"{name}:\n{output}"
        seen = metrics(network)
        for transport, passed in passed_by_transport.items():
            assert seen[f'transport_packets_total{{transport="{transport}"}}'] == passed
            assert seen[f'errors_total{{code="401",transport="{transport}"}}'] > 0
            assert seen[f'connections_dropped_packets_total{{transport="{transport}"}}'] == 0
        assert seen["dropped_packets_total"] == 0
        wait_until(lambda: metrics(network)["allocations"] == 0, "all is given back")
        assert "opensesame" not in network.log.read_text()


@pytest.mark.parametrize("tls", [False, True])
def test_aioices_turn_client_gets_its_answer_on_a_stream(network: Network, tls: bool) -> None:
    script = f"""
import asyncio, ssl
from aioice import turn

class Receiver(asyncio.DatagramProtocol):
    def __init__(self):
        self.heard = asyncio.get_running_loop().create_future()
    def datagram_received(self, data, address):
        self.heard.set_result((data, address))

async def main():
    context = ssl.create_default_context(cafile={str(network.authority)!r})
    transport, receiver = await turn.create_turn_endpoint(
        Receiver, server_addr=({RELAY!r}, {5349 if tls else 3478}), username="alice",
        password="opensesame", transport="tcp", ssl=context if {tls} else False)
    transport.sendto(b"hello from aioice", ({PEER!r}, 3480))
    print(await asyncio.wait_for(receiver.heard, 20), transport.get_extra_info("sockname"))
    transport.close()
    await asyncio.sleep(0.5)
asyncio.run(main())
"""
    with (
        relay_process(network),
        echoing_peer(network),
    ):
        output = network.client.run(sys.executable, "-c", script, timeout_s=60)
        assert f"(b'hello from aioice', ({PEER!r}, 3480)) ({RELAY!r}," in output
        wait_until(lambda: metrics(network)["allocations"] == 0, "aioice has gone")


def test_openssl_is_content_with_the_certificate_and_the_protocol(network: Network) -> None:
    with relay_process(network):
        for flag, version in (("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2")):
            output = network.client.run(
                "openssl", "s_client", "-connect", f"{RELAY}:5349", flag, "-alpn", "stun.turn",
                "-CAfile", str(network.authority), "-verify_return_error",
                "-verify_ip", RELAY, "-no_ign_eof",
            )  # fmt: skip
            assert "Verify return code: 0 (ok)" in output
            assert "ALPN protocol: stun.turn" in output
            assert version in output
            assert "Secure Renegotiation IS NOT" not in output or version == "TLSv1.3"


@pytest.mark.parametrize("is_told", [True, False])
def test_a_certificate_is_renewed_while_connections_live(network: Network, is_told: bool) -> None:
    with relay_process(network) as process, tls_of(network) as before, tls_of(network) as other:
        assert answers(before)
        renew_certificate(network)
        if is_told:
            process.send_signal(signal.SIGHUP)
        wait_until(lambda: "certificate_renewed" in network.log.read_text(), "the new one is taken")
        with tls_of(network) as after:
            assert answers(after)
            assert after.getpeercert(True) != before.getpeercert(True)
        assert answers(before)
        assert answers(other)
        (network.folder / "key.pem").write_bytes(AUTHORITY.issue_pem(RELAY)[1])
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "certificate_refused" in network.log.read_text(), "it does not fit")
        with tls_of(network) as still:
            assert answers(still)
        assert metrics(network)["certificates_refused_total"] >= 1
        assert process.poll() is None
        assert "PRIVATE KEY" not in network.log.read_text()


def test_sigterm_ends_connections_when_the_time_is_over(network: Network) -> None:
    with relay_process(network, "--drain-timeout-s", "1") as process:
        argv = ["turnutils_uclient", "-t", "-L", CLIENT, "-e", PEER, "-u", "alice", "-w",
                "opensesame", "-n", "10000", RELAY]  # fmt: skip
        with running(network.client.spawn(argv, stdout=subprocess.DEVNULL)):
            wait_until(lambda: metrics(network)["allocations"] > 0, "a client is there")
            with connection_of(network, 3478) as idle:
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=20) == 0
                assert idle.recv(100) == b""


@pytest.mark.parametrize("way", ["variable", "file", "credential", "terminal"])
async def test_a_user_gets_in_whose_password_came_by_any_way(tmp_path: Path, way: str) -> None:
    password, port = tmp_path / "holloway-relay-password", free_port()
    password.touch(mode=0o600)
    password.write_text("opensesame\n")
    environment = {key: value for key, value in os.environ.items() if "HOLLOWAY" not in key}
    environment |= {
        "variable": {"HOLLOWAY_RELAY_PASSWORD": "opensesame"},
        "credential": {"CREDENTIALS_DIRECTORY": str(tmp_path)},
    }.get(way, {})
    terminal, its_end = pty.openpty()
    argv = [sys.executable, "-m", "holloway", "relay", "--standalone", "--user", "alice",
            "--listen", f"127.0.0.1:{port}", "--observability", "",
            *(("--password-file", str(password)) if way == "file" else ())]  # fmt: skip
    with (
        (tmp_path / "log").open("wb") as log,
        running(
            subprocess.Popen(
                argv, cwd=ROOT, env=environment, stdin=its_end, stderr=log, start_new_session=True
            )
        ),
    ):
        said = (tmp_path / "log").read_text
        if way == "terminal":
            wait_until(lambda: "Password of alice:" in said(), "it asks")
            os.write(terminal, b"opensesame\n")
        wait_until(lambda: said().count("listening") == 2, "the relay listens")
        async with await connect_tcp(Address("127.0.0.1", port)) as stream:
            await StreamClient(stream, Address("127.0.0.1", port)).event(Allocated)
        assert "opensesame" not in said()
    os.close(terminal)
    os.close(its_end)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--listen-tls", "127.0.0.1:0", "--tls-certificate", "/nonexistent", "--tls-key", "/x"),
            "tls_certificate: /nonexistent: No such file",
        ),
        (("--listen-tls", "192.0.2.99:5349"), "listen_tls"),
        (("--listen-tcp", "192.0.2.99:3478"), "listen_tcp"),
        (("--user", "bob", "--password-file", "/nonexistent"), "/nonexistent"),
        (("--user", "bob"), "no password is given"),
    ],
)
def test_what_cannot_serve_is_said_at_the_start(
    tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    users = tmp_path / "users"
    users.touch(mode=0o600)
    users.write_text("alice:opensesame\n")
    process = subprocess.run(
        [sys.executable, "-m", "holloway", "relay", "--standalone", "--listen", "127.0.0.1:0",
         "--users-file", str(users), "--observability", "", *flags],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 1
    assert said in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
