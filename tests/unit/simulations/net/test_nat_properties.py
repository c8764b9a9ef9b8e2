"""The NAT beside a slow model of RFC 4787 that keeps the whole history and no table.

The model is written from the definitions alone: it knows what was translated, when, and what came
back; whether a packet from outside may pass follows from that history.
"""

from __future__ import annotations

from typing import get_args

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.net.address import Address
from simulations.net.nat import Behaviour, Nat, NatBehaviour
from simulations.net.packets import TCP, UDP

NS = 10**9
TIMEOUT = 30 * NS
PUBLIC = ("198.51.100.2", "198.51.100.3")
INSIDES = [Address("192.168.1.10", 4_000), Address("192.168.1.11", 4_000),
           Address("192.168.1.10", 500)]  # fmt: skip
PEERS = [Address("203.0.113.2", 3_478), Address("203.0.113.2", 3_479), Address("203.0.113.6", 9)]

behaviours = st.builds(
    NatBehaviour,
    mapping=st.sampled_from(get_args(Behaviour)),
    filtering=st.sampled_from(get_args(Behaviour)),
    ports=st.sampled_from(["preserve", "random", "sequential", "range"]),
    hairpinning=st.sampled_from(["none", "internal", "external"]),
    inbound_refresh=st.booleans(),
    inbound_binding=st.booleans(),
    reply_binding=st.booleans(),
    public_addresses=st.sampled_from([1, 2]),
    keeps_parity=st.booleans(),
    timeout_ns=st.just(TIMEOUT),
    tcp_timeout_ns=st.just(TIMEOUT),
    block_ns=st.just(TIMEOUT),
    range_ports=st.just(6),
    first_port=st.just(4_000),
    last_port=st.just(4_015),
)
steps = st.lists(
    st.tuples(
        st.sampled_from(["out", "out", "in", "in", "wait", "forget"]),
        st.sampled_from([UDP, UDP, UDP, TCP]),
        st.sampled_from(INSIDES),
        st.sampled_from(PEERS),
        st.integers(0, 8),
    ),
    min_size=30,
    max_size=80,
)


@attrs.define
class Crossing:
    """A packet that left: who, to whom, as whom, and when it (or what it let in) moved last. An
    `answer` left from where it was reached, which says nothing of mappings."""

    protocol: int
    inside: Address
    peer: Address
    outside: Address
    at: int
    answer: bool = False


@attrs.define
class History:
    """All that crossed since the NAT forgot, and what RFC 4787 makes of it."""

    behaviour: NatBehaviour
    crossings: list[Crossing] = attrs.field(factory=list)
    dropped: list[Crossing] = attrs.field(factory=list)
    questions: list[Crossing] = attrs.field(factory=list)

    def live(self, protocol: int, now: int) -> list[Crossing]:
        return [c for c in self.crossings if c.protocol == protocol and now - c.at <= TIMEOUT]

    def holder(self, protocol: int, outside: Address, now: int) -> Address | None:
        """Who inside has an outside address (section 4.3: while it is refreshed)."""
        holders = {c.inside for c in self.live(protocol, now) if c.outside == outside}
        assert len(holders) <= 1, "two inside flows share an outside port"
        return holders.pop() if holders else None

    def admits(self, protocol: int, outside: Address, source: Address, now: int) -> bool:
        """Section 5: what may come in to a mapping."""
        sent = [c.peer for c in self.live(protocol, now) if c.outside == outside]
        match self.behaviour.filtering:
            case "endpoint_independent":
                return bool(sent)
            case "address_dependent":
                return source.host in {peer.host for peer in sent}
            case _:
                return source in sent

    def shuts_out(self, protocol: int, outside: Address, source: Address, now: int) -> bool:
        """The race of masquerade: what was dropped holds its place for a while."""
        return self.behaviour.inbound_binding and any(
            (c.protocol, c.outside, c.peer) == (protocol, outside, source) and now - c.at <= TIMEOUT
            for c in self.dropped
        )

    def answers_from(
        self, protocol: int, inside: Address, peer: Address, now: int
    ) -> Address | None:
        """Connection tracking: where the last packet of that peer came in, while that is known and
        its mapping has held all the time."""
        if not self.behaviour.reply_binding:
            return None
        for c in reversed(self.questions):
            if (c.protocol, c.inside, c.peer) == (protocol, inside, peer):
                holds = self.holder(protocol, c.outside, now) == inside
                return c.outside if holds and now - c.at <= TIMEOUT else None
        return None

    def came_in(self, protocol: int, outside: Address, source: Address, now: int) -> None:
        """Section 4.3, inbound refresh: of the mapping, and of the flow to that peer or host."""
        if not self.behaviour.inbound_refresh:
            return
        for c in self.live(protocol, now):
            if c.outside != outside:
                continue
            if c.peer == source:
                c.at = now
        # The mapping as such, and the host: seen as crossings that nothing but them needs.
        inside = self.holder(protocol, outside, now)
        assert inside is not None
        hosts = {c.peer.host for c in self.live(protocol, now) if c.outside == outside}
        nobody = Address(source.host if source.host in hosts else "nobody", -1)
        self.crossings.append(Crossing(protocol, inside, nobody, outside, now))


