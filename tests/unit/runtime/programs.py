"""Random programs for actors: sequences of steps that nest by calls, so that however they are run,
there is one right outcome. Several tests run the same program in two ways and compare."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs
from hypothesis import strategies as st

from runtime.actor import LATER, Actor, ActorError, ActorRef, Caller, Down, Raise, handles
from runtime.scheduler import Scheduler

ACTORS = 4


class Refused(Exception):
    """What a program refuses with."""


@attrs.frozen
class Count:
    """Cast: commutes with everything but an end, so it may arrive at any time."""

    amount: int


@attrs.frozen
class ReplyNow:
    caller: Caller
    value: int


@attrs.frozen
class Plain:
    """To be run by a plain handler."""

    steps: tuple[Any, ...]


@attrs.frozen
class Awaiting:
    """To be run by a coroutine handler."""

    steps: tuple[Any, ...]


class Node(Actor):
    """Runs steps, and writes down all that it sees."""

    def __init__(self, number: int, refs: list[ActorRef], effect: Callable[..., Awaitable[Any]]):
        self.number = number
        self.refs = refs
        self.effect = effect
        self.seen: list[Any] = []
        self.counted = 0
        self.downs: list[tuple[int, str]] = []
        self.ended: str | None = None

    def terminated(self, reason: str) -> None:
        self.ended = reason

    @handles(Count)
    def on_count(self, message: Count) -> None:
        self.counted += message.amount

    @handles(Down)
    def on_down(self, message: Down) -> None:
        self.downs.append((self.refs.index(message.ref), message.reason))

    @handles(ReplyNow)
    def on_reply_now(self, message: ReplyNow) -> None:
        self.seen.append(("replied later", self.reply(message.caller, message.value)))

    @handles(Plain)
    def on_plain(self, message: Plain) -> Any:
        result: Any = len(self.seen)
        for step in message.steps:
            match step:
                case ("note", value):
                    self.seen.append(value)
                case ("count", other, amount):
                    self.cast(self.refs[other], Count(amount))
                case ("crash",):
                    raise ValueError("by order")
                case ("refuse",):
                    return Raise(Refused("by order"))
                case ("stop", reason):
                    self.stop(reason)
                case ("reply early", value):
                    assert self.context.caller is not None
                    self.seen.append(("early", self.reply(self.context.caller, value)))
                case ("reply later", delay_ns):
                    assert self.context.caller is not None
                    if self.context.caller.waiting:  # else the timer would race with its next call
                        self.send_after(delay_ns, ReplyNow(self.context.caller, len(self.seen)))
                    return LATER
                case ("link", other):
                    self.link(self.refs[other])
                case ("monitor", other):
                    self.monitor(self.refs[other])
                case ("kill", other):
                    self.seen.append(("killed", self.stop_actor(self.refs[other], "killed")))
        return result

    @handles(Awaiting)
    async def on_awaiting(self, message: Awaiting) -> Any:
        for step in message.steps:
            match step:
                case ("plain", other, steps):
                    self.seen.append(await self.asked(other, Plain(steps)))
                case ("awaiting", other, steps):
                    self.seen.append(await self.asked(other, Awaiting(steps)))
                case ("perform", value):
                    try:
                        self.seen.append(await self.perform(self.effect, value))
                    except ZeroDivisionError:
                        self.seen.append("divided by zero")
                case ("sleep", duration_ns):
                    await self.sleep(duration_ns)
                case ("crash",):
                    raise ValueError("by order")
                case ("refuse",):
                    return Raise(Refused("by order"))
        return len(self.seen)

    async def asked(self, other: int, message: object) -> Any:
        try:
            return await self.call(self.refs[other], message)
        except (ActorError, Refused) as error:
            return f"{type(error).__name__}: {error}"


others = st.integers(0, ACTORS - 1)
delays = st.sampled_from([0, 1_000, 20_000])
plain_steps = st.lists(
    st.one_of(
        st.tuples(st.just("note"), st.integers(0, 9)),
        st.tuples(st.just("count"), others, st.integers(1, 9)),
        st.sampled_from([("crash",), ("refuse",), ("stop", "normal"), ("reply early", 7)]),
        st.tuples(st.just("reply later"), delays),
        st.tuples(st.sampled_from(["kill", "link", "monitor"]), others),
    ),
    max_size=4,
).map(tuple)
awaiting_steps = st.recursive(
    st.lists(st.tuples(st.just("plain"), others, plain_steps), max_size=3).map(tuple),
    lambda inner: st.lists(
        st.one_of(
            st.tuples(st.just("awaiting"), others, inner),
            st.tuples(st.just("plain"), others, plain_steps),
            st.tuples(st.just("perform"), st.integers(0, 5)),
            st.tuples(st.just("sleep"), delays),
            st.sampled_from([("crash",), ("refuse",)]),
        ),
        max_size=5,
    ).map(tuple),
    max_leaves=12,
)
programs = st.lists(st.tuples(others, awaiting_steps), min_size=1, max_size=4)


def build(scheduler: Scheduler, effect: Callable[..., Awaitable[Any]]) -> list[Node]:
    """ACTORS nodes that know each other."""
    refs: list[ActorRef] = []
    nodes = [Node(number, refs, effect) for number in range(ACTORS)]
    refs.extend(scheduler.spawn(node, label=f"node {node.number}") for node in nodes)
    return nodes


def outcome(nodes: list[Node]) -> list[tuple[Any, ...]]:
    """All that the nodes have become. What was cast to one that has ended may have come too late,
    so it does not count; nor do the monitors of one."""
    return [
        (list(node.seen), node.counted, sorted(node.downs), None)
        if node.ended is None
        else (list(node.seen), node.ended)
        for node in nodes
    ]
