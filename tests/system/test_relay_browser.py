"""The relay as a process before a browser: two WebRTC peers in headless Chromium that may use
relayed addresses alone (`iceTransportPolicy: "relay"`), over UDP, TCP and TLS."""

from __future__ import annotations

import base64
import json
import queue
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.system.relay_lab import (
    RELAY,
    ROOT,
    Network,
    metrics,
    relay_network,
    relay_process,
    running,
)

pytestmark = pytest.mark.system

PAGE = ROOT / "tests/system/foreign/browser/peers.html"
TRANSPORT_BY_URL = {
    f"turn:{RELAY}:3478?transport=udp": "udp",
    f"turn:{RELAY}:3478?transport=tcp": "tcp",
    f"turns:{RELAY}:5349?transport=tcp": "tls",
}
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with relay_network() as network, relay_process(network):
        yield network


class Site:
    """What the browser's page comes from and reports to, on loopback beside the browser."""

    def __init__(self, network: Network) -> None:
        self.told: queue.Queue[dict[str, Any]] = queue.Queue()
        settings = {
            "urls": list(TRANSPORT_BY_URL), "username": "alice", "credential": "opensesame",
        }  # fmt: skip
        self._content = {
            "/": ("text/html", PAGE.read_bytes()),
            "/settings": ("application/json", json.dumps(settings).encode()),
        }
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(), False)
        self._server.socket.close()
        with network.client.entered():
            self._server.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}/"

    def hear(self, network: Network) -> dict[str, Any]:
        """What came of the next URL."""
        try:
            return self.told.get(timeout=PATIENCE_S)
        except queue.Empty:
            said = (network.folder / "chromium.log").read_text(errors="replace")
            raise AssertionError(f"the page said nothing:\n{said[-3000:]}") from None

    @contextmanager
    def open(self) -> Iterator[None]:
        with self._server:
            serving = threading.Thread(target=self._server.serve_forever)
            serving.start()
            try:
                yield
            finally:
                self._server.shutdown()
                serving.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind, body = site._content.get(self.path, ("text/plain", b""))
                self._answer(kind, body)

            def do_POST(self) -> None:
                site.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._answer("text/plain", b"")

            def _answer(self, kind: str, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def chromium(network: Network, address: str) -> Iterator[None]:
    """A browser that shows one page. It believes the relay's present certificate, and no other
    that its authorities do not know."""
    profile, log = network.folder / "profile", network.folder / "chromium.log"
    argv = [
        shutil.which("chromium") or "google-chrome",
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-quic", "--disable-dev-shm-usage", "--allow-loopback-in-peer-connection",
        f"--ignore-certificate-errors-spki-list={pin(network)}", f"--user-data-dir={profile}",
        address,
    ]  # fmt: skip
    with (
        log.open("wb") as output,
        running(
            network.client.spawn(
                argv, env={"HOME": str(network.folder)}, stdout=output, stderr=subprocess.STDOUT
            )
        ),
    ):
        yield


def pin(network: Network) -> str:
    """Of the certificate that the relay shows."""
    certificate = x509.load_pem_x509_certificate((network.folder / "chain.pem").read_bytes())
    hashed = Hash(SHA256())
    hashed.update(
        certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    return base64.b64encode(hashed.finalize()).decode()


def test_two_peers_in_chromium_talk_through_two_allocations_by_each_transport(
    network: Network,
) -> None:
    site = Site(network)
    with site.open(), chromium(network, site.address):
        all_told = [site.hear(network) for _ in TRANSPORT_BY_URL]
        standing = metrics(network)
    assert {told["url"] for told in all_told} == set(TRANSPORT_BY_URL)
    for told in all_told:
        transport = TRANSPORT_BY_URL[told["url"]]
        assert told.get("echoed") == 100, told
        for path in told["paths"]:
            assert path["kinds"] == ["relay", "relay"]
            assert path["hosts"] == [RELAY, RELAY]
            assert path["by"] == transport
            assert path["url"] == told["url"]
        assert standing[f'transport_allocations{{transport="{transport}"}}'] == 2
        assert standing[f'transport_packets_total{{transport="{transport}"}}'] > 200
