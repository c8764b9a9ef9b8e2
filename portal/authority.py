"""The installation's own certificate authority, so that a portal needs no other.

How it works. The first start makes a P-256 key and a self-signed CA certificate of ten years. The
SHA-256 of its SubjectPublicKeyInfo (RFC 7469, section 2.4) is the *pin*, which travels inside
every token: an agent trusts a chain that contains the pinned CA. Server certificates live for
30 days, are sent with the CA behind them, and are made anew, with a new key, when a third of
their life is left or when the names change.

Everything lies in one directory of mode 0700, keys in files of mode 0600, each written beside its
place and renamed, so that a crash leaves the old file or the new one, never half of one:

    ca.pem  ca-key.pem          the authority; whoever has its key can be any portal
    server.pem  server-key.pem  the present server certificate with the CA behind it
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from channel.credentials import pin_of
from runtime.clock import Clock
from runtime.files import write_file
from runtime.randomness import Randomness

CA_LIFE: Final = timedelta(days=3650)
SERVER_LIFE: Final = timedelta(days=30)
RENEW_BEFORE_END: Final = timedelta(days=10)
CLOCK_TOLERANCE: Final = timedelta(days=1)
"""How far an agent's wall clock may be behind the portal's before it refuses a new certificate."""

MAX_NAMES: Final = 100


class AuthorityError(Exception):
    """The authority's files cannot be used; the message says which and why."""


@attrs.frozen(kw_only=True)
class ServerCertificate:
    """A server certificate with the CA behind it (PEM), its key (PEM, PKCS #8), and its end.

    `chain_file` and `key_file` hold the same and are replaced together at each renewal.
    """

    names: tuple[str, ...]
    chain_pem: bytes
    key_pem: bytes = attrs.field(repr=False)
    not_after: datetime
    chain_file: Path
    key_file: Path

    @property
    def renew_at(self) -> datetime:
        """From this instant on a successor should take its place."""
        return self.not_after - RENEW_BEFORE_END


