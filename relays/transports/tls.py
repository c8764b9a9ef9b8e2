"""The relay's certificate: from files that may change while it runs, or made in memory.

`CertificateSource` holds the certificate that is shown now. Connections keep what they were made
with, so a new certificate ends none. Chain and key are read once and used from memory: files that
are replaced between two looks are never mixed, and what does not fit together is refused, while the
certificate before stays. Agents know a relay by its pin alone (`channel.messages.RelayServer`), so
without files a self-signed certificate of a key on P-256 serves, which nothing ever writes down.

TLS 1.3, and 1.2 with forward secrecy and authenticated encryption only (BCP 195, RFC 9325), since
clients of TURN are older than those of the web. No session is resumed: ticket keys of a process
that runs for months would undo the forward secrecy.
"""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import attrs
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from channel.credentials import pin_of
from runtime.secret import Secret
from runtime.service import SecretUnavailable, get_logger, read_secret

MAX_CHAIN_BYTES: Final = 64 * 1024
LOOK_S: Final = 5.0
"""How often the files of a certificate are looked at."""
ALPN: Final = ("stun.turn", "stun.nat-discovery")
"""RFC 7443. A client that offers neither, or nothing, is served too."""
CIPHERS_OF_TLS_1_2: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"

_SELF_SIGNED_LIFE: Final = timedelta(days=3650)

_log = get_logger("relay.certificate")


class CertificateError(ValueError):
    """There is no certificate to use; the message names the file and quotes nothing of it."""


@attrs.frozen(kw_only=True)
class Certificate:
    """A chain (PEM, the relay's own first) and its key (PEM). `pin`: SHA-256 of the
    SubjectPublicKeyInfo in hexadecimal, which the portal hands to agents."""

    chain: bytes = attrs.field(repr=False)
    key: Secret
    pin: str
    expires_at: datetime
    context: ssl.SSLContext = attrs.field(repr=False, eq=False)

    @classmethod
    def of(cls, chain: bytes, key: Secret) -> Certificate:
        """Raises CertificateError when the two do not belong together, or are none."""
        try:
            own = x509.load_pem_x509_certificates(chain)[0]
            context = _context(chain, key)
        except (ValueError, OSError) as error:  # an SSLError is an OSError
            reason = getattr(error, "reason", None) or "no certificate and key in PEM"
            raise CertificateError(str(reason).lower().replace("_", " ")) from None
        return cls(
            chain=chain,
            key=key,
            pin=pin_of(own).hex(),
            expires_at=own.not_valid_after_utc,
            context=context,
        )

    @classmethod
    def self_signed(cls, now: datetime) -> Certificate:
        """A new key and a certificate for it that is good for ten years."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "holloway relay")])
        made = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now.astimezone(UTC) - timedelta(days=1))
            .not_valid_after(now.astimezone(UTC) + _SELF_SIGNED_LIFE)
            .sign(key, SHA256())
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return cls.of(made.public_bytes(Encoding.PEM), Secret(pem))


class CertificateSource:
    """The certificate that the relay shows now: `current`. `chain_file` and `key_file` are both
    given or both None. Raises CertificateError, runtime.service.SecretUnavailable for the key."""

    def __init__(self, chain_file: Path | None, key_file: Path | None, now: datetime) -> None:
        self._files = None if chain_file is None or key_file is None else (chain_file, key_file)
        self._seen = self._signature()
        self.current = self._read() if self._files else Certificate.self_signed(now)
        self.refused = 0
        """How many new ones were refused."""

    @classmethod
    def given(cls, certificate: Certificate) -> CertificateSource:
        """One whose certificate somebody else looks after, who sets `current`."""
        made = cls.__new__(cls)
        made._files, made._seen = None, ()
        made.current, made.refused = certificate, 0
        return made

    @property
    def is_self_signed(self) -> bool:
        return self._files is None

    def look(self, *, again: bool = False) -> bool:
        """Use what the files hold now, if they changed or `again`; whether it is another
        certificate. One that cannot be used is logged, and the one before stays."""
        seen = self._signature()
        if self._files is None or (seen == self._seen and not again):
            return False
        self._seen = seen
        try:
            fresh = self._read()
        except (CertificateError, SecretUnavailable) as error:
            self.refused += 1
            _log.error("certificate_refused", reason=str(error), pin=self.current.pin)
            return False
        if fresh == self.current:
            return False
        self.current = fresh
        _log.info("certificate_renewed", pin=fresh.pin, expires_at=fresh.expires_at.isoformat())
        return True

    def _read(self) -> Certificate:
        assert self._files is not None
        chain_file, key_file = self._files
        try:
            with chain_file.open("rb") as opened:
                chain = opened.read(MAX_CHAIN_BYTES + 1)
        except OSError as error:
            raise CertificateError(f"tls_certificate: {chain_file}: {error.strerror}") from None
        if len(chain) > MAX_CHAIN_BYTES:
            raise CertificateError(f"tls_certificate: {chain_file} has over {MAX_CHAIN_BYTES} B")
        try:
            return Certificate.of(chain, read_secret(file=key_file))
        except CertificateError as error:
            raise CertificateError(f"tls_certificate, tls_key: {chain_file}: {error}") from None

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_signature_of(each) for each in self._files or ())


def _signature_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _context(chain: bytes, key: Secret) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS_OF_TLS_1_2)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.set_alpn_protocols(list(ALPN))
    # OpenSSL reads files alone: one that lies in memory and has no name.
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    with open(descriptor, "wb", buffering=0) as file:
        file.write(key.reveal() + b"\n" + chain)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=_no_password)
    return context


def _no_password() -> str:
    """For a key that is encrypted: nobody is there to be asked."""
    return ""
