"""Which pairs must get a direct path: from RFC 4787, RFC 8445 and reasoning, not from the code.

Nothing of Holloway is imported here (a test checks it), so that the simulator, the kernel and the
product are judged by something that does not share their mistakes. What is assumed of two agents:

- Each has one UDP socket. A server outside of every NAT told it its reflexive address, and it told
  the other one. Both send checks to all addresses of the other that they know, again and again.
- Who is reached from an unknown address knows it from then on (peer-reflexive, RFC 8445, 7.3.1.3).
- An answer counts only if it comes from the very address to which the check went (7.2.5.2.1).
- A private address is tried only on the own subnet.

The theory
----------
Write r(X) for the reflexive address of X, and x for the address from which its packets to r(Y)
come; they are the same if and only if every NAT of X maps independently of the endpoint. A packet
from x to r(Y) passes a NAT of Y that filters

- not at all;
- by address, if the inside endpoint that r(Y) stands for has sent to X's address before. Y sends to
  r(X); but whether that was the same inside endpoint depends: with the filter of RFC 4787 (section
  5), which is of the inside endpoint, it was, unless a NAT further in maps by endpoint; where a
  filter is of one mapping, only if this NAT itself does not map by endpoint either;
- by address and port, if that holds and x = r(X).

If neither hears the other so, none ever learns another address, and there is no path. If Y hears x,
then it answers. It does so from r(Y), and all is well, if no NAT of Y maps by endpoint, or each
that does takes the way back that the packet came (`reply_binding`, as connection tracking does).
Else the answer comes from another port of Y's: X hears it unless a NAT of X filters by port, and
tries that port too. If one side maps by address only, ports stand still from then on. If both map
by address and port, each answer comes from one more new port, and no check is ever answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

import attrs

Behaviour = Literal["endpoint_independent", "address_dependent", "address_and_port_dependent"]
Transport = Literal["udp", "stream"]
PathKind = Literal["direct", "relayed", "none"]

_STRICTNESS: Final[dict[Behaviour, int]] = {
    "endpoint_independent": 0,
    "address_dependent": 1,
    "address_and_port_dependent": 2,
}
_INDEPENDENT, _BY_ADDRESS, _BY_PORT = range(3)


@attrs.frozen(kw_only=True)
class Nat:
    """One NAT, as RFC 4787 describes it.

    `filters_per`: whether what an inside endpoint sent through one of its mappings opens the filter
    of all of them ("endpoint", as the RFC has it) or of that one only.
    `inbound_binding`: a packet from outside that is not let in takes the place of a binding: it
    never gets in afterwards, and the own flow to its sender cannot have that port (Linux'
    `masquerade` without a rule that drops such packets early).
    `reply_binding`: answers to a packet that was let in leave from the address at which it came,
    whatever the mapping of other packets is (connection tracking).
    """

    mapping: Behaviour = "endpoint_independent"
    filtering: Behaviour = "address_and_port_dependent"
    ports: Literal["preserve", "random", "sequential", "range"] = "preserve"
    hairpinning: Literal["none", "internal_source", "external_source"] = "none"
    filters_per: Literal["endpoint", "mapping"] = "endpoint"
    inbound_binding: bool = False
    reply_binding: bool = False


@attrs.frozen(kw_only=True)
class Side:
    """Where one agent stands. `nats`: those on its way out, the nearest first.

    `udp`: "relays" is a firewall that lets UDP out to the ports of relays only. `streams`: whether
    connections to a relay, over TCP or QUIC, get out.
    `ipv6`: whether it has a global IPv6 address, without translation, behind a stateful firewall or
    none.
    """

    nats: tuple[Nat, ...] = ()
    udp: Literal["open", "relays", "blocked"] = "open"
    streams: bool = True
    ipv6: bool = False


@attrs.frozen(kw_only=True)
class Abilities:
    """What the agents can do beyond ICE. None of it is in this version of the product.

    `birthday_probing`: the side whose address stands still guesses the port of the other.
    `port_prediction`: it does where ports are assigned in sequence.
    """

    birthday_probing: bool = False
    port_prediction: bool = False


@attrs.frozen
class Verdict:
    """The path that the two must have in the end, and why. `may_be_direct`: it is left to chance,
    since it depends on whose first packet is where when; `path` is what is certain."""

    path: PathKind
    why: str
    may_be_direct: bool = False


def judge(
    one: Side,
    other: Side,
    *,
    shared_nats: int = 0,
    same_lan: bool = False,
    relay_transports: Sequence[Transport] = ("udp", "stream"),
    abilities: Abilities = Abilities(),
) -> Verdict:
    """The path between two agents; the order of the two does not matter.

    `shared_nats`: how many of their outermost NATs are the same machines. `same_lan`: they are in
    one subnet. `relay_transports`: by what a relay can be reached; none, if there is no relay.
    Raises ValueError if so many NATs cannot be shared.
    """
    if not 0 <= shared_nats <= min(len(one.nats), len(other.nats)):
        raise ValueError(f"{shared_nats} NATs cannot be shared")
    if shared_nats and one.nats[-shared_nats:] != other.nats[-shared_nats:]:
        raise ValueError("what is shared behaves in one way")
    if same_lan:
        return Verdict("direct", "both are in one subnet and know each other's own addresses")
    direct, why = _direct(one, other, shared_nats, abilities)
    if direct == "always":
        return Verdict("direct", why)
    path, reason = _relayed(one, other, relay_transports)
    return Verdict(path, f"{why}; {reason}", may_be_direct=direct == "sometimes")


# --- what is needed of the networks ---------------------------------------------------------------

_Chance = Literal["always", "sometimes", "never"]


def _direct(one: Side, other: Side, shared: int, abilities: Abilities) -> tuple[_Chance, str]:
    closed = [side for side in (one, other) if side.udp != "open"]
    if closed:
        return "never", "a firewall lets no UDP out to the other end"
    if one.ipv6 and other.ipv6:
        return "always", "both have IPv6: ports are not translated, and both firewalls are opened"
    if shared:
        hairpinning = one.nats[-1].hairpinning
        if hairpinning == "none":
            return "never", "the NAT that both share does not hairpin"
        if hairpinning == "internal_source":
            return "never", "the hairpinning NAT shows the inside address, which is not answered"
    return _punch(one.nats, other.nats, abilities)


def _relayed(one: Side, other: Side, transports: Sequence[Transport]) -> tuple[PathKind, str]:
    if not transports:
        return "none", "and there is no relay"
    for side in (one, other):
        by_datagrams = "udp" in transports and side.udp != "blocked"
        by_streams = "stream" in transports and side.streams
        if not (by_datagrams or by_streams):
            return "none", "and one end can reach no relay"
    return "relayed", "a relay carries it"


# --- hole punching --------------------------------------------------------------------------------


def _punch(one: Sequence[Nat], other: Sequence[Nat], abilities: Abilities) -> tuple[_Chance, str]:
    """The three orders that matter: the first checks cross, or one side's come too early."""
    a, b = _Stack(one), _Stack(other)
    outcomes = [
        _meet(a, b, spoilt=None, abilities=abilities),
        _meet(a, b, spoilt=b, abilities=abilities),
        _meet(b, a, spoilt=a, abilities=abilities),
    ]
    if all(outcomes):
        return "always", _why_direct(a, b)
    if any(outcomes):
        return "sometimes", "a check that comes too early takes the place of a binding"
    return "never", _why_not(a, b)


