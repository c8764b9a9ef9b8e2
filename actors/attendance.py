"""Who is connected to an account: one side (clients, or gateways), as its actor knows it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Literal
from uuid import UUID

import attrs

from channel.messages import IpText, Resource
from runtime.actor import ActorRef


@attrs.define(kw_only=True, eq=False)
class OnlineAgent:
    """A connected client or gateway; `number` orders the connections of one device.

    `version` of the protocol is what it agreed on at its join.
    `load` and `suspect_until_ns` speak of gateways, `visible` (what it was told to see) of clients.
    """

    kind: Literal["client", "gateway"]
    id: UUID
    ref: ActorRef
    number: int
    token_id: UUID
    tunnel_key: bytes
    version: int
    incarnation: int
    remote: IpText
    since: datetime
    token_expires_at: datetime | None = None
    visible: dict[UUID, Resource] = attrs.Factory(dict)
    load: int = 0
    suspect_until_ns: int = 0


class Attendance:
    """At most one connection of each device."""

    def __init__(self) -> None:
        self._by_id: dict[UUID, OnlineAgent] = {}
        self._by_ref: dict[ActorRef, OnlineAgent] = {}
        self._by_token: dict[UUID, dict[UUID, OnlineAgent]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[OnlineAgent]:
        return iter(tuple(self._by_id.values()))

    def get(self, id: UUID) -> OnlineAgent | None:
        return self._by_id.get(id)

    def current(self, id: UUID, number: int) -> OnlineAgent | None:
        """The device, if this connection of it is the one that stands."""
        online = self._by_id.get(id)
        return online if online is not None and online.number == number else None

    def by_ref(self, ref: ActorRef) -> OnlineAgent | None:
        return self._by_ref.get(ref)

    def by_token(self, token_id: UUID) -> tuple[OnlineAgent, ...]:
        """Those that came by this token."""
        return tuple(self._by_token.get(token_id, {}).values())

    def put(self, online: OnlineAgent) -> None:
        """In place of an older connection of the same device."""
        before = self._by_id.get(online.id)
        if before is not None:
            self.remove(before)
        self._by_id[online.id] = online
        self._by_ref[online.ref] = online
        self._by_token.setdefault(online.token_id, {})[online.id] = online

    def remove(self, online: OnlineAgent) -> None:
        """Harmless if it is gone."""
        if self._by_id.get(online.id) is online:
            del self._by_id[online.id]
            self._by_ref.pop(online.ref, None)
            of_token = self._by_token[online.token_id]
            del of_token[online.id]
            if not of_token:
                del self._by_token[online.token_id]
