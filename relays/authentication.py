"""Long-term credentials (RFC 8489, section 9.2): the half of the client and that of the server.

A server answers the first request with 401, its realm and a nonce; the client repeats the request
with user name, realm, nonce and an integrity attribute whose key is made from the password. With
the nonce cookie "obMatJos2…" the server announces that it knows PASSWORD-ALGORITHMS, and both
then use SHA-256; without the cookie both are of the old kind, MD5 and HMAC-SHA1.
"""

from __future__ import annotations

from relays.stun import (
    Attribute,
    Integrity,
    PasswordAlgorithm,
    StunError,
    StunMessage,
    long_term_key,
    password_algorithms_value,
)
from relays.turn import FEATURE_PASSWORD_ALGORITHMS, nonce_features


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

    def learn(self, challenge: StunMessage) -> bool:
        """Take realm, nonce and algorithm from an error response 401 or 438.

        False: the server offers no algorithm that is known here, or somebody in between took its
        offer out (the cookie in the nonce says that there was one). Raises StunError.
        """
        realm, nonce = challenge.text(Attribute.REALM), challenge.text(Attribute.NONCE)
        offered = challenge.password_algorithms(Attribute.PASSWORD_ALGORITHMS)
        if nonce is None or (realm is None and self.key is None):
            raise StunError("a challenge without realm or nonce")
        is_modern = bool(nonce_features(nonce) & FEATURE_PASSWORD_ALGORITHMS)
        algorithm = _strongest(offered) if is_modern else PasswordAlgorithm.MD5
        if algorithm is None:
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
