"""The certificates that a TLS server over TCP presents, for who judges them himself."""

from __future__ import annotations

import socket
import ssl
from typing import Any

from cryptography import x509


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
        # Public as `get_unverified_chain` of the socket from Python 3.13 on.
        inner: Any = getattr(tls, "_sslobj", None)
        presented = inner.get_unverified_chain() or ()
        ders = [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in presented]
    return [x509.load_der_x509_certificate(der) for der in ders]
