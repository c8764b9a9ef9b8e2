"""Questions and answers: the datagrams of a scenario's traffic, and what became of each.

A pair is one client and one resource. Every question carries the numbers of its pair and its own;
the echo brings them back. What is kept of each is when it was asked and answered and by what path,
so gaps, recoveries and outcomes are worked out afterwards, and for any stretch of the run.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

from simulations.build import Installation
from simulations.checks.interface import hears
from simulations.hosts.agent import ClientHost
from simulations.hosts.inner import (
    APP_PORT,
    ECHO_PORT,
    LEAST_BYTES,
    ends_of,
    numbers_of,
    packed,
    question,
    udp_packet,
)
from simulations.regions import public_ip
from simulations.result import Outcome

UNANSWERED: Final = -1
PATHS: Final[tuple[Outcome, ...]] = ("failed", "direct", "relayed")
FAILED, DIRECT, RELAYED = range(3)
FRESH_NS: Final = 10**9
"""A question that is younger may still be answered: it says nothing yet."""
SHOWS_NS: Final = 5 * 10**9
"""What is lost later than this after a fault is not blamed on it."""


class Pair:
    """One client and one resource. Instants are the world's; the arrays run beside each other.
    `allowed` is a list of (instant, whether), by policy; the last one holds now."""

    __slots__ = (
        "allowed",
        "answered",
        "asked",
        "client",
        "denied",
        "destination",
        "gateway",
        "number",
        "paths",
        "resource",
        "size",
    )

    def __init__(self, number: int, client: str, resource: str, destination: bytes) -> None:
        self.number = number
        self.client = client
        self.resource = resource
        self.destination = destination
        self.size = LEAST_BYTES
        self.gateway = ""
        self.denied = False
        self.allowed: list[tuple[int, bool]] = []
        self.asked = array("q")
        self.answered = array("q")
        self.paths = bytearray()

    # --- what became of it -----------------------------------------------------------------------

    def may(self, at: int | None = None) -> bool:
        """Whether policy allows it, now or at an instant."""
        if at is None:
            return bool(self.allowed) and self.allowed[-1][1]
        return next((may for since, may in reversed(self.allowed) if since <= at), False)

    def may_throughout(self, since: int, until: int) -> bool:
        """Whether it was allowed all the time."""
        return self.may(since) and all(may for at, may in self.allowed if since < at <= until)

    def first_answer_ns(self) -> int | None:
        """From the first question after access was allowed to the first answer."""
        since = next((at for at, may in self.allowed if may), None)
        if since is None:
            return None
        begun = next((at for at in self.asked if at >= since), None)
        answers = [at for at in self.answered if at != UNANSWERED]
        return min(answers) - begun if answers and begun is not None else None

    def round_trip_ns(self) -> int | None:
        """Of the last exchange that went well."""
        for index in range(len(self.asked) - 1, -1, -1):
            if self.answered[index] != UNANSWERED:
                return self.answered[index] - self.asked[index]
        return None

    def answered_within(self, since: int, until: int) -> list[int]:
        """The instants of answers in a stretch of time, in order."""
        return sorted(at for at in self.answered if since <= at < until)

    def paths_within(self, since: int, until: int) -> list[Outcome]:
        """By what path each answer to a question of a stretch came."""
        return [
            PATHS[self.paths[index]]
            for index, at in enumerate(self.asked)
            if since <= at < until and self.answered[index] != UNANSWERED
        ]

    def longest_gap_ns(self, since: int, until: int) -> int:
        """The longest time without an answer within a stretch, from the first answer ever on; while
        questions were asked."""
        answers = sorted(at for at in self.answered if at != UNANSWERED)
        if not answers:
            return 0
        begin = max(since, answers[0])
        last_asked = max((at for at in self.asked if at < until), default=begin)
        end = max(begin, min(until, last_asked))
        instants = [begin, *(at for at in answers if begin < at < end), end]
        return max((b - a for a, b in pairwise(instants)), default=0)

    def worked_before(self, instant: int) -> bool:
        """Whether the last question before an instant was answered; there may have been none."""
        for index in range(len(self.asked) - 1, -1, -1):
            if self.asked[index] < instant:
                return self.answered[index] != UNANSWERED
        return True

    def recovered_ns(
        self, fault_at: int, over_at: int, until: int, shows_until: int | None = None
    ) -> int | None:
        """After a fault from `fault_at` to `over_at`: 0 if no question was lost by it (of those
        that were to be answered before `shows_until`, or SHOWS_NS after it), else the time from its
        end to the first answer to a question after the first loss; None for no answer."""
        lost = False
        trip = 0
        shows_until = over_at + SHOWS_NS if shows_until is None else shows_until
        for asked, answered in zip(self.asked, self.answered, strict=True):
            if answered != UNANSWERED and not lost:
                trip = min(answered - asked, FRESH_NS)
            if asked < fault_at or asked >= until:
                continue
            if not lost and asked + trip >= shows_until:
                return 0
            if answered == UNANSWERED:
                lost = lost or until - asked > FRESH_NS
            elif lost and answered >= over_at:
                return answered - over_at
        return None if lost else 0

    def outcome(self, until: int) -> Outcome:
        """How the last exchange went that is over before `until`."""
        for index in range(len(self.asked) - 1, -1, -1):
            asked, answered = self.asked[index], self.answered[index]
            if asked >= until:
                continue
            if answered != UNANSWERED and answered < until:
                return PATHS[self.paths[index]]
            if until - asked > FRESH_NS:
                return "denied" if self.denied else "failed"
        return "unasked"


def select(pairs: Iterable[Pair], clients: Sequence[str], resources: Sequence[str]) -> list[Pair]:
    """Those of these names; all where none are given."""
    some, others = frozenset(clients), frozenset(resources)
    return [
        pair
        for pair in pairs
        if (not some or pair.client in some) and (not others or pair.resource in others)
    ]


class Traffic:
    """All pairs of a run, and the asking. Times of `every` and so on in ns."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._world = installation.world
        self._asked = hears(installation.observers, "asked")
        self._answered = hears(installation.observers, "answered")
        self._refused: dict[str, int] = {}
        self.pairs: list[Pair] = []
        self._by_names: dict[tuple[str, str], Pair] = {}
        self.questions = self.answers = self.strays = self.prohibited = 0
        installation.answer = self._answer

    # --- pairs -----------------------------------------------------------------------------------

    def pair(self, client: str, resource: str) -> Pair:
        """The pair of these names; made when it is asked for first."""
        found = self._by_names.get((client, resource))
        if found is None:
            address = self._installation.account.addresses[resource].partition("/")[0]
            found = Pair(len(self.pairs), client, resource, packed(address))
            self.pairs.append(found)
            self._by_names[client, resource] = found
            self._note_allowed((found,))
        return found

    def select(self, clients: Sequence[str], resources: Sequence[str]) -> list[Pair]:
        """All pairs that there are of these names; of all where none are given."""
        if clients and resources:
            found = (self._by_names.get((c, r)) for c in clients for r in resources)
            return [pair for pair in found if pair is not None]
        return select(self.pairs, clients, resources)

    def policy_changed(self) -> None:
        """Ask the policy engine anew who may what."""
        self._note_allowed(self.pairs)

    def _note_allowed(self, pairs: Iterable[Pair]) -> None:
        account, slots = self._installation.account, self._installation.slots
        now = self._world.now
        for pair in pairs:
            may = account.may(pair.client, pair.resource, public_ip(slots[pair.client].host))
            if not pair.allowed or pair.allowed[-1][1] != may:
                pair.allowed.append((now, may))

    # --- asking ----------------------------------------------------------------------------------

    def ask_again_and_again(self, pairs: Sequence[Pair], every: int, until: int, size: int) -> None:
        """A question of each pair now, and every so often until the instant `until`."""
        for pair in pairs:
            pair.size = size
            self.ask(pair)
        if self._world.now + every < until:
            self._world.after(every, self.ask_again_and_again, pairs, every, until, size)

    def ask(self, pair: Pair) -> None:
        """One question, now. It goes unanswered where the client has no addresses yet."""
        number = len(pair.asked)
        pair.asked.append(self._world.now)
        pair.answered.append(UNANSWERED)
        pair.paths.append(FAILED)
        self.questions += 1
        slot = self._installation.slots[pair.client]
        life = slot.life
        if not isinstance(life, ClientHost) or life.is_over or not slot.host.runs:
            return
        addresses = life.addresses()
        if addresses is None:
            return
        destination = pair.destination
        source = addresses[0] if len(destination) == 4 else addresses[1]
        ports = (APP_PORT + pair.number % 20_000, ECHO_PORT)
        data = question(pair.number, number, pair.size)
        packet = udp_packet(source, destination, ports, data)
        for asked in self._asked:
            asked(self._world.now, pair.client, pair.resource, packet)
        life.send_packet(packet)

    def _answer(self, client: str, packet: bytes) -> None:
        for answered in self._answered:
            answered(self._world.now, client, packet)
        ends = ends_of(packet)
        if ends is None:
            self.prohibited += 1
            return
        numbers = numbers_of(packet[ends[4] :])
        if numbers is None or numbers[0] >= len(self.pairs):
            self.strays += 1
            return
        pair, number = self.pairs[numbers[0]], numbers[1]
        if pair.client != client or number >= len(pair.asked):
            self.strays += 1
            return
        if pair.answered[number] != UNANSWERED:
            return
        pair.answered[number] = self._world.now
        self.answers += 1
        self._world.note("answer", pair.number, number)
        self._note_path(pair, number)

    def _note_path(self, pair: Pair, number: int) -> None:
        life = self._installation.slots[pair.client].life
        assert isinstance(life, ClientHost)
        way = life.agent.way_to(self._installation.account.id("resource", pair.resource))
        if way is None:
            return
        gateway_id, path = way
        pair.gateway = self._installation.account.name(gateway_id)
        if path is not None:
            pair.paths[number] = DIRECT if path.kind == "direct" else RELAYED

    def note_denials(self) -> None:
        """At the end: which pairs the portal refused last."""
        for pair in self.pairs:
            life = self._installation.slots[pair.client].life
            resource_id = self._installation.account.known_id("resource", pair.resource)
            if isinstance(life, ClientHost) and life.agent.joined:
                pair.denied = resource_id is None or life.agent.is_denied(resource_id)
            else:
                pair.denied = not pair.may()
