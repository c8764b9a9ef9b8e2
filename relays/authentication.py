"""Long-term credentials (RFC 8489, section 9.2): the half of the client and that of the server.

A server answers the first request with 401, its realm and a nonce; the client repeats the request
with user name, realm, nonce and an integrity attribute whose key is made from the password. With
the nonce cookie "obMatJos2…" the server announces that it knows PASSWORD-ALGORITHMS, and both
then use SHA-256; without the cookie both are of the old kind, MD5 and HMAC-SHA1.
"""

from __future__ import annotations

import hmac
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2s
from typing import Final, NamedTuple, Protocol
from uuid import UUID

from channel.credentials import turn_expiry, turn_password
from relays.stun import (
    Attribute,
    Integrity,
    MessageClass,
    Method,
    PasswordAlgorithm,
    StunError,
    StunMessage,
    encode_attributes,
    encode_message,
    error_value,
    long_term_key,
    message_size,
    password_algorithms_value,
)
from relays.stun import user_hash as compute_user_hash
from relays.turn import FEATURE_PASSWORD_ALGORITHMS, NS, nonce_cookie, nonce_features
from runtime.keyed_hash import HmacSha256

NONCE_LIFETIME_NS: Final = 3600 * NS
GRACE_S: Final = 3600
MAX_REVOKED: Final = 65_536
MAX_CACHED_KEYS: Final = 4096

# As plain numbers: naming a member of an enum costs more than looking its value up (Python 3.11).
_USERNAME: Final = int(Attribute.USERNAME)
_USERHASH: Final = int(Attribute.USERHASH)
_REALM: Final = int(Attribute.REALM)
_NONCE: Final = int(Attribute.NONCE)
_CHOSEN: Final = int(Attribute.PASSWORD_ALGORITHM)
_OFFERED: Final = int(Attribute.PASSWORD_ALGORITHMS)

_NONCE_UNIT_NS: Final = 16 * NS
_STAMP_BYTES: Final = 3
_STAMP_CHARACTERS: Final = 4
_SEAL_BYTES: Final = 8


class ClientCredentials:
    """What a client knows of its credentials and of the server's last challenge.

    `key` is None until there was a challenge. Neither password nor key is ever printed.
    """

    def __init__(self, *, username: str, password: str) -> None:
        self.key: bytes | None = None
        self.integrity = Integrity.SHA1
        self._username = username
        self._password = password
        self._realm = ""
        self._nonce = ""
        self._offered: tuple[int, ...] = ()
        self._algorithm = PasswordAlgorithm.MD5
        self._only_realm: str | None = None

    def go_elsewhere(self) -> None:
        """Another server is asked from now on: begin anew, and be good in the same realm only
        (RFC 8489, section 10)."""
        self._only_realm = self._realm
        self.key = None

    def learn(self, challenge: StunMessage) -> bool:
        """Take realm, nonce and algorithm from an error response 401 or 438.

        False: the server offers no algorithm that is known here, or somebody in between took its
        offer out (the cookie in the nonce says that there was one), or it is one of another realm
        to which we were sent. Raises StunError.
        """
        realm, nonce = challenge.text(Attribute.REALM), challenge.text(Attribute.NONCE)
        offered = challenge.password_algorithms(Attribute.PASSWORD_ALGORITHMS)
        if nonce is None or (realm is None and self.key is None):
            raise StunError("a challenge without realm or nonce")
        is_modern = bool(nonce_features(nonce) & FEATURE_PASSWORD_ALGORITHMS)
        algorithm = _strongest(offered) if is_modern else PasswordAlgorithm.MD5
        if algorithm is None or self._only_realm not in (None, realm or self._realm):
            return False
        self._realm, self._nonce = realm or self._realm, nonce
        self._offered, self._algorithm = offered, algorithm
        self.integrity = Integrity.SHA256 if is_modern else Integrity.SHA1
        self.key = long_term_key(algorithm, self._username, self._realm, self._password)
        return True

    def attributes(self) -> list[tuple[int, bytes]]:
        """What goes into a request before its integrity attribute; nothing before a challenge."""
        if self.key is None:
            return []
        attributes: list[tuple[int, bytes]] = [
            (Attribute.USERNAME, self._username.encode()),
            (Attribute.REALM, self._realm.encode()),
            (Attribute.NONCE, self._nonce.encode()),
        ]
        if self.integrity is Integrity.SHA256:
            offered = password_algorithms_value(*self._offered)
            attributes.append((Attribute.PASSWORD_ALGORITHMS, offered))
            chosen = password_algorithms_value(self._algorithm)
            attributes.append((Attribute.PASSWORD_ALGORITHM, chosen))
        return attributes


def _strongest(offered: tuple[int, ...]) -> PasswordAlgorithm | None:
    for algorithm in (PasswordAlgorithm.SHA256, PasswordAlgorithm.MD5):
        if algorithm in offered:
            return algorithm
    return None


# --- the server's half -------------------------------------------------------------------------


