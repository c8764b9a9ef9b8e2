"""Which resources are being asked for, what waits for the answer, and what was denied lately.

A request holds the packets that wait for it, at most `MAX_WAITING_PACKETS`; the oldest goes
first. The same resource is asked for at most once a second, and again when no answer came within
the portal's own deadline; all resources together at most `ASK_BURST` at once and
`ASKS_PER_SECOND` thereafter. A core: time is passed in.
"""

from __future__ import annotations

from collections import deque
from uuid import UUID

import attrs

from tunnel.preshared import KemKey

SECOND_NS = 10**9
MAX_WAITING_PACKETS = 32
MAX_REQUESTS = 1_024
MAX_DENIALS = 1_024
# The portal tells a client `offline` after 15 s at the latest.
ANSWER_WITHIN_NS = 16 * SECOND_NS
ASK_INTERVAL_NS = SECOND_NS
ASKS_PER_SECOND = 10
ASK_BURST = 50
DENIAL_NS = 2 * SECOND_NS
MAX_DENIAL_NS = 60 * SECOND_NS
# How long `status` tells of a denial.
DENIAL_SHOWN_NS = 600 * SECOND_NS


@attrs.frozen(kw_only=True)
class Denial:
    """Why a resource was refused, and since when."""

    reason: str
    violated: tuple[str, ...]
    at_ns: int
    retry_after_ns: int

    def holds(self, now: int) -> bool:
        """Whether it is still to be answered from memory, without asking."""
        return now - self.at_ns < max(DENIAL_NS, min(self.retry_after_ns, MAX_DENIAL_NS))


@attrs.define(kw_only=True, eq=False)
class Request:
    """One resource that is wanted. `key` is the KEM key of the last question, if it was asked."""

    resource_id: UUID
    wanted_ns: int
    ask_at: int
    key: KemKey | None = None
    packets: deque[bytes] = attrs.field(factory=lambda: deque(maxlen=MAX_WAITING_PACKETS))


