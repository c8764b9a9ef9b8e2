"""TLS over TCP under trio for clients that judge the server themselves.

OpenSSL is told to check nothing but that the server has the key of the certificate that it shows
(CertificateVerify); `verify` gets the chain and decides, in the same step in which OpenSSL would,
so not even the client's Finished is sent to a server that is refused. Python shows the chain by a
public method from 3.13 on, before by a private one (`runtime.net.presented`); without either
nothing is trusted. TLS 1.3 alone, no session is
resumed, and nothing is sent early.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence

import trio
from cryptography.x509 import Certificate

from runtime.net.presented import chain_of

TlsStream = trio.SSLStream[trio.SocketStream]
Verify = Callable[[Sequence[Certificate]], None]


class TlsFailed(Exception):
    """The handshake did not succeed; the text says why."""


def judging_client(
    tcp: trio.SocketStream, *, server_name: str | None, verify: Verify, alpn: str
) -> TlsStream:
    """A client's end of TLS over `tcp`, before its handshake. `verify` gets the server's chain,
    its own certificate first, which is empty where it cannot be read, and raises to refuse it.
    `server_name` is sent as SNI unless it is an IP address. Raises TlsFailed for a name that TLS
    does not take."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # `verify` decides
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.set_alpn_protocols([alpn])

    class Judging(ssl.SSLObject):
        """Has the chain judged as soon as the server has proved that it has its key."""

        def do_handshake(self) -> None:
            super().do_handshake()
            verify(_peer_chain(self))

    context.sslobject_class = Judging
    try:
        return trio.SSLStream(tcp, context, server_hostname=server_name, https_compatible=True)
    except ValueError as error:
        raise TlsFailed(f"{server_name}: {error}") from None


async def shake_hands(stream: TlsStream) -> None:
    """Raises TlsFailed, and what the `verify` of a client raised."""
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        why = getattr(cause, "reason", None) or str(cause or "the connection broke")
        raise TlsFailed(f"no TLS: {why}") from None


def _peer_chain(tls: ssl.SSLObject) -> list[Certificate]:
    """As `chain_of`, and empty where a certificate of it cannot be read."""
    try:
        return chain_of(tls)
    except ValueError:
        return []
