"""A join in as many frames as it takes.

A frame of an agent has 64 KiB at most, which is room for some 550 held authorisations. A join that
holds more says so (`held_follow`), and the rest follows, a frame for each time that the portal
asks for it; it does so only after it has checked who joins.
"""

from __future__ import annotations

import attrs

from channel.frames import AGENT_FRAME_LIMIT, encode_frame
from channel.messages import MAX_AUTHORIZATIONS, Held, Join, MoreHeld, RelayJoin

_ROOM_FOR_MORE = (AGENT_FRAME_LIMIT - 256) // 160
"""Held authorisations in a `MoreHeld`: each has less than 160 bytes, the rest less than 256."""


def split_join(join: Join | RelayJoin) -> tuple[Join | RelayJoin, tuple[MoreHeld, ...]]:
    """The frame to begin with, and those to follow when they are asked for.

    Above MAX_AUTHORIZATIONS held ones are not mentioned, and thereby given up.
    """
    if isinstance(join, RelayJoin) or not join.held:
        return join, ()
    held = join.held[:MAX_AUTHORIZATIONS]
    room = _room(attrs.evolve(join, held=(), held_follow=True), held[0])
    first, rest = held[:room], held[room:]
    pieces = [rest[at : at + _ROOM_FOR_MORE] for at in range(0, len(rest), _ROOM_FOR_MORE)]
    more = tuple(
        MoreHeld(held=piece, more=number < len(pieces)) for number, piece in enumerate(pieces, 1)
    )
    return attrs.evolve(join, held=first, held_follow=bool(more)), more


def _room(join: Join, one: Held) -> int:
    """How many held ones fit into the join; every identifier has the same length."""
    empty, filled = (
        len(encode_frame(attrs.evolve(join, held=held), limit=AGENT_FRAME_LIMIT))
        for held in ((), (one,))
    )
    return (AGENT_FRAME_LIMIT - empty) // (filled - empty + 1)  # a comma stands between two