class _Stack:
    """The NATs of one side, as one. The strictest decides on each axis, but for what a filter takes
    for one inside endpoint: what is outside of a NAT that maps by endpoint sees several."""

    def __init__(self, nats: Sequence[Nat]) -> None:
        self.mapping = _strictest(nat.mapping for nat in nats)
        self.answering = _strictest(nat.mapping for nat in nats if not nat.reply_binding)
        by_endpoint = [nat for nat in nats if nat.mapping != "endpoint_independent"]
        self.answers_as_it_sends = not (by_endpoint and by_endpoint[0].reply_binding)
        self.filtering = _strictest(nat.filtering for nat in nats)
        self.sequential = all(nat.ports == "sequential" for nat in by_endpoint)
        self.layers: list[tuple[int, bool]] = []
        within = _INDEPENDENT
        for nat in nats:
            mapped = max(within, _STRICTNESS[nat.mapping])
            scope = within if nat.filters_per == "endpoint" else mapped
            self.layers.append((_STRICTNESS[nat.filtering], scope == _INDEPENDENT))
            within = mapped
        self.spoils, self.moves_when_spoilt = _early(nats)

    @property
    def stands_still(self) -> bool:
        return self.mapping == _INDEPENDENT

    def hears_first(self, *, from_reflexive: bool) -> bool:
        """Whether a check of the peer to the reflexive address gets in, once we have sent to the
        peer's. `from_reflexive`: it comes from the address that we know of the peer."""
        return all(
            filtering == _INDEPENDENT
            or (one_endpoint and (filtering == _BY_ADDRESS or from_reflexive))
            for filtering, one_endpoint in self.layers
        )


