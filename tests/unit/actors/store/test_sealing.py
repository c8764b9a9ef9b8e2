"""Secrets at rest: what opens where, and how a key is replaced while the store is in use."""

from __future__ import annotations

from base64 import b64encode
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt

from actors.model import Account, AuthProvider, Directory, Entity, SealedSecret
from actors.store.interface import Put
from actors.store.memory import MemoryStore
from actors.store.sealing import (
    MAX_SECRET_BYTES,
    BadKeys,
    CannotOpen,
    KeyRing,
    make_ring,
    reseal,
)
from actors.store.validity import validate
from runtime.randomness import SeededRandomness
from runtime.secret import Secret

AT = datetime(2026, 1, 1, tzinfo=UTC)
KEYS = {1: Secret(bytes([1]) * 32), 2: Secret(bytes([2]) * 32), 3: Secret(bytes([3]) * 32)}
ACCOUNT, ROW, OTHER = UUID(int=1), UUID(int=2), UUID(int=3)
PLACE: dict[str, Any] = {
    "table": "auth_provider",
    "column": "client_secret",
    "account_id": ACCOUNT,
    "row_id": ROW,
}


def ring(*numbers: int) -> KeyRing:
    return KeyRing({n: KEYS[n] for n in numbers}, SeededRandomness(1, "sealing"))


@given(st.binary(max_size=200))
def test_what_was_sealed_opens_at_its_place(content: bytes) -> None:
    sealed = ring(1).seal(Secret(content), **PLACE)
    assert ring(1).open(sealed, **PLACE).reveal() == content
    assert len(sealed.box) == len(content) + 40


def test_the_longest_secret_fits_its_field_and_a_longer_one_is_refused() -> None:
    sealed = ring(1).seal(Secret(bytes(MAX_SECRET_BYTES)), **PLACE)
    validate(provider(sealed))
    with pytest.raises(ValueError, match="at most"):
        ring(1).seal(Secret(bytes(MAX_SECRET_BYTES + 1)), **PLACE)


def test_it_is_xchacha20_poly1305_with_the_place_as_associated_data() -> None:
    """Written out once by hand, since a database outlives the code that filled it."""
    sealed = ring(1).seal(Secret(b"s3cret"), **PLACE)
    place = (
        b"\x00\x11holloway/1 sealed\x00\x0dauth_provider\x00\x0dclient_secret"
        + ACCOUNT.bytes + ROW.bytes + b"\x00\x00\x00\x00\x00\x00\x00\x01"
    )  # fmt: skip
    nonce, ciphertext = sealed.box[:24], sealed.box[24:]
    opened = crypto_aead_xchacha20poly1305_ietf_decrypt(ciphertext, place, nonce, bytes([1]) * 32)
    assert opened == b"s3cret"


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"table": "directory"},
        {"column": "client_secre"},
        {"table": "auth_providerc", "column": "lient_secret"},
        {"account_id": OTHER},
        {"row_id": OTHER},
        {"account_id": ROW, "row_id": ACCOUNT},
    ],
)
def test_it_opens_nowhere_else(elsewhere: dict[str, Any]) -> None:
    sealed = ring(1).seal(Secret("s3cret"), **PLACE)
    with pytest.raises(CannotOpen):
        ring(1).open(sealed, **(PLACE | elsewhere))


def test_altered_cut_or_under_another_number_it_does_not_open() -> None:
    sealed = ring(1).seal(Secret("s3cret"), **PLACE)
    same_key = KeyRing({1: KEYS[1], 2: KEYS[1]}, SeededRandomness(1, "sealing"))
    spoilt = [attrs.evolve(sealed, key_id=2), attrs.evolve(sealed, box=b"")]
    spoilt += [attrs.evolve(sealed, box=sealed.box[:end]) for end in (23, 24, 39, -1)]
    for place in range(len(sealed.box)):
        altered = bytearray(sealed.box)
        altered[place] ^= 1
        spoilt.append(attrs.evolve(sealed, box=bytes(altered)))
    for each in spoilt:
        with pytest.raises(CannotOpen):
            same_key.open(each, **PLACE)


def test_the_newest_key_seals_and_every_key_opens() -> None:
    old = ring(1).seal(Secret("s3cret"), **PLACE)
    new = ring(1, 2).seal(Secret("s3cret"), **PLACE)
    assert (old.key_id, new.key_id) == (1, 2)
    assert ring(1, 2).open(old, **PLACE) == ring(2).open(new, **PLACE)
    with pytest.raises(CannotOpen, match="no key 1"):
        ring(2).open(old, **PLACE)


def test_the_same_secret_never_looks_the_same() -> None:
    keys = ring(1)
    assert keys.seal(Secret("x"), **PLACE).box != keys.seal(Secret("x"), **PLACE).box


def test_nothing_prints_a_key_or_a_secret() -> None:
    sealed = ring(1, 2).seal(Secret("s3cret"), **PLACE)
    assert repr(ring(1, 2)) == "KeyRing([1, 2])"
    assert repr(sealed) == "SealedSecret(key_id=2)"
    assert "client_secret" not in repr(provider(sealed))


