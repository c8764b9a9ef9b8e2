from __future__ import annotations

from uuid import UUID

import attrs
from hypothesis import given
from hypothesis import strategies as st

from channel.frames import AGENT_FRAME_LIMIT, encode_frame
from channel.joining import split_join
from channel.messages import MAX_AUTHORIZATIONS, Held, Join

from .agents import JOIN


def holding(count: int) -> tuple[Held, ...]:
    return tuple(
        Held(authorization_id=UUID(int=n), connection_id=UUID(int=n)) for n in range(count)
    )


@given(count=st.integers(0, 3_000), name=st.text("a", min_size=1, max_size=255))
def test_the_frames_of_a_join_fit_and_say_everything_once(count: int, name: str) -> None:
    held = holding(count)
    first, more = split_join(attrs.evolve(JOIN, name=name, held=held))
    assert isinstance(first, Join)
    assert first.held + tuple(each for part in more for each in part.held) == held
    assert first.held_follow == bool(more)
    assert [part.more for part in more] == [True] * (len(more) - 1) + [False] * bool(more)
    assert all(part.held for part in more)
    for message in (first, *more):
        assert len(encode_frame(message, limit=AGENT_FRAME_LIMIT)) <= AGENT_FRAME_LIMIT + 4
    assert attrs.evolve(first, held=(), held_follow=False) == attrs.evolve(JOIN, name=name)


def test_a_join_mentions_no_more_than_an_agent_may_hold() -> None:
    first, more = split_join(attrs.evolve(JOIN, held=holding(MAX_AUTHORIZATIONS + 1)))
    assert isinstance(first, Join)
    assert len(first.held) + sum(len(part.held) for part in more) == MAX_AUTHORIZATIONS
