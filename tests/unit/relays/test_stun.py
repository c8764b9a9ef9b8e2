"""The STUN codec: the vectors of RFC 5769 and RFC 8489, round trips, and hostile bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relays.stun import (
    Attribute,
    Integrity,
    MessageClass,
    Method,
    PasswordAlgorithm,
    StunError,
    StunMessage,
    address_value,
    error_value,
    is_stun,
    long_term_key,
    password_algorithms_value,
    short_term_key,
    user_hash,
    xor_address_value,
)
from runtime.net.address import Address

PASSWORD = "VOkJxbRl1RmTxUk/WvJxBt"

REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae"
    "802200105354554e207465737420636c69656e74"
    "002400046e0001ff80290008932ff9b151263b36"
    "000600096576746a3a68367659202020"
    "000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2"
    "80280004e57a3bcf"
)
RESPONSE_IPV4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004c07d4c96"
)
RESPONSE_IPV6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014a382954e4be67bf11784c97c8292c275bfe3ed41"
    "80280004c8fb0b4c"
)
LONG_TERM_REQUEST = bytes.fromhex(
    "000100602112a44278ad3433c6ad72c029da412e"
    "00060012e3839ee38388e383aae38383e382afe382b90000"
    "0015001c662f2f3439396b39353464364f4c33346f4c394653547679363473410014000b"
    "6578616d706c652e6f726700"
    "00080014f67024656dd64a3e02b8e0712e85c9a28ca89666"
)

SHA256_REQUEST = bytes.fromhex(
    "000100902112a44278ad3433c6ad72c029da412e"
    "001e00204a3cf38fef6992bda952c6780417da0f24819415569e60b205c46e41407f1704"
    "001500296f624d61744a6f733241414143662f2f3439396b39353464364f4c33346f4c394653547679363473"
    "41000000"
    "0014000b6578616d706c652e6f726700"
    "001d000400020000"
    "001c0020b5c7bf005b6c52a21c51c5e892f81924136296cb927c43149309278cc6518e65"
)


def test_the_request_of_rfc_5769_section_2_1_is_read_and_its_integrity_holds() -> None:
    message = StunMessage.decode(REQUEST)
    assert (message.method, message.message_class) == (Method.BINDING, MessageClass.REQUEST)
    assert message.text(Attribute.SOFTWARE) == "STUN test client"
    assert message.text(Attribute.USERNAME) == "evtj:h6vY"
    assert message.integer(Attribute.PRIORITY, 4) == 0x6E0001FF
    assert message.integer(Attribute.ICE_CONTROLLED, 8) == 0x932FF9B151263B36
    assert message.has_fingerprint
    assert message.verify(short_term_key(PASSWORD))
    assert not message.verify(short_term_key(PASSWORD + "x"))


@pytest.mark.parametrize(
    ("data", "mapped"),
    [
        (RESPONSE_IPV4, Address("192.0.2.1", 32853)),
        (RESPONSE_IPV6, Address("2001:db8:1234:5678:11:2233:4455:6677", 32853)),
    ],
    ids=["section 2.2", "section 2.3"],
)
def test_the_responses_of_rfc_5769_are_read_and_their_integrity_holds(
    data: bytes, mapped: Address
) -> None:
    message = StunMessage.decode(data)
    assert (message.method, message.message_class) == (Method.BINDING, MessageClass.SUCCESS)
    assert message.text(Attribute.SOFTWARE) == "test vector"
    assert message.xor_address(Attribute.XOR_MAPPED_ADDRESS) == mapped
    assert message.verify(short_term_key(PASSWORD))
    assert xor_address_value(mapped, message.transaction_id) == message.value(
        Attribute.XOR_MAPPED_ADDRESS
    )


def test_the_long_term_request_of_rfc_5769_section_2_4_is_read_and_written_byte_for_byte() -> None:
    username = "\u30de\u30c8\u30ea\u30c3\u30af\u30b9"
    # The prepared form of "The<soft hyphen>M<a in superscript>tr<IX in one sign>".
    key = long_term_key(PasswordAlgorithm.MD5, username, "example.org", "TheMatrIX")
    message = StunMessage.decode(LONG_TERM_REQUEST)
    assert message.text(Attribute.USERNAME) == username
    assert message.text(Attribute.NONCE) == "f//499k954d6OL34oL9FSTvy64sA"
    assert message.text(Attribute.REALM) == "example.org"
    assert not message.has_fingerprint
    assert message.verify(key)
    assert message.encode(key=key) == LONG_TERM_REQUEST


def test_the_request_of_rfc_8489_appendix_b_1_is_read_and_written_byte_for_byte() -> None:
    """As erratum 6268 corrects it; what was printed has a wrong length and names no algorithm."""
    username = "\u30de\u30c8\u30ea\u30c3\u30af\u30b9"
    key = long_term_key(PasswordAlgorithm.SHA256, username, "example.org", "TheMatrIX")
    message = StunMessage.decode(SHA256_REQUEST)
    assert (message.method, message.message_class) == (Method.BINDING, MessageClass.REQUEST)
    assert message.value(Attribute.USERHASH) == user_hash(username, "example.org")
    assert message.text(Attribute.NONCE) == "obMatJos2AAACf//499k954d6OL34oL9FSTvy64sA"
    assert message.text(Attribute.REALM) == "example.org"
    assert message.value(Attribute.PASSWORD_ALGORITHM) == bytes.fromhex("00020000")
    assert message.integrities == {Integrity.SHA256}
    assert message.verify(key, Integrity.SHA256)
    assert not message.verify(key[:-1], Integrity.SHA256)
    assert message.encode(key=key, integrity=Integrity.SHA256) == SHA256_REQUEST


def test_every_single_bit_flip_of_a_protected_vector_is_noticed() -> None:
    key = short_term_key(PASSWORD)
    for position in range(len(RESPONSE_IPV4) * 8):
        damaged = bytearray(RESPONSE_IPV4)
        damaged[position // 8] ^= 1 << position % 8
        try:
            message = StunMessage.decode(bytes(damaged))
        except StunError:
            continue
        assert not (message.has_fingerprint and message.verify(key))


def test_attributes_behind_the_integrity_are_dropped() -> None:
    plain = StunMessage(
        method=Method.BINDING,
        message_class=MessageClass.REQUEST,
        transaction_id=bytes(12),
        attributes=((Attribute.USERNAME, b"a"),),
    ).encode(key=b"k", integrity=Integrity.SHA256)
    behind = b"\x00\x25\x00\x00"
    longer = plain[:2] + (len(plain) - 20 + 4).to_bytes(2, "big") + plain[4:] + behind
    message = StunMessage.decode(longer)
    assert Attribute.USE_CANDIDATE not in message
    assert message.verify(b"k", Integrity.SHA256)


def test_both_integrity_attributes_may_follow_each_other() -> None:
    message = StunMessage(
        method=Method.ALLOCATE,
        message_class=MessageClass.REQUEST,
        transaction_id=bytes(12),
        attributes=((Attribute.USERNAME, b"a"),),
    )
    with_sha1 = message.encode(key=b"k")
    raw = (Attribute.MESSAGE_INTEGRITY, with_sha1[-20:])
    both = StunMessage(
        method=message.method,
        message_class=message.message_class,
        transaction_id=message.transaction_id,
        attributes=(*message.attributes, raw),
    ).encode(key=b"k", integrity=Integrity.SHA256)
    decoded = StunMessage.decode(both)
    assert decoded == message
    assert decoded.integrities == {Integrity.SHA1, Integrity.SHA256}
    assert decoded.verify(b"k", Integrity.SHA1)
    assert decoded.verify(b"k", Integrity.SHA256)


def test_the_user_hash_of_rfc_8489_appendix_b_comes_out() -> None:
    username = "\u30de\u30c8\u30ea\u30c3\u30af\u30b9"
    assert user_hash(username, "example.org").hex() == (
        "4a3cf38fef6992bda952c6780417da0f24819415569e60b205c46e41407f1704"
    )


def test_misuse_of_the_encoder_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="12 bytes"):
        StunMessage(method=1, message_class=MessageClass.REQUEST, transaction_id=b"short").encode()
    with pytest.raises(ValueError, match="12 bits"):
        StunMessage(
            method=1 << 12, message_class=MessageClass.REQUEST, transaction_id=bytes(12)
        ).encode()
    with pytest.raises(ValueError, match="not an address"):
        address_value(("example.org", 1))


addresses = st.builds(
    Address,
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str),
    st.integers(0, 65_535),
)
integrity_types = {Attribute.MESSAGE_INTEGRITY, Attribute.MESSAGE_INTEGRITY_SHA256}
attribute_types = st.integers(0, 65_535).filter(
    lambda kind: kind not in integrity_types and kind != Attribute.FINGERPRINT
)
messages = st.builds(
    StunMessage,
    method=st.integers(0, 0xFFF),
    message_class=st.sampled_from(MessageClass),
    transaction_id=st.binary(min_size=12, max_size=12),
    attributes=st.lists(st.tuples(attribute_types, st.binary(max_size=80)), max_size=12).map(tuple),
)


@given(messages, st.none() | st.binary(max_size=70), st.sampled_from(Integrity), st.booleans())
def test_every_message_round_trips(
    message: StunMessage, key: bytes | None, integrity: Integrity, fingerprint: bool
) -> None:
    data = message.encode(key=key, integrity=integrity, fingerprint=fingerprint)
    decoded = StunMessage.decode(memoryview(data))
    assert decoded == message
    assert decoded.has_fingerprint == fingerprint
    assert decoded.encode(key=key, integrity=integrity, fingerprint=fingerprint) == data
    if key is not None:
        assert decoded.verify(key, integrity)
        assert not decoded.verify(key + b"\1", integrity)
    else:
        assert decoded.integrities == frozenset()


@given(addresses, st.binary(min_size=12, max_size=12))
def test_every_address_round_trips(address: Address, transaction_id: bytes) -> None:
    message = StunMessage(
        method=Method.BINDING,
        message_class=MessageClass.SUCCESS,
        transaction_id=transaction_id,
        attributes=(
            (Attribute.XOR_MAPPED_ADDRESS, xor_address_value(address, transaction_id)),
            (Attribute.ALTERNATE_SERVER, address_value(address)),
        ),
    )
    assert message.xor_address(Attribute.XOR_MAPPED_ADDRESS) == address
    assert message.address(Attribute.ALTERNATE_SERVER) == address


@given(st.integers(300, 699), st.text(max_size=100))
def test_every_error_code_round_trips(code: int, reason: str) -> None:
    message = StunMessage(
        method=Method.BINDING,
        message_class=MessageClass.ERROR,
        transaction_id=bytes(12),
        attributes=((Attribute.ERROR_CODE, error_value(code, reason)),),
    )
    assert message.error() == (code, reason)


@given(st.lists(st.integers(0, 65_535), max_size=5))
def test_every_list_of_password_algorithms_round_trips(algorithms: list[int]) -> None:
    message = StunMessage(
        method=Method.BINDING,
        message_class=MessageClass.ERROR,
        transaction_id=bytes(12),
        attributes=((Attribute.PASSWORD_ALGORITHMS, password_algorithms_value(*algorithms)),),
    )
    assert message.password_algorithms(Attribute.PASSWORD_ALGORITHMS) == tuple(algorithms)


@given(st.binary(max_size=100), st.booleans(), st.lists(st.sampled_from(Attribute), max_size=6))
def test_no_bytes_raise_anything_but_a_stun_error(
    body: bytes, framed: bool, kinds: list[Attribute]
) -> None:
    if framed:
        for kind in kinds:
            body += kind.to_bytes(2, "big") + len(body[:7]).to_bytes(2, "big") + body[:7]
        body += bytes(-len(body) % 4)
        body = b"\1\1" + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + bytes(12) + body
    try:
        message = StunMessage.decode(body)
    except StunError:
        return
    assert is_stun(body)
    readers = (
        message.text,
        message.address,
        message.xor_address,
        message.password_algorithms,
        lambda attribute: message.integer(attribute, 4),
        lambda _: message.error(),
    )
    for attribute in Attribute:
        for read in readers:
            with contextlib.suppress(StunError):
                read(attribute)