class Credentials(Protocol):
    """Where a relay finds passwords."""

    @property
    def algorithms(self) -> tuple[PasswordAlgorithm, ...]:
        """Those that are offered, the best one first."""

    def password(self, username: str, unix_s: int, *, beginning: bool) -> str | None:
        """The password of `username`, None if there is none (any more); an allocation that is
        not `beginning` but stands is kept for a while longer."""

    def username_of(self, user_hash: bytes, realm: str) -> str | None:
        """The user name behind a USERHASH, where names are known beforehand."""


class StampedCredentials:
    """Time-limited user names whose passwords follow from the relay's stamp secret.

    `relay_id` is known once the portal has greeted the relay; until then nobody gets in. After
    its expiry a user name begins nothing, and GRACE_S later it keeps nothing alive either: who is
    entitled has had newer ones for a day by then.
    """

    algorithms: tuple[PasswordAlgorithm, ...] = (PasswordAlgorithm.SHA256,)

    def __init__(
        self, stamp_secret: bytes, *, revoked_until: Mapping[str, int] | None = None
    ) -> None:
        self._stamp_secret = stamp_secret
        self._revoked_until: dict[str, int] = dict(revoked_until or {})
        self.relay_id: UUID | None = None

    def reveal_stamp_secret(self) -> bytes:
        """For another process of this relay, and nobody else."""
        return self._stamp_secret

    def revoke(self, user: str, *, until_unix_s: int, unix_s: int) -> None:
        """No user name that ends in `user` is good any more. It is remembered until
        `until_unix_s`, when all of them have expired; of more than MAX_REVOKED the oldest go."""
        revoked = self._revoked_until
        if len(revoked) >= MAX_REVOKED:
            for one in [one for one, until in revoked.items() if until <= unix_s]:
                del revoked[one]
            if len(revoked) >= MAX_REVOKED:
                del revoked[next(iter(revoked))]
        revoked[user] = until_unix_s

    @property
    def revoked_until(self) -> dict[str, int]:
        """Users whose names are void, and until when (Unix time); a copy."""
        return dict(self._revoked_until)

    @property
    def revoked_users(self) -> int:
        """How many are remembered."""
        return len(self._revoked_until)

    def password(self, username: str, unix_s: int, *, beginning: bool) -> str | None:
        if self.relay_id is None:
            return None
        try:
            expiry = turn_expiry(username)
        except ValueError:
            return None
        if expiry + (0 if beginning else GRACE_S) <= unix_s:
            return None
        if username.partition(":")[2] in self._revoked_until:
            return None
        return turn_password(self._stamp_secret, self.relay_id, username)

    def username_of(self, user_hash: bytes, realm: str) -> str | None:
        return None


class StaticCredentials:
    """User names and passwords from a list, for a relay that stands alone. Never prints them."""

    algorithms: tuple[PasswordAlgorithm, ...] = (PasswordAlgorithm.SHA256, PasswordAlgorithm.MD5)

    def __init__(self, password_by_username: Mapping[str, str]) -> None:
        self._password_by_username = dict(password_by_username)

    def reveal_passwords(self) -> dict[str, str]:
        """For another process of this relay, and nobody else."""
        return dict(self._password_by_username)

    def password(self, username: str, unix_s: int, *, beginning: bool) -> str | None:
        return self._password_by_username.get(username)

    def username_of(self, user_hash: bytes, realm: str) -> str | None:
        for username in self._password_by_username:
            if hmac.compare_digest(compute_user_hash(username, realm), user_hash):
                return username
        return None


class Identity(NamedTuple):
    """Who sent a request; the answer is protected with the same key and attribute."""

    username: str
    key: bytes | HmacSha256
    integrity: Integrity

    def __repr__(self) -> str:
        return f"Identity({self.username!r})"


def _key(
    integrity: Integrity, algorithm: PasswordAlgorithm, username: str, realm: str, password: str
) -> bytes | HmacSha256:
    key = long_term_key(algorithm, username, realm, password)
    return HmacSha256(key) if integrity is Integrity.SHA256 else key


