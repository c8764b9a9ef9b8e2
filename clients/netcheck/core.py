"""How the way out of this machine treats UDP, asked of STUN servers: a core, for one IP family.

    servers    from one socket a Binding request to each server: reachable or not, the round trip,
               and where the packet came from, whose differences tell how a NAT maps
    ports      from further sockets one to the best server: how ports are assigned; and where the
               servers did not tell what a mapping depends on, to that one's other address and
               port, if it offers OTHER-ADDRESS (RFC 5780, section 4.3)
    doors      what comes in: hairpinning (both ways between own mapped addresses), and filtering
               where the server offers OTHER-ADDRESS (RFC 5780, section 4.4)

Nothing goes to an address that was not named, but to the own one, which at least two servers have
to agree on, and to one OTHER-ADDRESS, which may not be in a private network, this machine, or a
port below 1024. At most MAX_PACKETS are sent and MAX_RECEIVED looked at. An answer counts if it
bears one of the 96-bit transaction ids that are out on that socket and comes from where it has to.
Each transmission has an id of its own, so that the round trip is that of one packet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import attrs

from clients.netcheck.findings import (
    Answer,
    FamilyFinding,
    Filtering,
    Hairpinning,
    MappingBehaviour,
    Nat,
    ServerFinding,
    Udp,
    filtering_of,
    hairpinning_of,
    is_translated,
    mapping_of,
    may_be_asked,
    may_be_other,
    ports_of,
)
from relays.stun import (
    TRANSACTION_ID_BYTES,
    Attribute,
    MessageClass,
    Method,
    StunError,
    StunMessage,
)
from runtime.clock import NS_PER_MS
from runtime.net.address import Address
from runtime.randomness import Randomness

MAIN: Final = 0
"""The socket that asks all servers, the others ask one."""
FILTER_SOCKET: Final = 1
PARTNER: Final = 2
"""The socket that exchanges packets with MAIN by way of the NAT."""
SOCKETS: Final = 6
MAX_ENDPOINTS: Final = 12
"""Addresses of servers, of one family."""
TRIES: Final = 3
FIRST_WAIT_NS: Final = 250 * NS_PER_MS
"""For an answer; doubled with each try."""
PACE_NS: Final = 20 * NS_PER_MS
MAX_PACKETS: Final = TRIES * (MAX_ENDPOINTS + (SOCKETS - 1) + 2 + 2 + 2)
"""All that there is to ask, each as often as can be: servers, ports, a server's other address,
filtering, hairpinning."""
MAX_RECEIVED: Final = 512
MAX_ANSWER_BYTES: Final = 1_500

_CHANGE_PORT: Final = 0x2
_CHANGE_BOTH: Final = 0x6

Purpose = Literal["server", "ports", "mapping", "other_host", "other_port", "hairpin"]
Transmit = tuple[int, bytes, Address]
"""Number of the socket, datagram, destination."""


@attrs.frozen
class Endpoint:
    """One address of a server, and the name by which it was named."""

    name: str
    address: Address


@attrs.define(eq=False)
class _Question:
    """A request that is sent up to TRIES times; `ids` are its transactions and when they left."""

    purpose: Purpose
    socket: int
    destination: Address
    next_at: int
    change: int = 0
    ids: dict[bytes, int] = attrs.Factory(dict)
    is_over: bool = False


class Netcheck:
    """See the head of this file.

    `endpoints` are those of one family (at most MAX_ENDPOINTS), `locals_` maps the numbers of
    SOCKETS sockets to the real addresses to which they are bound. Drain `transmits` after each
    call; it is over when `poll_timeout` is None.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        locals_: Mapping[int, Address],
        *,
        randomness: Randomness,
        now: int,
    ) -> None:
        if not 0 < len(endpoints) <= MAX_ENDPOINTS or len(locals_) != SOCKETS:
            raise ValueError(f"1 to {MAX_ENDPOINTS} endpoints and {SOCKETS} sockets are needed")
        self.transmits: list[Transmit] = []
        self.packets_sent = 0
        self._received = 0
        self._endpoints = tuple(endpoints)
        self._locals = dict(locals_)
        self._randomness = randomness
        self._round_trips: dict[Address, int] = {}
        self._errors: dict[Address, int] = {}
        self._seen: dict[Address, Answer] = {}
        self._samples: dict[int, Answer] = {}
        self._other: dict[Address, Address] = {}
        self._elsewhere: dict[Address, Answer] = {}
        self._heard: set[Purpose] = set()
        self._unheeded = False
        self._hairpinned: list[Address] = []
        self._notes: list[str] = []
        self._chosen: Address | None = None
        self._steps = iter((self._ask_ports, self._ask_doors))
        self._questions: list[_Question] = []
        self._ask("server", ((MAIN, one.address) for one in self._endpoints), now)
        self.handle_timeout(now)

    # --- the core's interface ---------------------------------------------------------------------

    def receive(self, socket: int, data: bytes, source: Address, now: int) -> None:
        """A datagram that came to one of the sockets, from whomever."""
        self._received += 1
        if self._received > MAX_RECEIVED or len(data) > MAX_ANSWER_BYTES:
            return
        try:
            message = StunMessage.decode(data)
            if message.method != Method.BINDING:
                return
            for question in self._questions:
                if message.transaction_id in question.ids and not question.is_over:
                    self._take(question, message, socket, source, now)
                    break
        except StunError:
            return
        self._go_on(now)

    def poll_timeout(self) -> int | None:
        """When to call `handle_timeout`; None once everything is found."""
        return min((one.next_at for one in self._questions if not one.is_over), default=None)

    def handle_timeout(self, now: int) -> None:
        """Send what is due, and go on when the last answer was waited for."""
        for question in self._questions:
            if question.is_over or question.next_at > now:
                continue
            if len(question.ids) == TRIES:
                question.is_over = True
            else:
                self._send(question, now)
        self._go_on(now)

    def finding(self) -> FamilyFinding:
        """What was found, as far as it went."""
        servers = tuple(self._server(one) for one in self._endpoints)
        reached = sum(one.reachable for one in servers)
        udp: Udp = "works" if reached == len(servers) else "partly" if reached else "blocked"
        local = self._locals[MAIN].host
        answers = [*self._seen.values(), *self._elsewhere.values()]
        samples = [self._samples[number] for number in sorted(self._samples)]
        mapping = mapping_of(answers)
        nat = Nat(
            present=is_translated([*answers, *samples]),
            mapping=mapping,
            filtering=self._filtering(),
            ports=ports_of(samples),
            hairpinning=self._hairpinning(),
            public_hosts=tuple(dict.fromkeys(a.mapped.host for a in [*answers, *samples])),
        )
        return FamilyFinding(
            family="ipv6" if ":" in local else "ipv4",
            local_host=local,
            udp=udp,
            servers=servers,
            nat=nat,
            notes=(*_notes_on(mapping, reached), *self._notes),
        )

    # --- the steps --------------------------------------------------------------------------------

    def _go_on(self, now: int) -> None:
        while all(question.is_over for question in self._questions):
            step = next(self._steps, None)
            if step is None:
                return
            step(now)

    def _ask_ports(self, now: int) -> None:
        if not self._seen:
            return
        self._chosen = min(
            self._seen,
            key=lambda address: (address not in self._other, self._round_trips[address]),
        )
        others = range(MAIN + 1, SOCKETS)
        self._ask("ports", ((number, self._chosen) for number in others), now)
        if mapping_of(list(self._seen.values())) in ("not_measured", "endpoint_dependent"):
            places = self._other_places(self._chosen)
            self._ask("mapping", ((MAIN, place) for place in places), now)

    def _other_places(self, server: Address) -> list[Address]:
        """Where else that server says it answers, and was not asked yet: its other IP address with
        the same port, and with the other one."""
        other = self._other.get(server)
        if other is None or not may_be_other(other, server):
            return []
        return [
            place for place in (Address(other.host, server.port), other) if place not in self._seen
        ]

    def _ask_doors(self, now: int) -> None:
        if self._chosen is None:
            return
        if self._chosen not in self._other:
            self._notes.append(
                "filtering: no server has a second address from which it could answer (RFC 5780)"
            )
        elif FILTER_SOCKET not in self._samples:
            self._notes.append("filtering: the server answered once and then no more")
        else:
            target = ((FILTER_SOCKET, self._chosen),)
            self._ask("other_host", target, now, change=_CHANGE_BOTH)
            self._ask("other_port", target, now, change=_CHANGE_PORT)
        self._ask("hairpin", self._own_targets(), now)

    def _own_targets(self) -> list[tuple[int, Address]]:
        """Both ways between two sockets' mapped addresses, if those are beyond doubt ours."""
        assert self._chosen is not None
        partner = self._samples.get(PARTNER)
        main = self._seen[self._chosen]
        if partner is None or not is_translated([main, partner]):
            return []
        told_by = {answer.server.host for answer in self._seen.values()}
        agree = {
            answer.server.host
            for answer in self._seen.values()
            if answer.mapped.host == main.mapped.host == partner.mapped.host
        }
        if len(agree) < 2 or agree != told_by or not may_be_asked(main.mapped.host):
            self._notes.append(
                "hairpinning: two servers have to agree on an own address before it is sent to"
            )
            return []
        return [(PARTNER, main.mapped), (MAIN, partner.mapped)]

    # --- questions and answers --------------------------------------------------------------------

    def _ask(
        self,
        purpose: Purpose,
        targets: Iterable[tuple[int, Address]],
        now: int,
        *,
        change: int = 0,
    ) -> None:
        for number, (socket, destination) in enumerate(targets):
            self._questions.append(
                _Question(purpose, socket, destination, now + number * PACE_NS, change)
            )

    def _send(self, question: _Question, now: int) -> None:
        transaction_id = self._randomness.bytes(TRANSACTION_ID_BYTES)
        change = question.change
        request = StunMessage(
            method=Method.BINDING,
            message_class=MessageClass.REQUEST,
            transaction_id=transaction_id,
            attributes=((Attribute.CHANGE_REQUEST, change.to_bytes(4, "big")),) if change else (),
        )
        question.next_at = now + (FIRST_WAIT_NS << len(question.ids))
        question.ids[transaction_id] = now
        self.packets_sent += 1
        self.transmits.append(
            (question.socket, request.encode(fingerprint=True), question.destination)
        )

    def _take(
        self, question: _Question, message: StunMessage, socket: int, source: Address, now: int
    ) -> None:
        """A message with one of the question's own ids. Raises StunError."""
        if question.purpose == "hairpin":
            if message.message_class is MessageClass.REQUEST and socket != question.socket:
                self._hairpinned.append(source)
                question.is_over = True
            return
        if socket != question.socket:
            return
        if message.message_class is MessageClass.ERROR and source == question.destination:
            self._refused(question, message, now)
        elif message.message_class is MessageClass.SUCCESS:
            self._answered(question, message, source, now)

    def _ignored(self, question: _Question) -> None:
        """The server did not do what RFC 5780 asks of one with an OTHER-ADDRESS."""
        question.is_over = True
        if not self._unheeded:
            self._notes.append("filtering: the server did not answer from its second address")
        self._unheeded = True

    def _refused(self, question: _Question, message: StunMessage, now: int) -> None:
        error = message.error()
        if error is None:
            return
        question.is_over = True
        if question.change:
            self._ignored(question)
        elif question.purpose == "server":
            self._errors[question.destination] = error[0]
            self._round_trips[question.destination] = now - question.ids[message.transaction_id]

    def _answered(
        self, question: _Question, message: StunMessage, source: Address, now: int
    ) -> None:
        asked = question.destination
        if question.change:
            if source == asked:
                self._ignored(question)
            elif (source.host != asked.host) == (question.purpose == "other_host"):
                self._heard.add(question.purpose)
                question.is_over = True
            return
        mapped = message.xor_address(Attribute.XOR_MAPPED_ADDRESS)
        local = self._locals[question.socket]
        if source != asked or mapped is None or not mapped.port or mapped.family != local.family:
            return
        question.is_over = True
        answer = Answer(server=asked, local=local, mapped=mapped)
        if question.purpose == "ports":
            self._samples[question.socket] = answer
            return
        if question.purpose == "mapping":
            self._elsewhere[asked] = answer
            return
        self._seen[asked] = answer
        self._round_trips[asked] = now - question.ids[message.transaction_id]
        other = message.address(Attribute.OTHER_ADDRESS)
        if other is not None and other.host != asked.host and other.port != asked.port:
            self._other[asked] = other

    # --- conclusions ------------------------------------------------------------------------------

    def _server(self, endpoint: Endpoint) -> ServerFinding:
        answer = self._seen.get(endpoint.address)
        error = self._errors.get(endpoint.address)
        return ServerFinding(
            name=endpoint.name,
            address=str(endpoint.address),
            reachable=answer is not None or error is not None,
            round_trip_ns=self._round_trips.get(endpoint.address),
            mapped=None if answer is None else str(answer.mapped),
            error=error,
        )

    def _filtering(self) -> Filtering:
        asked = any(question.change for question in self._questions)
        if not asked or self._unheeded:
            return "not_measured"
        return filtering_of(
            from_other_host="other_host" in self._heard,
            from_other_port="other_port" in self._heard,
        )

    def _hairpinning(self) -> Hairpinning:
        asked = any(question.purpose == "hairpin" for question in self._questions)
        return hairpinning_of(self._hairpinned, self._locals, asked=asked)


def _notes_on(mapping: MappingBehaviour, reached: int) -> list[str]:
    if mapping == "not_measured" and reached:
        return ["mapping: servers at two addresses, or one with an OTHER-ADDRESS, have to answer"]
    if mapping == "endpoint_dependent":
        return ["mapping: a server that answers at two ports would tell on what it depends"]
    return []