# --- the text of a ring --------------------------------------------------------------------------


def test_a_ring_is_read_from_lines_words_or_a_list() -> None:
    one, two = (b64encode(KEYS[n].reveal()).decode() for n in (1, 2))
    for text in (f"1:{one}\n2:{two}\n", f"2:{two} 1:{one}", f"1:{one},2:{two}"):
        assert repr(KeyRing.parse(Secret(text), SeededRandomness(1, "x"))) == "KeyRing([1, 2])"
    made = KeyRing.parse(make_ring(SeededRandomness(1, "x")), SeededRandomness(1, "x"))
    assert made.newest == 1


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "1", "1:", "x:" + "A" * 43 + "=", "1:" + "A" * 43, "1:" + "A" * 44,
        "1:" + "A" * 42 + "==", "-1:" + "A" * 43 + "=", "4294967296:" + "A" * 43 + "=",
        " ".join(["1:" + "A" * 43 + "="] * 2), "1:" + "é" * 43 + "=",
        " ".join(f"{n}:" + "A" * 43 + "=" for n in range(17)),
    ],
)  # fmt: skip
def test_what_is_no_ring_is_refused_without_being_quoted(text: str) -> None:
    with pytest.raises(BadKeys) as refusal:
        KeyRing.parse(Secret(text), SeededRandomness(1, "x"))
    assert "AAAA" not in str(refusal.value)


# --- a new key -----------------------------------------------------------------------------------


def provider(sealed: SealedSecret | None, number: int = 2) -> AuthProvider:
    return AuthProvider(
        id=UUID(int=number), account_id=ACCOUNT, kind="oidc", name=f"p{number}",
        issuer="https://id.example", client_id="holloway", client_secret=sealed, created_at=AT,
    )  # fmt: skip


async def filled(keys: KeyRing) -> MemoryStore:
    store = MemoryStore()
    directory = Directory(id=ROW, account_id=ACCOUNT, kind="okta", name="d", created_at=AT)
    place = PLACE | {"table": "directory", "column": "credentials"}
    credentials = keys.seal(Secret("credentials"), **place)
    entities: list[Entity] = [
        Account(id=ACCOUNT, name="Acme", slug="acme", created_at=AT),
        provider(keys.seal(Secret("s3cret"), **PLACE)),
        provider(None, number=4),
        attrs.evolve(directory, credentials=credentials),
    ]
    await store.apply(ACCOUNT, [Put(entity) for entity in entities], who="test", at=AT)
    return store


async def secret_of(store: MemoryStore, keys: KeyRing) -> str:
    entity = await store.get(ACCOUNT, "auth_provider", ROW)
    assert isinstance(entity, AuthProvider)
    assert entity.client_secret is not None
    return keys.open(entity.client_secret, **PLACE).reveal_text()


async def test_after_resealing_the_older_key_is_needed_no_more() -> None:
    store = await filled(ring(1))
    assert await reseal(store, ring(1, 2), now=lambda: AT) == 2
    assert await secret_of(store, ring(2)) == "s3cret"
    number = (await store.contents(ACCOUNT)).number
    assert await reseal(store, ring(2), now=lambda: AT) == 0
    assert (await store.contents(ACCOUNT)).number == number


async def test_what_cannot_be_opened_stops_the_resealing_and_stays_as_it_is() -> None:
    store = await filled(ring(1))
    with pytest.raises(CannotOpen):
        await reseal(store, ring(2), now=lambda: AT)
    assert await secret_of(store, ring(1)) == "s3cret"


async def test_a_secret_that_is_replaced_meanwhile_is_not_overruled() -> None:
    store = await filled(ring(1))
    faster = [Put(provider(ring(1).seal(Secret("newer"), **PLACE)))]

    class Racing(MemoryStore):
        """The same store; somebody is always faster the first time."""

        async def apply(self, *arguments: Any, **named: Any) -> Any:
            while faster:
                await store.apply(ACCOUNT, [faster.pop()], who="test", at=AT)
            return await store.apply(*arguments, **named)

        async def accounts(self, **named: Any) -> Any:
            return await store.accounts(**named)

        async def list(self, *arguments: Any, **named: Any) -> Any:
            return await store.list(*arguments, **named)

        async def get(self, *arguments: Any) -> Any:
            return await store.get(*arguments)

    assert await reseal(Racing(), ring(1, 2), now=lambda: AT) == 2
    assert await secret_of(store, ring(2)) == "newer"


async def test_neither_changes_nor_contents_hold_a_sealed_secret() -> None:
    store = await filled(ring(1))
    await reseal(store, ring(1, 2), now=lambda: AT)
    told: list[Any] = [*(await store.contents(ACCOUNT)).entities]
    for change in await store.changes(ACCOUNT, after=0):
        told += [change.before, change.after]
    secrets = [getattr(each, "client_secret", None) for each in told]
    secrets += [getattr(each, "credentials", None) for each in told]
    found = [each for each in secrets if each is not None]
    assert len(found) >= 6
    assert all(each.box == b"" for each in found)
