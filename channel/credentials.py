"""What proves who is who on the control channel and at a relay: exact bytes, nothing secret kept.

- A **token** enrols an agent: it carries the portal's address and the pin of its CA, so that an
  agent needs nothing else. The portal keeps only a hash.
- A **join statement** is what a device key signs, freshly for each connection.
- **TURN credentials** are made by the portal for one agent and one relay, and checked by the
  relay from the secret that it announced itself.
- A **pin** names the installation's CA, and `verify_portal` holds a presented chain against it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Final, Literal, get_args
from uuid import UUID

import attrs
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from nacl.exceptions import CryptoError
from nacl.signing import SigningKey, VerifyKey

from runtime.keyed_hash import hmac_sha256
from runtime.net.address import split_host_port
from runtime.randomness import Randomness
from runtime.secret import Secret

TokenKind = Literal["client", "gateway", "relay", "api", "operator"]
TOKEN_KINDS: Final[tuple[TokenKind, ...]] = get_args(TokenKind)
TOKEN_VERSION: Final = 1
SECRET_BYTES: Final = 32
TURN_USER_BYTES: Final = 12
PIN_BYTES: Final = 32
NONCE_BYTES: Final = 32
MAX_TOKEN_CHARACTERS: Final = 600
MAX_CHAIN_CERTIFICATES: Final = 8
DEFAULT_PORTAL_PORT: Final = 443

_MARK: Final = "hlw"
_TOKEN_FIXED_BYTES: Final = 1 + 16 + SECRET_BYTES + 1 + PIN_BYTES + 4
_MAX_UNIX_S: Final = 2**40


class InvalidToken(ValueError):
    """A text is no token. Says what is wrong with its form, never any of its content."""


class UntrustedPortal(Exception):
    """The certificates that a server presented do not prove that it is the portal."""


# --- tokens ------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class DecodedToken:
    """What a token says. Whether it is known and valid, only the portal can tell."""

    kind: TokenKind
    id: UUID
    secret: bytes = attrs.field(repr=False)
    portal: str
    pin: bytes

    @property
    def hash(self) -> bytes:
        """What the portal keeps of it (see `hash_token`)."""
        return hash_token(self.kind, self.id, self.secret)


def encode_token(kind: TokenKind, id: UUID, secret: bytes, portal: str, pin: bytes) -> Secret:
    """The text of a token.

    `secret` is 32 random bytes, `portal` is `host:port` (at most 255 bytes of ASCII), `pin` is
    `pin_of` the CA. Layout: `hlw_<kind>_` and then, in base64url without padding: version (1
    byte), id (16), secret (32), length of the portal's address (1), that address, pin (32),
    CRC-32 (4, big endian) over everything before it, `hlw_<kind>_` included.
    Raises ValueError.
    """
    if kind not in TOKEN_KINDS:
        raise ValueError(f"no such kind of token: {kind}")
    if len(secret) != SECRET_BYTES or len(pin) != PIN_BYTES:
        raise ValueError("secret and pin have 32 bytes each")
    split_host_port(portal)
    address = portal.encode("ascii")
    if len(address) > 255:
        raise ValueError("the portal's address is too long")
    prefix = f"{_MARK}_{kind}_"
    body = bytes([TOKEN_VERSION]) + id.bytes + secret + bytes([len(address)]) + address + pin
    checksum = zlib.crc32(prefix.encode() + body).to_bytes(4, "big")
    return Secret(prefix + _base64url(body + checksum))


def decode_token(text: str | Secret) -> DecodedToken:
    """The inverse of `encode_token`; white space around the text is allowed.

    Raises InvalidToken for anything that `encode_token` did not make, mistypings included.
    """
    if isinstance(text, Secret):
        try:
            text = text.reveal_text()
        except ValueError:
            raise InvalidToken("the token is not ASCII text: copy it again") from None
    text = text.strip()
    if len(text) > MAX_TOKEN_CHARACTERS:
        raise InvalidToken("the token is too long: copy it again")
    parts = text.split("_", 2)
    if len(parts) != 3 or parts[0] != _MARK or parts[1] not in TOKEN_KINDS:
        raise InvalidToken("the token does not begin with hlw_ and its kind: copy it again")
    kind: TokenKind = parts[1]
    data = _base64url_decode(parts[2])
    if data is None:
        raise InvalidToken("the token is mistyped or cut short: copy it again")
    if len(data) < _TOKEN_FIXED_BYTES or data[0] != TOKEN_VERSION:
        raise InvalidToken(
            "the token is cut short, or of a version unknown to this software: copy it again"
        )
    body, checksum = data[:-4], data[-4:]
    if zlib.crc32(f"{_MARK}_{kind}_".encode() + body).to_bytes(4, "big") != checksum:
        raise InvalidToken(
            "the token is mistyped or cut short (its checksum is wrong): copy it again"
        )
    address_length = data[49]
    if len(data) != _TOKEN_FIXED_BYTES + address_length:
        raise InvalidToken("the portal's address in the token has a wrong length: copy it again")
    try:
        portal = data[50 : 50 + address_length].decode("ascii")
        split_host_port(portal)
    except ValueError:
        raise InvalidToken(
            "the portal's address in the token is not host:port: copy it again"
        ) from None
    return DecodedToken(
        kind=kind,
        id=UUID(bytes=data[1:17]),
        secret=data[17:49],
        portal=portal,
        pin=data[50 + address_length : -4],
    )


def hash_token(kind: TokenKind, id: UUID, secret: bytes) -> bytes:
    """What the portal keeps of a token (32 bytes); compare it with `hmac.compare_digest`."""
    return hashlib.sha256(b"holloway/1 token" + kind.encode() + id.bytes + secret).digest()


# --- joining -----------------------------------------------------------------------------------


def join_statement(nonce: bytes, portal: str, token_id: UUID, tunnel_key: bytes) -> bytes:
    """What a device key signs to join: the portal's nonce (32 bytes) and name as its challenge
    gave them, the token's id and the agent's WireGuard public key (32 bytes).

    Every part but the name has a fixed length, so no two joins share a statement.
    Raises ValueError for another length.
    """
    if len(nonce) != NONCE_BYTES or len(tunnel_key) != 32:
        raise ValueError("nonce and tunnel key have 32 bytes each")
    return b"holloway/1 join" + nonce + portal.encode() + token_id.bytes + tunnel_key


def device_key_of(seed: bytes) -> bytes:
    """The public device key (Ed25519, 32 bytes) that belongs to a private seed (32 bytes)."""
    return bytes(SigningKey(seed).verify_key)


def sign_join(seed: bytes, statement: bytes) -> bytes:
    """The Ed25519 signature (64 bytes) of the device whose private seed (32 bytes) is given."""
    return SigningKey(seed).sign(statement).signature


def verify_join(device_key: bytes, signature: bytes, statement: bytes) -> bool:
    """Whether `signature` over `statement` was made by the owner of `device_key`."""
    try:
        VerifyKey(device_key).verify(statement, signature)
    except (CryptoError, ValueError, TypeError):
        return False
    return True


# --- relays ------------------------------------------------------------------------------------


def turn_username(expiry_unix_s: int, randomness: Randomness) -> str:
    """A TURN user name: the Unix time (seconds) at which it ends, a colon, 96 random bits."""
    return turn_username_of(expiry_unix_s, _base64url(randomness.bytes(TURN_USER_BYTES)))


def turn_username_of(expiry_unix_s: int, user: str) -> str:
    """The TURN user name of a `turn_user` (16 characters) that ends at this Unix time (seconds)."""
    if not 0 <= expiry_unix_s < _MAX_UNIX_S:
        raise ValueError("not a time in Unix seconds")
    return f"{expiry_unix_s}:{user}"


def turn_user(key: bytes, relay_id: UUID, agent_id: UUID, generation: int) -> str:
    """The random part of an agent's user names at one relay: 96 bits of HMAC-SHA-256 under a key
    that the portal alone has. So it can name them all without having kept any, and nobody else
    can tell whose they are. The next generation has nothing in common with the one before."""
    message = relay_id.bytes + agent_id.bytes + generation.to_bytes(8, "big")
    return _base64url(hmac_sha256(key, message)[:TURN_USER_BYTES])


def turn_expiry(username: str) -> int:
    """The Unix time (seconds) at which a user name of `turn_username` ends. Raises ValueError."""
    expiry, colon, random = username.partition(":")
    if not (colon and expiry.isascii() and expiry.isdigit() and 1 <= len(expiry) <= 13):
        raise ValueError("not a user name of this installation")
    noise = _base64url_decode(random)
    if noise is None or len(noise) != TURN_USER_BYTES or int(expiry) >= _MAX_UNIX_S:
        raise ValueError("not a user name of this installation")
    return int(expiry)


def turn_password(stamp_secret: bytes, relay_id: UUID, username: str) -> str:
    """The TURN password that belongs to a user name at one relay.

    base64url of HMAC-SHA-256, keyed by the relay's stamp secret (32 bytes), over
    "holloway/1 turn", a zero byte, the relay's id as text, a zero byte, the user name.
    """
    message = b"\0".join((b"holloway/1 turn", str(relay_id).encode(), username.encode()))
    return _base64url(hmac_sha256(stamp_secret, message))


# --- the portal's certificate ------------------------------------------------------------------


def pin_of(certificate: x509.Certificate) -> bytes:
    """SHA-256 (32 bytes) of a certificate's SubjectPublicKeyInfo in DER."""
    key = certificate.public_key()
    return hashlib.sha256(
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def verify_portal(
    chain: Sequence[x509.Certificate], *, pin: bytes, host: str, at: datetime
) -> None:
    """Check that a presented chain (leaf first) is the portal's.

    The CA that `pin` names has to be in the chain, so a server sends it along. It is then the
    only root from which the leaf may descend (RFC 5280, by cryptography's verifier, which wants
    the extensions of the web's profile: subjectAltName, key identifiers, basicConstraints),
    valid for a server, at the instant `at`, under the name `host` (a DNS name or an IP address).
    Raises UntrustedPortal.
    """
    if not 1 <= len(chain) <= MAX_CHAIN_CERTIFICATES:
        raise UntrustedPortal(f"{len(chain)} certificates presented")
    root = next((one for one in chain if hmac.compare_digest(_safe_pin(one), pin)), None)
    if root is None:
        raise UntrustedPortal("the certification authority is not the one that the token names")
    if root is chain[0]:
        raise UntrustedPortal("the server presented the authority itself as its certificate")
    intermediates = [one for one in chain[1:] if one is not root]
    builder = PolicyBuilder().store(Store([root])).time(at.astimezone(UTC).replace(tzinfo=None))
    try:
        verifier = builder.build_server_verifier(_subject(host))
        verifier.verify(chain[0], intermediates)
    except (VerificationError, ValueError, x509.UnsupportedGeneralNameType) as error:
        raise UntrustedPortal(f"the portal's certificate does not hold: {error}") from None


def _subject(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _safe_pin(certificate: x509.Certificate) -> bytes:
    """`pin_of`, or nothing for a key that cannot be read."""
    try:
        return pin_of(certificate)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UntrustedPortal("a certificate with a key that cannot be read") from error


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _base64url_decode(text: str) -> bytes | None:
    """None unless `text` is exactly what `_base64url` makes of some bytes."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return None
    return data if _base64url(data) == text else None