class Authenticator:
    """Judges requests and makes challenges. A core: `now` in nanoseconds, `unix_s` in seconds.

    The keys of the last MAX_CACHED_KEYS users are kept, found by their passwords too: whether
    there is (still) such a password is asked each time.
    """

    def __init__(
        self,
        *,
        credentials: Credentials,
        realm: str,
        nonce_key: bytes,
        software: tuple[tuple[int, bytes], ...] = (),
    ) -> None:
        self._credentials = credentials
        self._realm = realm
        self._nonce_key = nonce_key
        self._offer = password_algorithms_value(*credentials.algorithms)
        self._algorithm_by_value = {
            password_algorithms_value(one): one for one in credentials.algorithms
        }
        self._cookie = nonce_cookie(FEATURE_PASSWORD_ALGORITHMS)
        self._cookie_bytes = self._cookie.encode()
        self._key = lru_cache(MAX_CACHED_KEYS)(_key)
        # What a challenge says, before and behind the nonce.
        self._before = {
            code: encode_attributes(
                ((Attribute.ERROR_CODE, error_value(code)), (Attribute.REALM, realm.encode()))
            )
            for code in (401, 438)
        }
        self._behind = encode_attributes(((Attribute.PASSWORD_ALGORITHMS, self._offer),))
        self._software = encode_attributes(software)

    def judge(
        self, message: StunMessage, source: tuple[str, int], now: int, unix_s: int
    ) -> Identity | int:
        """Who sent this request, or the error code: 400, 401 or 438, in the order of section
        9.2.4. Raises StunError for malformed attributes."""
        is_sha256 = message.has_integrity(Integrity.SHA256)
        if not is_sha256 and not message.has_integrity(Integrity.SHA1):
            return 401
        username = self._username(message)
        nonce, realm = message.text(_NONCE), message.text(_REALM)
        has_name = username is not None or Attribute.USERHASH in message
        if not has_name or nonce is None or realm is None:
            return 400
        algorithm = self._algorithm(message, nonce)
        if algorithm is None:
            return 400
        if username is None or realm != self._realm:
            return 401
        if algorithm not in self._credentials.algorithms:
            return 401
        password = self._credentials.password(
            username, unix_s, beginning=message.method == Method.ALLOCATE
        )
        if password is None:
            return 401
        integrity = Integrity.SHA256 if is_sha256 else Integrity.SHA1
        if not is_sha256 and PasswordAlgorithm.MD5 not in self._credentials.algorithms:
            return 401
        key = self._key(integrity, algorithm, username, realm, password)
        if not message.verify(key, integrity):
            return 401
        if not self._is_fresh(nonce, source, now):
            return 438
        return Identity(username, key, integrity)

    def challenge(
        self,
        request: StunMessage,
        code: int,
        source: tuple[str, int],
        now: int,
        *,
        room: int,
    ) -> bytes:
        """The error response 401 or 438 to `request`. It names the software if it is then not
        longer than `room` bytes; without that it may be longer all the same."""
        nonce = encode_attributes(((_NONCE, self._nonce(source, now)),))
        attributes = self._before[code] + nonce + self._behind
        fingerprint = request.has_fingerprint
        if message_size(attributes + self._software, fingerprint=fingerprint) <= room:
            attributes += self._software
        return encode_message(
            request.method,
            MessageClass.ERROR,
            request.transaction_id,
            attributes,
            fingerprint=fingerprint,
        )

    def _username(self, message: StunMessage) -> str | None:
        hashed = message.value(_USERHASH)
        if hashed is None:
            return message.text(_USERNAME)
        return self._credentials.username_of(hashed, self._realm)

    def _algorithm(self, message: StunMessage, nonce: str) -> PasswordAlgorithm | None:
        """The password algorithm that the client chose; None if it may not choose so (400)."""
        chosen, offered = message.value(_CHOSEN), message.value(_OFFERED)
        if offered == self._offer and nonce.startswith(self._cookie):
            known = self._algorithm_by_value.get(chosen or b"")
            if known is not None:  # as nearly all do
                return known
        numbers = message.password_algorithms(Attribute.PASSWORD_ALGORITHM)
        if not nonce_features(nonce) & FEATURE_PASSWORD_ALGORITHMS:
            return PasswordAlgorithm.MD5
        if not numbers and offered is None:
            return PasswordAlgorithm.MD5
        if len(numbers) != 1 or offered != self._offer:
            return None
        return next((one for one in self._credentials.algorithms if one == numbers[0]), None)

    def _nonce(self, source: tuple[str, int], now: int) -> bytes:
        ends = now // _NONCE_UNIT_NS + NONCE_LIFETIME_NS // _NONCE_UNIT_NS
        return self._seal((ends & 0xFFFFFF).to_bytes(_STAMP_BYTES, "big"), source)

    def _is_fresh(self, nonce: str, source: tuple[str, int], now: int) -> bool:
        at = len(self._cookie)
        try:
            stamp = a2b_base64(nonce[at : at + _STAMP_CHARACTERS])
        except (Base64Error, ValueError):
            return False
        if len(stamp) != _STAMP_BYTES:
            return False
        if not hmac.compare_digest(self._seal(stamp, source), nonce.encode()):
            return False
        left = (int.from_bytes(stamp, "big") - now // _NONCE_UNIT_NS) & 0xFFFFFF
        return 0 < left <= NONCE_LIFETIME_NS // _NONCE_UNIT_NS

    def _seal(self, stamp: bytes, source: tuple[str, int]) -> bytes:
        """The cookie and 15 characters: so short that a 401 is never more than twice a bare
        Allocate request. BLAKE2s with a key (RFC 7693) is a MAC in one call, and nobody else has
        to compute it."""
        host, port = source
        covered = b"%b%b|%d" % (stamp, host.encode(), port)
        mac = blake2s(covered, key=self._nonce_key, digest_size=_SEAL_BYTES).digest()
        return self._cookie_bytes + b2a_base64(stamp + mac, newline=False).rstrip(b"=")