def same_mapping(behaviour: NatBehaviour, one: Address, other: Address) -> bool:
    """Section 4.1: whether two destinations share the mapping of one inside address."""
    match behaviour.mapping:
        case "endpoint_independent":
            return True
        case "address_dependent":
            return one.host == other.host
        case _:
            return one == other


@settings(max_examples=max(200, settings.default.max_examples))
@given(behaviours, steps, st.integers(0, 3))
def test_every_packet_fares_as_rfc_4787_defines(
    behaviour: NatBehaviour, actions: list[tuple[str, int, Address, Address, int]], seed: int
) -> None:
    box = Nat("box", PUBLIC[: behaviour.public_addresses], behaviour, seed=seed)
    history = History(behaviour)
    now = 0
    for what, protocol, inside, peer, number in actions:
        if what == "wait":
            now += (number * 4 + 1) * NS
        elif what == "forget" and number == 0:
            box.forget()
            history = History(behaviour)
        elif what == "out":
            leave(box, history, protocol, inside, peer, now)
        elif what == "in":
            enter(box, history, protocol, peer, number, now)


def leave(
    box: Nat, history: History, protocol: int, inside: Address, peer: Address, now: int
) -> None:
    behaviour = history.behaviour
    bound = history.answers_from(protocol, inside, peer, now)
    if bound is not None:
        assert box.outbound(protocol, inside, peer, now) == bound
        history.crossings.append(Crossing(protocol, inside, peer, bound, now, answer=True))
        for question in history.questions:
            if (question.protocol, question.inside, question.peer) == (protocol, inside, peer):
                question.at = now
        return
    alike = [
        c
        for c in history.live(protocol, now)
        if c.inside == inside
        and c.peer.port > 0
        and not c.answer
        and same_mapping(behaviour, c.peer, peer)
    ]
    outside = box.outbound(protocol, inside, peer, now)
    if outside is None:
        assert not alike or behaviour.inbound_binding, "a flow that has a mapping keeps it"
        return
    assert outside.host in box.addresses
    if not behaviour.inbound_binding and alike:
        assert outside in {c.outside for c in alike}
    low = behaviour.ports == "preserve" and inside.port < 1_024
    assert (1 <= outside.port < 1_024) if low else (4_000 <= outside.port <= 4_015)
    holder = history.holder(protocol, outside, now)
    assert holder in (None, inside), "an outside port was taken from another flow"
    if holder == inside and not same_or_remapped(history, protocol, outside, peer, now):
        raise AssertionError("two mappings of one inside address share an outside port")
    history.crossings.append(Crossing(protocol, inside, peer, outside, now))


def same_or_remapped(
    history: History, protocol: int, outside: Address, peer: Address, now: int
) -> bool:
    """Whether all that uses an outside address belongs to the mapping of that peer."""
    return all(
        c.peer.port < 0 or c.answer or same_mapping(history.behaviour, c.peer, peer)
        for c in history.live(protocol, now)
        if c.outside == outside
    )


def enter(
    box: Nat, history: History, protocol: int, source: Address, number: int, now: int
) -> None:
    known = sorted({c.outside for c in history.crossings})
    candidates = [*known, Address(PUBLIC[0], 4_000), Address(PUBLIC[-1], 4_001)]
    outside = candidates[number % len(candidates)]
    holder = history.holder(protocol, outside, now)
    got = box.inbound(protocol, source, outside, now)
    if holder is None:
        assert got is None
        assert box.refusal == "nat no mapping"
    elif history.admits(protocol, outside, source, now) and not history.shuts_out(
        protocol, outside, source, now
    ):
        assert got == holder
        history.came_in(protocol, outside, source, now)
        history.questions.append(Crossing(protocol, holder, source, outside, now))
    else:
        assert got is None
        assert box.refusal == "nat filter"
    if got is None:
        history.dropped.append(Crossing(protocol, outside, source, outside, now))