class Requests:
    """See the head of this file."""

    def __init__(self, now: int) -> None:
        self._request_by_resource: dict[UUID, Request] = {}
        self._asked_ns: dict[UUID, int] = {}
        self._unanswered: dict[UUID, KemKey] = {}
        self._denial_by_resource: dict[UUID, Denial] = {}
        self._tokens_ns = ASK_BURST * SECOND_NS
        self._tokens_at = now

    def want(self, resource_id: UUID, packet: bytes | None, now: int) -> None:
        """A packet (None: no packet yet) wants a resource."""
        request = self._request_by_resource.get(resource_id)
        if request is None:
            if len(self._request_by_resource) >= MAX_REQUESTS:
                return
            earliest = self._asked_ns.get(resource_id, now - ASK_INTERVAL_NS) + ASK_INTERVAL_NS
            request = Request(resource_id=resource_id, wanted_ns=now, ask_at=max(now, earliest))
            self._request_by_resource[resource_id] = request
        if packet is not None:
            request.packets.append(packet)

    def due(self, now: int) -> list[UUID]:
        """The resources to ask for now, as many as the rate allows; call `asked` for each."""
        refilled = self._tokens_ns + (now - self._tokens_at) * ASKS_PER_SECOND
        self._tokens_ns = min(ASK_BURST * SECOND_NS, refilled)
        self._tokens_at = now
        ready = [
            request.resource_id
            for request in self._request_by_resource.values()
            if request.ask_at <= now
        ]
        return ready[: self._tokens_ns // SECOND_NS]

    def asked(self, resource_id: UUID, key: KemKey, now: int) -> None:
        """The question was sent, with this key."""
        request = self._request_by_resource[resource_id]
        request.key = key
        request.ask_at = now + ANSWER_WITHIN_NS
        self._tokens_ns -= SECOND_NS
        if len(self._unanswered) >= MAX_REQUESTS and resource_id not in self._unanswered:
            del self._unanswered[next(iter(self._unanswered))]
        self._unanswered[resource_id] = key
        if len(self._asked_ns) >= MAX_REQUESTS:
            self._asked_ns.clear()
        self._asked_ns[resource_id] = now

    def key_of(self, resource_id: UUID) -> KemKey | None:
        """The key of a question that was not answered. It is asked again with the same: the answer
        to the first one may still come, and another key would make of it a preshared key that the
        gateway does not have, without a sign (ML-KEM rejects implicitly: FIPS 203, section 6.3)."""
        return self._unanswered.get(resource_id)

    def answered(self, resource_id: UUID) -> Request | None:
        """An authorisation came: take the request with what waits. None: nobody asked."""
        self._denial_by_resource.pop(resource_id, None)
        self._unanswered.pop(resource_id, None)
        return self._request_by_resource.pop(resource_id, None)

    def retry(self, request: Request, now: int) -> None:
        """The answer was of no use: ask again in a while."""
        request.ask_at = now + ASK_INTERVAL_NS
        request.key = None
        self._request_by_resource.setdefault(request.resource_id, request)

    def deny(self, resource_id: UUID, denial: Denial, now: int) -> list[bytes]:
        """A denial came: remember it; answers the packets that waited."""
        self._unanswered.pop(resource_id, None)
        shown = self._denial_by_resource
        for key in [key for key, old in shown.items() if now - old.at_ns > DENIAL_SHOWN_NS]:
            del shown[key]
        if len(shown) < MAX_DENIALS or resource_id in shown:
            shown[resource_id] = denial
        request = self._request_by_resource.pop(resource_id, None)
        return [] if request is None else list(request.packets)

    def denied(self, resource_id: UUID, now: int) -> bool:
        """Whether a denial is so fresh that nobody needs to be asked."""
        denial = self._denial_by_resource.get(resource_id)
        return denial is not None and denial.holds(now)

    def was_denied(self, resource_id: UUID) -> bool:
        """Whether policy forbade it when it was last asked for."""
        denial = self._denial_by_resource.get(resource_id)
        return denial is not None and denial.reason in ("forbidden", "not_found")

    def waiting_packets(self, resource_id: UUID) -> tuple[bytes, ...]:
        """What waits for a resource."""
        request = self._request_by_resource.get(resource_id)
        return () if request is None else tuple(request.packets)

    def take_packets(self, resource_id: UUID) -> list[bytes]:
        """The path came back: what waited may go, and nobody needs to be asked any more."""
        request = self._request_by_resource.get(resource_id)
        if request is None:
            return []
        packets = list(request.packets)
        request.packets.clear()
        if request.key is None:
            del self._request_by_resource[resource_id]
        return packets

    def take_stale(self, now: int) -> list[bytes]:
        """Packets for which no answer came in time; their requests end."""
        stale = [
            request
            for request in self._request_by_resource.values()
            if now - request.wanted_ns >= ANSWER_WITHIN_NS
        ]
        for request in stale:
            del self._request_by_resource[request.resource_id]
        return [packet for request in stale for packet in request.packets]

    def forget(self, resource_id: UUID) -> None:
        """The resource is gone."""
        self._request_by_resource.pop(resource_id, None)
        self._denial_by_resource.pop(resource_id, None)

    def channel_lost(self, now: int) -> None:
        """Answers to what was asked will not come: all is to be asked again."""
        self._asked_ns.clear()
        for request in self._request_by_resource.values():
            request.key = None
            request.ask_at = now

    def poll_timeout(self, now_asking: bool) -> int | None:
        """When `due` (while asking is possible) or `take_stale` has something to do."""
        instants: list[int] = []
        for request in self._request_by_resource.values():
            instants.append(request.wanted_ns + ANSWER_WITHIN_NS)
            if now_asking:
                instants.append(max(request.ask_at, self._next_token_at()))
        return min(instants, default=None)

    def denials(self) -> list[tuple[UUID, Denial]]:
        """What was denied lately."""
        return list(self._denial_by_resource.items())

    def waiting(self) -> list[UUID]:
        """The resources that are being asked for."""
        return list(self._request_by_resource)

    def _next_token_at(self) -> int:
        missing = SECOND_NS - self._tokens_ns
        return self._tokens_at + max(0, -(-missing // ASKS_PER_SECOND))
