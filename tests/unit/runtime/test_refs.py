"""Addresses of actors: how they travel, names, and what a call raises when nobody is there."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.actor import (
    Actor,
    ActorRef,
    CallError,
    Dead,
    NamedRef,
    Raise,
    Unreachable,
    handles,
)
from runtime.clock import VirtualClock
from runtime.randomness import SeededRandomness
from runtime.refs import (
    MAX_REF_BYTES,
    AnyRef,
    InvalidRef,
    decode_ref,
    encode_ref,
    ref_from_text,
    ref_to_text,
)
from runtime.scheduler import Scheduler
from runtime.testing import HeapHost

nodes = st.text(min_size=1, max_size=20)
parts = st.one_of(st.text(max_size=20), st.integers(-(2**63), 2**63 - 1), st.uuids())
names = st.one_of(parts, st.lists(parts, min_size=1, max_size=8).map(tuple))
refs = st.one_of(
    st.builds(ActorRef, nodes, st.integers(1, 2**63 - 1)),
    st.builds(NamedRef, names, st.none() | nodes),
)


@given(refs)
def test_an_address_comes_back_as_it_was_from_bytes_and_from_text(ref: AnyRef):
    assert decode_ref(encode_ref(ref)) == ref
    assert ref_from_text(ref_to_text(ref)) == ref


@given(st.binary(max_size=64))
def test_any_other_bytes_are_refused_or_are_an_address(written: bytes):
    try:
        ref = decode_ref(written)
    except InvalidRef:
        return
    assert decode_ref(encode_ref(ref)) == ref


@given(st.text(max_size=64))
def test_any_other_text_is_refused_or_is_an_address(text: str):
    try:
        ref = ref_from_text(text)
    except InvalidRef:
        return
    assert ref_from_text(ref_to_text(ref)) == ref


@pytest.mark.parametrize(
    "written",
    [
        [0, "", 1],
        [0, "a", 0],
        [0, "a", -1],
        [0, "a", 1, 2],
        [0, "a" * 300, 1],
        [2, "a", 1],
        [1, None, []],
        [1, None, [1] * 9],
        [1, None, [[1]]],
        [1, None, 1.5],
        [1, None, msgspec.msgpack.Ext(1, b"short")],
        [1, None, msgspec.msgpack.Ext(2, bytes(16))],
        "a",
    ],
)
def test_what_is_not_quite_an_address_is_refused(written: Any):
    with pytest.raises(InvalidRef):
        decode_ref(msgspec.msgpack.encode(written))


@pytest.mark.parametrize("name", [1.5, (), (1,) * 9, ("a", None), True, "a" * MAX_REF_BYTES, 2**70])
def test_a_name_that_has_no_written_form_is_refused(name: Any):
    with pytest.raises(InvalidRef):
        encode_ref(NamedRef(name))


@attrs.frozen
class Ask:
    pass


@attrs.frozen
class AskOther:
    ref: AnyRef


class Subject(Actor):
    @handles(Ask)
    def ask(self, message: Ask) -> str:
        return self.context.label

    @handles(AskOther)
    async def ask_other(self, message: AskOther) -> Any:
        try:
            return await self.call(message.ref, Ask())
        except CallError as error:
            return Raise(error)


@pytest.fixture
def host() -> HeapHost:
    clock = VirtualClock()
    scheduler = Scheduler(clock=clock, randomness=SeededRandomness(1, "actors"), node="here")
    return HeapHost(scheduler, clock)


def test_a_name_means_whoever_has_it_when_the_message_is_sent(host: HeapHost):
    name = ("account", UUID(int=7))
    asker = host.scheduler.spawn(Subject())
    for ref in (NamedRef(name), NamedRef(name, "here"), decode_ref(encode_ref(NamedRef(name)))):
        first = host.scheduler.spawn(Subject(), name=name, label="first")
        assert host.call(ref, Ask()) == "first"
        assert host.call(asker, AskOther(ref)) == "first"
        host.scheduler.stop(first)
        assert not host.cast(ref, Ask())
        second = host.scheduler.spawn(Subject(), name=name, label="second")
        assert host.call(ref, Ask()) == "second"
        assert host.cast(ref, Ask())
        host.scheduler.stop(second)


def test_an_address_that_came_by_another_way_leads_to_the_same_actor(host: HeapHost):
    ref = host.scheduler.spawn(Subject(), label="me")
    assert host.call(decode_ref(encode_ref(ref)), Ask()) == "me"


def test_the_dead_and_the_unreachable_each_raise_their_own(host: HeapHost):
    asker = host.scheduler.spawn(Subject())
    dead = host.scheduler.spawn(Subject())
    host.scheduler.stop(dead)
    away: list[AnyRef] = [ActorRef("there", 1), NamedRef("directory", "there")]
    gone: list[AnyRef] = [dead, ActorRef("here", 99), NamedRef("nobody"), NamedRef("x", "here")]
    for refs_of, error in ((away, Unreachable), (gone, Dead)):
        for ref in refs_of:
            with pytest.raises(error):
                host.call(ref, Ask())
            with pytest.raises(error):
                host.call(asker, AskOther(ref))
            assert not host.cast(ref, Ask())
