"""Secrets at rest: sealed by a key that is not in the database.

XChaCha20-Poly1305 (`nacl.secret.Aead`; libsodium's `crypto_aead_xchacha20poly1305_ietf`) with a
random nonce of 24 bytes before the ciphertext. The associated data names where the secret stands
(table, column, account, row) and the key, so a sealed secret opens nowhere else: whoever can write
to the database can take one away, not put it elsewhere.

Keys form a ring: each has a number, the highest seals, all open. A new key is put into use by
giving the ring with it to every node, and then `reseal`, which works while the portal runs; after
that nothing needs the older keys any more, and they can be destroyed.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Callable, Mapping
from datetime import datetime
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

import attrs
from nacl.exceptions import CryptoError
from nacl.secret import Aead

from actors.model import KIND_OF, Account, Entity, EntityKind, SealedSecret
from actors.store.interface import MAX_PAGE, NotFound, Outdated, Put, Store
from actors.store.validity import MIN_BOX, SECRETS
from runtime.randomness import Randomness
from runtime.secret import Secret

KEY_BYTES: Final = Aead.KEY_SIZE
NONCE_BYTES: Final = Aead.NONCE_SIZE
MAX_KEYS: Final = 16
MAX_KEY_ID: Final = 2**31 - 1
MAX_SECRET_BYTES: Final = 8_192 - MIN_BOX
RESEAL_ATTEMPTS: Final = 3

_CONTEXT: Final = b"holloway/1 sealed"
_FINGERPRINT: Final = b"holloway/1 encryption key"
_KEY = re.compile(r"([0-9]{1,10}):([A-Za-z0-9+/]{43}=)")


class BadKeys(ValueError):
    """The text is no ring of keys. The message names no key."""


class CannotOpen(Exception):
    """The secret was sealed by a key that the ring lacks, or for another place, or was altered."""


class KeyRing:
    """The keys of the installation. It prints as the numbers of its keys.

    `parse` reads the form that files and variables have: `<number>:<base64 of 32 bytes>` for each
    key, with white space or commas between them.
    """

    def __init__(self, keys: Mapping[int, Secret], randomness: Randomness) -> None:
        """Raises BadKeys unless there are 1 to MAX_KEYS keys of KEY_BYTES, numbered from 0."""
        if not 1 <= len(keys) <= MAX_KEYS:
            raise BadKeys(f"1 to {MAX_KEYS} keys are needed")
        for key_id, key in keys.items():
            if not 0 <= key_id <= MAX_KEY_ID or len(key.reveal()) != KEY_BYTES:
                raise BadKeys(f"a key has {KEY_BYTES} bytes and a number up to {MAX_KEY_ID}")
        self._boxes = {key_id: Aead(key.reveal()) for key_id, key in keys.items()}
        self._fingerprints = {
            key_id: sha256(_FINGERPRINT + key_id.to_bytes(8, "big") + key.reveal()).digest()
            for key_id, key in keys.items()
        }
        self._randomness = randomness

    @classmethod
    def parse(cls, text: Secret, randomness: Randomness) -> KeyRing:
        """The ring of a file or a variable. Raises BadKeys, also for a number that comes twice."""
        keys: dict[int, Secret] = {}
        try:
            words = text.reveal_text().replace(",", " ").split()
        except ValueError:
            raise BadKeys("the keys are not text") from None
        for word in words:
            parts = _KEY.fullmatch(word)
            if parts is None:
                raise BadKeys("a key is written <number>:<base64 of 32 bytes>")
            key_id = int(parts[1])
            if key_id in keys:
                raise BadKeys(f"there are two keys of the number {key_id}")
            try:
                keys[key_id] = Secret(b64decode(parts[2], validate=True))
            except Base64Error:
                raise BadKeys("a key is written <number>:<base64 of 32 bytes>") from None
        return cls(keys, randomness)

    @property
    def newest(self) -> int:
        """The number of the key that seals."""
        return max(self._boxes)

    @property
    def fingerprints(self) -> Mapping[int, bytes]:
        """What tells each key from every other, by number, and gives nothing of it away: SHA-256
        of a random key. For `Store.check_keys`."""
        return self._fingerprints

    def seal(
        self, secret: Secret, *, table: str, column: str, account_id: UUID, row_id: UUID
    ) -> SealedSecret:
        """Seal a secret for one place. Raises ValueError for more than MAX_SECRET_BYTES."""
        content = secret.reveal()
        if len(content) > MAX_SECRET_BYTES:
            raise ValueError(f"a secret has at most {MAX_SECRET_BYTES} bytes")
        key_id = self.newest
        place = _place(table, column, account_id, row_id, key_id)
        nonce = self._randomness.bytes(NONCE_BYTES)
        return SealedSecret(
            key_id=key_id, box=bytes(self._boxes[key_id].encrypt(content, place, nonce))
        )

    def open(
        self,
        sealed: SealedSecret,
        *,
        table: str,
        column: str,
        account_id: UUID,
        row_id: UUID,
    ) -> Secret:
        """What was sealed for this place. Raises CannotOpen."""
        box = self._boxes.get(sealed.key_id)
        if box is None:
            raise CannotOpen(f"the ring has no key {sealed.key_id}")
        place = _place(table, column, account_id, row_id, sealed.key_id)
        try:
            return Secret(box.decrypt(sealed.box, place))
        except (CryptoError, ValueError):
            raise CannotOpen(f"not what key {sealed.key_id} sealed for this place") from None

    def __repr__(self) -> str:
        return f"KeyRing({sorted(self._boxes)})"


def make_ring(randomness: Randomness) -> Secret:
    """The text of a new ring with one key, number 1."""
    return Secret("1:" + b64encode(randomness.bytes(KEY_BYTES)).decode())


async def reseal(
    store: Store, ring: KeyRing, *, now: Callable[[], datetime], who: str = "reseal"
) -> int:
    """Seal everything anew that is not sealed by the newest key; returns how many secrets that
    were. Whoever changes one meanwhile is not overruled.

    Raises CannotOpen (what was done until then stays done), Unavailable.
    """
    count = 0
    after: UUID | None = None
    while accounts := await store.accounts(after=after, limit=MAX_PAGE):
        for account in accounts:
            for kind in SECRETS:
                count += await _reseal_kind(store, ring, account, kind, now, who)
        after = accounts[-1].id
    return count


async def _reseal_kind(
    store: Store,
    ring: KeyRing,
    account: Account,
    kind: EntityKind,
    now: Callable[[], datetime],
    who: str,
) -> int:
    count = 0
    after: UUID | None = None
    while page := await store.list(account.id, kind, after=after, limit=MAX_PAGE):
        for entity in page:
            count += await _reseal_one(store, ring, account.id, entity, now, who)
        after = page[-1].id
    return count


async def _reseal_one(
    store: Store,
    ring: KeyRing,
    account_id: UUID,
    entity: Entity,
    now: Callable[[], datetime],
    who: str,
) -> bool:
    kind = KIND_OF[type(entity)]
    for attempts_left in reversed(range(RESEAL_ATTEMPTS)):
        renewed = _resealed(ring, account_id, entity)
        if renewed is None:
            return False
        try:
            await store.apply(account_id, [Put(renewed, before=entity)], who=who, at=now())
        except Outdated:
            if not attempts_left:
                raise
            try:
                entity = await store.get(account_id, kind, entity.id)
            except NotFound:
                return False
        except NotFound:
            return False
        else:
            return True
    raise AssertionError


def _resealed(ring: KeyRing, account_id: UUID, entity: Entity) -> Entity | None:
    """The entity with its secret under the newest key; None if it is so, or has none."""
    kind = KIND_OF[type(entity)]
    column = SECRETS[kind]
    sealed: SealedSecret | None = getattr(entity, column)
    if sealed is None or sealed.key_id == ring.newest:
        return None
    place: dict[str, Any] = {
        "table": kind,
        "column": column,
        "account_id": account_id,
        "row_id": entity.id,
    }
    evolve: Callable[..., Entity] = attrs.evolve
    return evolve(entity, **{column: ring.seal(ring.open(sealed, **place), **place)})


def _place(table: str, column: str, account_id: UUID, row_id: UUID, key_id: int) -> bytes:
    """The associated data. Texts have their length before them, so no two places look alike."""
    texts = b"".join(
        len(text).to_bytes(2, "big") + text for text in (_CONTEXT, table.encode(), column.encode())
    )
    return texts + account_id.bytes + row_id.bytes + key_id.to_bytes(8, "big")
