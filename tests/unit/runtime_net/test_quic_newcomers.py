"""Clients that wait for their handshake: in order, each of them once, and nobody for ever."""

from __future__ import annotations

from runtime.net.address import Address
from runtime.net.quic_newcomers import MAX_DATAGRAMS, PATIENCE_S, Newcomer, Newcomers

SENDER = Address("192.0.2.1", 1)


def newcomer(name: bytes, *, at: float = 0.0, source: str = "192.0.2.1") -> Newcomer:
    return Newcomer(
        cid=name,
        source=source,
        sender=SENDER,
        original_cid=name,
        retry_cid=None,
        heard_at=at,
        datagrams=[b"first"],
    )


def test_whoever_came_first_is_taken_first() -> None:
    waiting = Newcomers()
    for name in (b"a", b"b", b"c"):
        waiting.put(newcomer(name))
    taken = [one.cid for one in iter(lambda: waiting.take(1.0), None)]
    assert taken == [b"a", b"b", b"c"]
    assert len(waiting) == 0


def test_a_newcomer_that_was_not_heard_for_long_has_given_up() -> None:
    waiting = Newcomers()
    waiting.put(newcomer(b"gone"))
    waiting.put(newcomer(b"there"))
    assert waiting.heard(b"there", b"again", SENDER, PATIENCE_S)
    taken = waiting.take(PATIENCE_S + 0.5)
    assert taken is not None
    assert taken.cid == b"there"
    assert waiting.take(PATIENCE_S + 0.5) is None


def test_what_a_newcomer_sends_meanwhile_is_kept_up_to_a_limit() -> None:
    waiting = Newcomers()
    waiting.put(newcomer(b"a"))
    for _ in range(2 * MAX_DATAGRAMS):
        assert waiting.heard(b"a", b"more", SENDER, 0.0)
    taken = waiting.take(0.0)
    assert taken is not None
    assert taken.datagrams == [b"first"] + [b"more"] * (MAX_DATAGRAMS - 1)
    assert not waiting.heard(b"a", b"late", SENDER, 0.0), "it waits no more"


def test_a_stranger_who_knows_a_newcomers_id_adds_nothing_to_it() -> None:
    waiting = Newcomers()
    waiting.put(newcomer(b"a"))
    assert waiting.heard(b"a", b"forged", Address("192.0.2.9", 9), PATIENCE_S)
    assert waiting.take(PATIENCE_S) is None, "nor does it keep it"


def test_those_who_wait_are_counted_by_source() -> None:
    waiting = Newcomers()
    waiting.put(newcomer(b"a", source="one"))
    waiting.put(newcomer(b"b", source="two"))
    waiting.put(newcomer(b"c", source="one", at=10.0))
    assert (waiting.of_source("one"), waiting.of_source("two")) == (2, 1)
    assert waiting.take(10.0) is not None, "the two others are gone"
    assert (len(waiting), waiting.of_source("one"), waiting.of_source("two")) == (0, 0, 0)
