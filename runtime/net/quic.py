"""QUIC under trio: each connection is one bidirectional byte stream, bounded in both directions.

The protocol is aioquic's, used as a core: bytes and times go in, datagrams come out. This file
is the shell around it. An *endpoint* owns one UDP socket and steps the connections that live on
it; `QuicListener` is an endpoint that accepts, `connect_quic` one with a single connection.

What is decided here:

- **One stream**, opened by the server, which speaks first, or with `client_opens` by the client.
  Another one is a violation. Beside it, where `carries_datagrams` says so, DATAGRAM frames.
- **Receiving is bounded.** aioquic raises a stream's limit when bytes arrive, whether or not
  anybody reads them, and so lets a peer fill the memory. Here the limit follows what was read.
- **Sending is bounded.** `send` never waits and says no when too much is under way; `send_all`
  waits for room.
- **Addresses are validated.** Above a number of unfinished handshakes, clients prove their
  address first (Retry, RFC 9000, section 8.1.2). `remote` is always a validated path; a client
  whose address changed is followed once the new path has answered (section 9.3).
- **A stranger is sent away.** A packet of a connection that this process does not know (it was
  restarted) is answered by a stateless reset (section 10.3), so that the client need not wait
  for its idle timeout.
- **A closed port is a hint.** When the server's process died, its machine answers the client's next
  datagram by ICMP. That can be forged, so the client asks the server itself for a second, eight
  times, and any packet of the server's keeps the connection (`runtime.net.quic_suspicion`); a dial
  alone ends by two refusals. The socket is not connected for this (`connect` would fix its source
  address, and with it the network that the client is in): it keeps ICMP errors by IP_RECVERR.
- **A keepalive is no QUIC.** A client that is idle sends nothing that could be refused. One byte,
  which a server's kernel drops by its length, draws the refusal and costs the server nothing
  (`QuicConnection.keepalive`, and `least_bytes` of the listener's socket).
- **No 0-RTT and no resumption**: nothing is sent before the server's chain was checked.

What reaches into aioquic for that is in `runtime.net.quic_core` and `runtime.net.quic_short`.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio
from aioquic.quic.configuration import QuicConfiguration
from aioquic.tls import load_pem_private_key, load_pem_x509_certificates
from cryptography.x509 import Certificate

from runtime.net.address import Address
from runtime.net.quic_connection import (
    BAD_CERTIFICATE,
    CONNECTION_REFUSED,
    HANDSHAKE_TIMEOUT,
    IDLE_TIMEOUT,
    PORT_CLOSED,
    STATELESS_RESET,
    QuicClosed,
    QuicConnection,
)
from runtime.net.quic_core import LEAST_DATAGRAM_BYTES, QuicLimits, make_configuration
from runtime.net.quic_endpoint import ClientEndpoint, QuicListenerStatistics, ServerEndpoint
from runtime.net.tcp import route_to
from runtime.net.udp import UdpSocket
from runtime.nursery import beside

__all__ = [
    "BAD_CERTIFICATE",
    "CONNECTION_REFUSED",
    "HANDSHAKE_TIMEOUT",
    "IDLE_TIMEOUT",
    "LEAST_DATAGRAM_BYTES",
    "PORT_CLOSED",
    "STATELESS_RESET",
    "QuicClosed",
    "QuicConnection",
    "QuicLimits",
    "QuicListener",
    "QuicListenerStatistics",
    "connect_quic",
]


class QuicListener:
    """Accepts connections on one UDP socket, which may drop what is below LEAST_DATAGRAM_BYTES.

    `certificate_chain_pem` (the server's own first, and every CA that clients should see) and
    `key_pem` serve new connections until `replace_certificate`. `alpn` is the one protocol
    spoken. `reset_key` (secret) makes the tokens of stateless resets: with the same key after a
    restart, clients of the former process learn at once that it is gone.
    Raises ValueError for certificates or a key that cannot be read.
    """

    def __init__(
        self,
        udp: UdpSocket,
        *,
        certificate_chain_pem: bytes,
        key_pem: bytes,
        alpn: str,
        limits: QuicLimits | None = None,
        reset_key: bytes | None = None,
    ) -> None:
        self.limits = limits or QuicLimits()
        self._alpn = alpn
        self._configuration = self._configure(certificate_chain_pem, key_pem)
        self._endpoint = ServerEndpoint(
            udp, self.limits, lambda: self._configuration, reset_key or os.urandom(32)
        )

    @property
    def address(self) -> Address:
        """Where the listener is bound, with its real port."""
        return self._endpoint.socket.local_address

    def replace_certificate(self, certificate_chain_pem: bytes, key_pem: bytes) -> None:
        """Use another certificate from now on; live connections keep theirs."""
        self._configuration = self._configure(certificate_chain_pem, key_pem)

    async def serve(
        self,
        handler: Callable[[QuicConnection], Awaitable[object]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run `handler` as a task for each connection whose handshake is complete, for ever.

        A connection is closed when its handler returns. A handler must not raise. Cancelled, it
        closes every connection, and the socket.
        """
        serving = trio.CancelScope(shield=True)

        async def run_endpoint() -> None:
            with serving:
                await self._endpoint.run()

        async def handle(connection: QuicConnection) -> None:
            try:
                await handler(connection)
            finally:
                connection.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_endpoint)
            # The endpoint ends last, so that handlers which are cancelled can still say why.
            try:
                async with trio.open_nursery() as handlers:
                    self._endpoint.accepted = lambda one: handlers.start_soon(handle, one)
                    task_status.started()
                    await trio.sleep_forever()
            finally:
                self._endpoint.accepted = QuicConnection.close
                serving.cancel()

    def statistics(self) -> QuicListenerStatistics:
        return self._endpoint.statistics()

    def _configure(self, chain_pem: bytes, key_pem: bytes) -> QuicConfiguration:
        chain = load_pem_x509_certificates(chain_pem)
        if not chain:
            raise ValueError("no certificate in the chain")
        configuration = make_configuration(self.limits, self._alpn, is_client=False)
        configuration.certificate = chain[0]
        configuration.certificate_chain = chain[1:]
        configuration.private_key = load_pem_private_key(key_pem)
        return configuration


