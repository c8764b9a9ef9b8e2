"""Who belongs to a cluster: whoever knows its secret.

How it works. From the secret a certificate authority is derived, the same on every node: HKDF
(RFC 5869, SHA-256) gives the Ed25519 seed of its key, and all else in its certificate is fixed. At
each start a node makes a fresh key, and with the authority a certificate for its name. Links are
TLS 1.3 (RFC 8446) with certificates on both sides, so each proves to the other that it knows the
secret, and its name, before either reads a byte of the other's.

What it does not give. A node that knows the secret can take any name: the nodes of a cluster trust
each other. And whoever connects sees the certificate of the authority, against which guesses of the
secret can be tried at leisure: it must be random, not a word (`make_secret`). Certificates do not
end, since whoever could renew them could make them; to shut a node out, change the secret.
"""

from __future__ import annotations

import os
import re
import ssl
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from runtime.randomness import Randomness
from runtime.secret import Secret

MIN_SECRET_BYTES: Final = 32
MAX_SECRET_BYTES: Final = 1_024
MAX_NODE_NAME_CHARACTERS: Final = 63

_NODE_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_INFO: Final = b"cluster/1 authority"
_NAME_PREFIX: Final = "node:"
_BEGIN: Final = datetime(2020, 1, 1, tzinfo=UTC)
_END: Final = datetime(2120, 1, 1, tzinfo=UTC)


class MembershipError(Exception):
    """The other side did not prove that it belongs to the cluster, or is not who it should be."""


def make_secret(randomness: Randomness) -> Secret:
    """A new secret of a cluster: 64 hexadecimal digits."""
    return Secret(randomness.bytes(32).hex())


def check_node_name(name: str) -> str:
    """`name` if it can be that of a node: lower-case letters, digits, dots and hyphens, 1 to 63 of
    them. Raises ValueError."""
    if len(name) > MAX_NODE_NAME_CHARACTERS or _NODE_NAME.fullmatch(name) is None:
        raise ValueError(f"not the name of a node: {name[:80]!r}")
    return name


class Membership:
    """One node's proof that it belongs to the cluster, for one life of its process.

    Raises ValueError for a secret of less than MIN_SECRET_BYTES, or a name that is none."""

    def __init__(self, secret: Secret, node: str) -> None:
        self.node = check_node_name(node)
        authority_key = _authority_key(secret)
        authority = _authority_certificate(authority_key)
        key = Ed25519PrivateKey.generate()
        certificate = _node_certificate(node, key.public_key(), authority, authority_key)
        own = certificate.public_bytes(Encoding.PEM) + key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        trusted = authority.public_bytes(Encoding.PEM).decode()
        self.server = _context(ssl.PROTOCOL_TLS_SERVER, trusted, own)
        self.server.num_tickets = 0  # no resumption: each link proves membership anew
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, trusted, own)

    def __repr__(self) -> str:
        return f"<Membership of {self.node}>"


def peer_name(certificate: object) -> str:
    """The node's name in a verified certificate, as `SSLObject.getpeercert()` gives it. Raises
    MembershipError."""
    names = certificate.get("subjectAltName", ()) if isinstance(certificate, dict) else ()
    found = [
        value.removeprefix(_NAME_PREFIX)
        for kind, value in names
        if kind == "URI" and value.startswith(_NAME_PREFIX)
    ]
    if len(found) != 1:
        raise MembershipError("the certificate names no node")
    try:
        return check_node_name(found[0])
    except ValueError as error:
        raise MembershipError(str(error)) from None


def authority_fingerprint(secret: Secret) -> bytes:
    """SHA-256 of the derived authority's certificate; the same wherever the secret is. Not for
    show: secrets can be guessed against it."""
    return _authority_certificate(_authority_key(secret)).fingerprint(hashes.SHA256())


def _authority_key(secret: Secret) -> Ed25519PrivateKey:
    content = secret.reveal()
    if not MIN_SECRET_BYTES <= len(content) <= MAX_SECRET_BYTES:
        raise ValueError(
            f"a cluster secret has {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, at random"
        )
    derivation = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_INFO)
    return Ed25519PrivateKey.from_private_bytes(derivation.derive(content))


def _authority_certificate(key: Ed25519PrivateKey) -> x509.Certificate:
    """The same bytes from the same key: everything is fixed, and Ed25519 signs without chance."""
    name = _name("cluster authority")
    return (
        _certificate(name, name, key.public_key(), key.public_key(), serial=1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, None)
    )


def _node_certificate(
    node: str, key: Ed25519PublicKey, authority: x509.Certificate, authority_key: Ed25519PrivateKey
) -> x509.Certificate:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_NAME_PREFIX + node)])
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    serial = x509.random_serial_number()
    issuer = authority_key.public_key()
    return (
        _certificate(_name(node), authority.subject, key, issuer, serial=serial)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(names, critical=False)
        .sign(authority_key, None)
    )


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: Ed25519PublicKey,
    issuer_key: Ed25519PublicKey,
    *,
    serial: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _context(protocol: int, trusted: str, own: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # nodes have names of their own: see peer_name
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=trusted)
    # The ssl module takes a key from a file only: give it one that never touches a disk.
    descriptor = os.memfd_create("node-certificate")
    try:
        view = memoryview(own)
        while view:
            view = view[os.write(descriptor, view) :]
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context
