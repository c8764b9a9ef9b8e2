"""The certificates that a TLS server presents, for who judges them himself."""

from __future__ import annotations

import ssl
import sys
from typing import Any, Final

from cryptography.x509 import Certificate, load_der_x509_certificate

_DER: Final = 2
"""`_ssl.ENCODING_DER`, of Python below 3.13."""


def chain_of(tls: ssl.SSLObject | ssl.SSLSocket) -> list[Certificate]:
    """The chain that the other side presented, its own certificate first; empty if there is no way
    to know, and whoever gets it trusts nobody then. Raises ValueError for certificates that cannot
    be read."""
    shown: Any
    if sys.version_info >= (3, 13):
        shown = tls.get_unverified_chain()
    else:
        shown = [each.public_bytes(_DER) for each in tls._sslobj.get_unverified_chain() or ()]  # type: ignore[union-attr]  # public from 3.13 on
    return [load_der_x509_certificate(each) for each in shown]