@asynccontextmanager
async def connect_quic(
    remote: Address,
    *,
    server_name: str,
    alpn: str,
    verify: Callable[[Sequence[Certificate]], None],
    limits: QuicLimits | None = None,
    mark: int | None = None,
    source: str | None = None,
) -> AsyncIterator[QuicConnection]:
    """Connect to a server; within the block the connection stands, after it it is closed.

    `verify` gets the server's chain (its possession of the key is proved by then) before
    anything but the handshake is sent, and raises to refuse it: that exception is raised here.
    `server_name` is sent as SNI unless it is an IP address. `mark` is the socket's SO_MARK,
    `source` the address of this machine to dial from, if it is not the kernel's to choose.
    Raises QuicClosed when the handshake fails or takes longer than its timeout, OSError when no
    socket can be had, or no route. What the block raises is not wrapped in a group.
    """
    limits = limits or QuicLimits()
    configuration = make_configuration(limits, alpn, is_client=True)
    configuration.server_name = server_name
    route_to(remote, mark)  # without one it raises at once, instead of after a timeout
    configuration.verify_mode = ssl.CERT_NONE  # `verify` decides
    any_host = "::" if ":" in remote.host else "0.0.0.0"  # noqa: S104  # the kernel chooses
    local = Address(source or any_host, 0)
    udp = UdpSocket.bind(local, mark=mark, dont_fragment=True, tell_refusals=True)
    endpoint = ClientEndpoint(udp, limits, configuration, remote, verify)
    async with beside(endpoint.run):
        try:
            yield await endpoint.wait_established()
        finally:
            endpoint.connection.close()
            endpoint.flush()
