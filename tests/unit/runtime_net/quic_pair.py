"""Two ends of a QUIC connection that pass datagrams to each other in memory."""

from __future__ import annotations

import random
import ssl

import attrs
from aioquic.buffer import Buffer
from aioquic.quic.events import HandshakeCompleted
from aioquic.quic.packet import pull_quic_header
from aioquic.quic.stream import QuicStream
from aioquic.tls import load_pem_private_key, load_pem_x509_certificates

from runtime.net.quic_core import QuicCore, QuicLimits, make_configuration
from runtime.net.quic_short import CID_BYTES
from tests.unit.channel.certificates import Authority

CHAIN, KEY = Authority("core").issue_pem("localhost")
CLIENT, SERVER = ("192.0.2.1", 1), ("192.0.2.2", 2)
LIMITS = QuicLimits()


@attrs.define
class Pair:
    """Both ends of a connection, and the time; `stream` is that of the server."""

    client: QuicCore
    server: QuicCore
    now: float = 0.0
    stream: QuicStream | None = None

    @classmethod
    def made(cls, kind: type[QuicCore] = QuicCore) -> Pair:
        configuration = make_configuration(LIMITS, "test/1", is_client=True)
        configuration.verify_mode = ssl.CERT_NONE
        client = kind(configuration, LIMITS.receive_window_bytes)
        client.connect(SERVER, 0.0)
        first = client.datagrams_to_send(0.0)
        header = pull_quic_header(Buffer(data=first[0][0]), host_cid_length=CID_BYTES)
        configuration = make_configuration(LIMITS, "test/1", is_client=False)
        chain = load_pem_x509_certificates(CHAIN)
        configuration.certificate, configuration.certificate_chain = chain[0], chain[1:]
        configuration.private_key = load_pem_private_key(KEY)
        server = kind(
            configuration,
            LIMITS.receive_window_bytes,
            lambda cid: bytes(16),
            header.destination_cid,
        )
        pair = cls(client, server)
        for data, _ in first:
            server.receive_datagram(data, CLIENT, 0.0)
        return pair

    def exchange(self, lost: random.Random | None = None) -> None:
        """Pass what is to be sent, back and forth, until both have nothing more; some of it is
        lost. Timers fire as they are due."""
        for _ in range(8):
            self.now += 0.03
            for sender, receiver, address in (
                (self.client, self.server, CLIENT),
                (self.server, self.client, SERVER),
            ):
                timer = sender.get_timer()
                if timer is not None and timer <= self.now:
                    sender.handle_timer(self.now)
                for data, _ in sender.datagrams_to_send(self.now):
                    if lost is None or lost.random() > 0.2:
                        receiver.receive_datagram(data, address, self.now)

    def establish(self) -> None:
        for _ in range(3):
            self.exchange()
        for core in (self.client, self.server):
            completed = 0
            while (event := core.next_event()) is not None:
                completed += isinstance(event, HandshakeCompleted)
            assert completed == 1
            core.forget_handshake()
        self.stream = self.server.open_stream()
