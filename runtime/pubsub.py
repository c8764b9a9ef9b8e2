"""Publish and subscribe on one node: a topic is a list of actors that want to know."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import attrs

from runtime.context import DEAD, Context
from runtime.errors import Dead
from runtime.refs import ActorRef

if TYPE_CHECKING:
    from runtime.mailroom import Mailroom


@attrs.frozen(kw_only=True)
class PubSubStatistics:
    """Topics and subscriptions now; messages published, taken and refused since the start."""

    topics: int
    subscriptions: int
    published: int
    delivered: int
    refused: int


class PubSub:
    """A published message is cast to every subscriber, in the order of subscription, under the
    rules of a cast: a full mailbox does not get it (counted), so it is a hint, never the truth.
    A subscription ends with its actor."""

    def __init__(self, scheduler: Mailroom) -> None:
        self._scheduler = scheduler
        self._contexts_by_topic: dict[Hashable, dict[Context, None]] = {}
        self._published = 0
        self._delivered = 0
        self._refused = 0

    def subscribe(self, topic: Hashable, ref: ActorRef) -> None:
        """Add `ref` to the topic; again is harmless. Raises Dead if it has ended."""
        context = self._scheduler.resolve(ref)
        if context is None or context._state == DEAD:
            raise Dead(repr(ref))
        self._contexts_by_topic.setdefault(topic, {})[context] = None
        extras = context._own()
        if extras.topics is None:
            extras.topics = {}
        extras.topics[topic] = None

    def unsubscribe(self, topic: Hashable, ref: ActorRef) -> None:
        """Take `ref` off the topic; harmless if it is not on it."""
        context = self._scheduler.resolve(ref)
        topics = None if context is None else context._extras.topics
        if context is None or topics is None or topic not in topics:
            return
        del topics[topic]
        self._remove(topic, context)

    def publish(self, topic: Hashable, message: object) -> int:
        """Cast `message` to all subscribers of `topic`; says how many took it."""
        self._published += 1
        subscribers = self._contexts_by_topic.get(topic)
        if subscribers is None:
            return 0
        cast = self._scheduler.cast
        taken = sum(cast(context.ref, message) for context in subscribers)
        self._delivered += taken
        self._refused += len(subscribers) - taken
        return taken

    def subscribers(self, topic: Hashable) -> tuple[ActorRef, ...]:
        """Who is on the topic, the oldest subscription first."""
        return tuple(context.ref for context in self._contexts_by_topic.get(topic, ()))

    def statistics(self) -> PubSubStatistics:
        return PubSubStatistics(
            topics=len(self._contexts_by_topic),
            subscriptions=sum(map(len, self._contexts_by_topic.values())),
            published=self._published,
            delivered=self._delivered,
            refused=self._refused,
        )

    def _remove(self, topic: Hashable, context: Context) -> None:
        subscribers = self._contexts_by_topic[topic]
        del subscribers[context]
        if not subscribers:
            del self._contexts_by_topic[topic]

    def _forget(self, context: Context) -> None:
        for topic in context._extras.topics or ():
            self._remove(topic, context)
