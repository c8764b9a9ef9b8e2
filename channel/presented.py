"""The certificates that a TLS server over TCP presents, for who judges them himself."""

from __future__ import annotations

import socket
import ssl

from cryptography import x509

from runtime.net.presented import chain_of


def presented_chain(host: str, port: int, *, timeout_s: float) -> list[x509.Certificate]:
    """The chain (leaf first) that a server presents, whoever it is; nothing is sent to it but the
    handshake. What speaks for the chain is yet to be found: see `credentials.verify_portal`.

    Blocks for `timeout_s` for each address that the host has, and for the handshake. Raises
    OSError, and ValueError for certificates that cannot be read.
    """
    anybody = ssl.create_default_context()
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection((host, port), timeout=timeout_s) as raw,
        anybody.wrap_socket(raw, server_hostname=host) as tls,
    ):
        return chain_of(tls)