class Authority:
    """The CA in `directory`; made there if the directory has none.

    Raises AuthorityError if a file is damaged, does not match its key, or if others than the
    owner may read a key. All methods are quick and synchronous; none waits for a network.
    """

    def __init__(self, directory: Path, *, clock: Clock, randomness: Randomness) -> None:
        self._directory = directory
        self._clock = clock
        self._randomness = randomness
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        if not self._path("ca-key.pem").exists() and not self._path("ca.pem").exists():
            write_file(
                self._path("ca-key.pem"),
                _key_pem(ec.generate_private_key(ec.SECP256R1())),
                mode=0o600,
            )
        self._key = _load_key(self._path("ca-key.pem"))
        if not self._path("ca.pem").exists():
            self._sign_itself()
        self.certificate = _load_chain(self._path("ca.pem"))[0]
        if _spki(self._key.public_key()) != _spki(self.certificate.public_key()):
            raise AuthorityError(f"{self._path('ca.pem')} does not belong to the CA's key")

    @property
    def pin(self) -> bytes:
        """SHA-256 of the CA's SubjectPublicKeyInfo, 32 bytes: what tokens carry."""
        return pin_of(self.certificate)

    @property
    def certificate_pem(self) -> bytes:
        """The CA's certificate, for `curl --cacert` and the like. Not a secret."""
        return self.certificate.public_bytes(Encoding.PEM)

    def server_certificate(self, names: Iterable[str]) -> ServerCertificate:
        """The certificate for these DNS names and IP addresses: the present one, if it has more
        than RENEW_BEFORE_END left and names the same; else a new one, with a new key.

        Raises ValueError for no name at all, more than MAX_NAMES, or one that is neither.
        """
        wanted = tuple(sorted({str(_subject_name(name).value) for name in names}))
        if not 1 <= len(wanted) <= MAX_NAMES:
            raise ValueError(f"a certificate names 1 to {MAX_NAMES} hosts, not {len(wanted)}")
        present = self._present(wanted)
        if present is not None and self._clock.utc_now() < present.renew_at:
            return present
        return self._issue(wanted)

    # --- below: how ---

    def _path(self, name: str) -> Path:
        return self._directory / name

    def _serial(self) -> int:
        return int.from_bytes(self._randomness.bytes(19), "big") | 1 << 150

    def _sign_itself(self) -> None:
        """The first start, or one after a crash within it: the pin is the key's, so it stays."""
        now = self._clock.utc_now()
        key = self._key
        label = self._randomness.bytes(4).hex()
        name = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, f"Holloway installation {label}")]
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(self._serial())
            .not_valid_before(now - CLOCK_TOLERANCE)
            .not_valid_after(now + CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        write_file(self._path("ca.pem"), certificate.public_bytes(Encoding.PEM), mode=0o600)

    def _issue(self, names: tuple[str, ...]) -> ServerCertificate:
        now = self._clock.utc_now()
        key = ec.generate_private_key(ec.SECP256R1())
        public_key = key.public_key()
        not_after = min(now + SERVER_LIFE, self.certificate.not_valid_after_utc)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Holloway portal")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(self._serial())
            .not_valid_before(now - CLOCK_TOLERANCE)
            .not_valid_after(not_after)
            .add_extension(
                x509.SubjectAlternativeName([_subject_name(name) for name in names]),
                critical=False,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        chain_pem = certificate.public_bytes(Encoding.PEM) + self.certificate_pem
        # A crash between these two leaves a pair that does not match: `_present` sees that.
        write_file(self._path("server-key.pem"), _key_pem(key), mode=0o600)
        write_file(self._path("server.pem"), chain_pem, mode=0o600)
        return self._describe(names, chain_pem, _key_pem(key), certificate)

    def _present(self, names: tuple[str, ...]) -> ServerCertificate | None:
        try:
            key = _load_key(self._path("server-key.pem"))
            certificate = _load_chain(self._path("server.pem"))[0]
            certificate.verify_directly_issued_by(self.certificate)
            alternatives = certificate.extensions.get_extension_for_class(
                x509.SubjectAlternativeName
            ).value
        except (AuthorityError, InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
            return None
        if _spki(key.public_key()) != _spki(certificate.public_key()):
            return None
        if tuple(sorted(str(name.value) for name in alternatives)) != names:
            return None
        chain_pem = certificate.public_bytes(Encoding.PEM) + self.certificate_pem
        return self._describe(names, chain_pem, _key_pem(key), certificate)

    def _describe(
        self,
        names: tuple[str, ...],
        chain_pem: bytes,
        key_pem: bytes,
        certificate: x509.Certificate,
    ) -> ServerCertificate:
        return ServerCertificate(
            names=names,
            chain_pem=chain_pem,
            key_pem=key_pem,
            not_after=certificate.not_valid_after_utc.astimezone(UTC),
            chain_file=self._path("server.pem"),
            key_file=self._path("server-key.pem"),
        )


def _subject_name(name: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        pass
    labels = name.lower().removesuffix(".").split(".")
    if len(name) > 253 or not all(_is_label(label) for label in labels):
        raise ValueError(f"{name!r} is neither a DNS name nor an IP address")
    return x509.DNSName(".".join(labels))


def _is_label(label: str) -> bool:
    plain = label.replace("-", "").replace("_", "")
    outer = label[:1] != "-" and label[-1:] != "-"
    return 1 <= len(label) <= 63 and outer and plain.isascii() and plain.isalnum()


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _spki(public_key: object) -> bytes:
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise AuthorityError("the authority's keys are P-256")
    return public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        if path.stat().st_mode & 0o077:
            raise AuthorityError(f"{path} may be read by others than its owner: chmod 600 it")
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise AuthorityError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError):
        raise AuthorityError(f"{path} holds no private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityError(f"{path} holds a key of another kind than P-256")
    return key


def _load_chain(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise AuthorityError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:
        raise AuthorityError(f"{path} holds no certificate") from None