def _early(nats: Sequence[Nat]) -> tuple[bool, bool]:
    """What a check does that comes before we sent anything: whether it takes the place of a binding
    (at the outermost NAT that filters), and whether our flow to its sender wanted that place."""
    mapped = [_strictest(nat.mapping for nat in nats[: n + 1]) for n in range(len(nats))]
    for nat, mapping in reversed(list(zip(nats, mapped, strict=True))):
        if nat.filtering != "endpoint_independent":
            return nat.inbound_binding, nat.inbound_binding and mapping == _INDEPENDENT
    return False, False


def _meet(x: _Stack, y: _Stack, *, spoilt: _Stack | None, abilities: Abilities) -> bool:
    """Whether a check is answered. `spoilt` is `y` where the first check of `x` comes before `y`
    has sent anything; None: each sends before the other's first check comes."""
    too_early = spoilt is y and y.spoils
    moved = too_early and x.stands_still and y.moves_when_spoilt
    y_from_reflexive = y.stands_still and not moved
    # What x answers comes from the address of its first check, which is shut out for good.
    shut_out = (
        too_early
        and y.moves_when_spoilt
        and x.answers_as_it_sends
        and (y_from_reflexive or x.mapping != _BY_PORT)
    )
    if x.hears_first(from_reflexive=y_from_reflexive or _guesses(x, y, abilities)) and (
        x.answering == _INDEPENDENT
        or (y.filtering != _BY_PORT and not shut_out and _one_settles(x, y))
    ):
        return True
    if too_early:
        return False
    return y.hears_first(from_reflexive=x.stands_still or _guesses(y, x, abilities)) and (
        y.answering == _INDEPENDENT or (x.filtering != _BY_PORT and _one_settles(x, y))
    )


def _one_settles(x: _Stack, y: _Stack) -> bool:
    return not x.answering == y.answering == _BY_PORT


def _guesses(steady: _Stack, hard: _Stack, abilities: Abilities) -> bool:
    """Whether `steady`, whose own address stands still, can send to the port of `hard` that is
    meant for it before it has heard from there."""
    if not steady.stands_still or hard.stands_still:
        return False
    return abilities.birthday_probing or (abilities.port_prediction and hard.sequential)


def _strictest(behaviours: Iterable[Behaviour]) -> int:
    return max((_STRICTNESS[each] for each in behaviours), default=_INDEPENDENT)


# --- in words -------------------------------------------------------------------------------------


def _why_direct(a: _Stack, b: _Stack) -> str:
    if a.stands_still and b.stands_still:
        return "both map independently of the endpoint: each opens its own filter for the other"
    if a.stands_still or b.stands_still:
        return "one maps by endpoint, but the other's filter lets its unknown port in"
    return "both map by endpoint, but a filter lets an unknown port in and the answers settle"


def _why_not(a: _Stack, b: _Stack) -> str:
    if a.filtering == b.filtering == _BY_PORT and not (a.stands_still or b.stands_still):
        return "both map by endpoint and filter by port: neither hears the other"
    if a.answering == b.answering == _BY_PORT:
        return "both map by address and port: every answer comes from a new port"
    if _BY_PORT in (a.filtering, b.filtering):
        return "one maps by endpoint, and the other filters by port: it never hears that port"
    return "the filters are of single mappings, and the ones that are opened are known to nobody"
