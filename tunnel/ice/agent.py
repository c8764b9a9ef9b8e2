"""A continuous ICE agent (RFC 8445 with trickle, RFC 8838; consent, RFC 7675), as a core.

It owns the check list of one connection. Candidates come and go on both sides at any time, checks
go on for as long as the agent lives, and data is sent on the best pair that the peer consents to;
that pair may change at any time, on each side by itself. So there is no moment of nomination:
USE-CANDIDATE is sent on the chosen pair, for other implementations and as advice to the controlled
side, and nobody waits for it.

How a pair lives stands in `tunnel.ice.pair`. The agent adds

- pacing: one check in `CHECK_INTERVAL_NS`, those that answer a check of the peer first, then those
  that keep a path, then the rest by how long they are due and by priority;
- suspicion: when data on the chosen pair goes unanswered, that pair is probed, and unless it
  answers within `PROBE_OTHERS_AFTER_NS` every usable pair is, several times; those that do not
  answer within `VERDICT_AFTER_NS` are not used any more;
- an end: `Lost` when no pair is left (checks start anew on all of them) and `GaveUp` when none
  works within `FIRST_PATIENCE_NS`, or again within `PATIENCE_NS`. An agent that gave up is silent
  until something happens.

A check with a wrong user name or password, or from an address that candidates may not have, gets
no answer at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import attrs

from channel.messages import Candidates, IceCredentials
from relays.stun import StunMessage
from runtime.clock import NS_PER_MS, NS_PER_S, earliest
from runtime.net.address import Address
from runtime.randomness import Randomness
from tunnel.ice.candidates import (
    Base,
    reachable,
    reflexive_priority,
    refusal,
)
from tunnel.ice.checklist import CheckList
from tunnel.ice.checks import CheckMessages, CheckRequest, Role
from tunnel.ice.pair import (
    CONSENT_IDLE_INTERVAL_NS,
    CONSENT_IDLE_JITTER_NS,
    CONSENT_INTERVAL_NS,
    CONSENT_LIFETIME_NS,
    CONSENT_REPEATS_NS,
    DORMANT_INTERVAL_NS,
    PROBE_INTERVALS_NS,
    PROBE_OTHERS_AFTER_NS,
    PROBE_SLOW_NS,
    SUSPECT_INTERVALS_NS,
    USABLE,
    Happening,
    Pair,
    PairState,
)

CHECK_INTERVAL_NS: Final = 20 * NS_PER_MS
FIRST_PATIENCE_NS: Final = 15 * NS_PER_S
PATIENCE_NS: Final = 30 * NS_PER_S
ACTIVE_NS: Final = 10 * NS_PER_S
ROAMING_GRACE_NS: Final = 1_500 * NS_PER_MS
UNNEEDED_AFTER_NS: Final = 30 * NS_PER_S
CHECK_MEMORY_NS: Final = 10 * NS_PER_S
MAX_OUTSTANDING: Final = 512
TRANSACTION_PREFIX_BYTES: Final = 4


@attrs.frozen(kw_only=True)
class Path:
    """The way that data takes. `local` and `remote` are both ends as the other side sees them
    (behind a NAT: the public addresses).

    `kind` is `relayed` also when only the peer uses a relay. `relay` is where our datagrams go
    then: our relay server, or the address that the peer's relay holds for it. `rtt_ns` is the
    last round trip.
    """

    kind: Literal["direct", "relayed"]
    local: Address
    remote: Address
    relay: Address | None
    rtt_ns: int


@attrs.frozen(kw_only=True)
class Selected:
    """Data now goes along `path`."""

    path: Path


@attrs.frozen(kw_only=True)
class Lost:
    """No usable pair is left; checks go on. When it is our own network that went away, this is
    reported only after `ROAMING_GRACE_NS`: the peer is as well as ever, and mostly found again."""


@attrs.frozen(kw_only=True)
class GaveUp:
    """No pair became usable in time."""


@attrs.frozen(kw_only=True)
class Doubted:
    """The path went silent and is being probed: perhaps our own NAT forgot us."""


@attrs.frozen(kw_only=True)
class Silent:
    """The path that is being doubted did not answer its first probe either."""


Event = Selected | Doubted | Silent | Lost | GaveUp


class Outgoing(NamedTuple):
    """A datagram to be sent from a base, or through it where it is a relay's."""

    base: Base
    remote: Address
    data: bytes


@attrs.define(kw_only=True)
class IceStatistics:
    """Present sizes, and counts since the start."""

    pairs: int = 0
    usable_pairs: int = 0
    remotes: int = 0
    checks_sent: int = 0
    checks_received: int = 0
    answers_received: int = 0
    refused: int = 0
    stale_generations: int = 0


class _Outstanding(NamedTuple):
    pair: Pair
    sent_at: int
    role: Role


class IceAgent:
    """The ICE agent of one connection. `now` is in nanoseconds of one monotonic clock.

    `transaction_prefix` (4 bytes) begins every transaction id of this agent, so that whoever owns
    several can tell whose an answer is; the other 64 bits are random, and answers are
    authenticated besides.
    """

    def __init__(
        self,
        *,
        local: IceCredentials,
        remote: IceCredentials,
        controlling: bool,
        randomness: Randomness,
        transaction_prefix: bytes,
        now: int,
    ) -> None:
        self.role: Role = "controlling" if controlling else "controlled"
        self.selected: Pair | None = None
        self._randomness = randomness
        self.transaction_prefix = transaction_prefix
        self._tie_breaker = int.from_bytes(randomness.bytes(8), "big")
        self._messages = CheckMessages(local, remote)
        self._pairs = CheckList(self.role, now)
        self._outstanding: dict[bytes, _Outstanding] = {}
        self._nominated: Pair | None = None
        self._next_check_ns = now
        self._patience_ns = FIRST_PATIENCE_NS
        self._give_up_at: int | None = now + FIRST_PATIENCE_NS
        self._report_lost_at: int | None = None
        self._probe_others_at: int | None = None
        self._checks: list[Outgoing] = []
        self._events: list[Event] = []
        self._counts = IceStatistics()

    # --- candidates ----------------------------------------------------------------------------

    def set_bases(
        self, bases: Iterable[Base], now: int, *, leaving: frozenset[Address] = frozenset()
    ) -> None:
        """All the places to send from, as of now. Pairs of a base that is gone end at once; those
        of `leaving` are avoided."""
        if self._pairs.set_bases(bases, now, leaving=leaving):
            self._hope(now)
        self._reselect(now, grace_ns=ROAMING_GRACE_NS)
        self._replace_what_ends(now)

    def add_candidates(self, message: Candidates, now: int) -> None:
        """Trickled candidates of the peer (`CheckList.signal`)."""
        for pair in self._pairs.signal(message, now):
            if pair.state is PairState.DORMANT and self.selected is None:
                pair.happen(Happening.AWAKENED, now)
            self._hope(now)
        self._reselect(now)
        self._replace_what_ends(now)

    @property
    def remote_addresses(self) -> list[Address]:
        return self._pairs.remote_addresses

    # --- data ----------------------------------------------------------------------------------

    def sent(self, now: int, *, expects_answer: bool) -> None:
        """Data went out on the selected pair. `expects_answer`: silence is suspicious."""
        pair = self.selected
        if pair is None:
            return
        pair.sent_at = now
        if pair.due is not None and pair.due > now + CONSENT_INTERVAL_NS:
            pair.due = now + CONSENT_INTERVAL_NS  # it was idle, and its next check far away
        if expects_answer and pair.unanswered_since is None:
            pair.unanswered_since = now

    def heard(self, base: Address, source: Address) -> None:
        """Authentic data of the peer arrived from `source` at the base of this address."""
        pair = self._pairs.get(base, source)
        if pair is not None:
            pair.unanswered_since = None

    def path(self) -> Path | None:
        """The way that data takes at present."""
        return None if self.selected is None else _path(self.selected)

    @property
    def is_backed(self) -> bool:
        """Whether a direct path works, and a relayed one that would take its place, both with
        candidates that the peer has not withdrawn."""
        lasting = (pair for pair in self._pairs if pair.usable and not pair.remote.gone)
        return {pair.relayed for pair in lasting} == {False, True}

    # --- the peer's checks and answers ---------------------------------------------------------

    def receive_request(self, message: StunMessage, base: Base, source: Address, now: int) -> None:
        """A Binding request whose user name begins with our fragment (RFC 8445, section 7.3)."""
        request = self._messages.judge_request(message)
        if request is None or refusal(source) is not None or not reachable(base, source):
            self._counts.refused += 1
            return
        self._counts.checks_received += 1
        if request.unknown:
            error = self._messages.error(request.transaction_id, 420, request.unknown)
            self._checks.append(Outgoing(base, source, error))
            return
        if not self._settle_roles(request):
            error = self._messages.error(request.transaction_id, 487)
            self._checks.append(Outgoing(base, source, error))
            return
        answer = self._messages.success(request.transaction_id, source)
        self._checks.append(Outgoing(base, source, answer))
        pair = self._pairs.learn(base, source, request.priority, now)
        if pair is None:
            return
        self._trigger(pair, now)
        if request.nominates and self.role == "controlled" and pair is not self._nominated:
            self._nominated = pair
            self._reselect(now)

    def receive_response(self, message: StunMessage, base: Base, source: Address, now: int) -> None:
        """A Binding response whose transaction id begins with our prefix (section 7.2.5)."""
        outstanding = self._outstanding.get(message.transaction_id)
        if outstanding is None:
            return
        pair = outstanding.pair
        answer = self._messages.judge_answer(message)
        if answer is None or pair.base != base or pair.remote.address != source:
            self._counts.refused += 1
            return
        del self._outstanding[message.transaction_id]
        if self._pairs.get(base.address, source) is not pair:
            return
        if answer.error == 487:
            self._take_role("controlled" if outstanding.role == "controlling" else "controlling")
            self._trigger(pair, now)
        if answer.error:
            return
        self._counts.answers_received += 1
        pair.mapped = answer.mapped or pair.mapped
        self._answered(pair, now - outstanding.sent_at, now)
        self._reselect(now)

    # --- time ----------------------------------------------------------------------------------

    def suspect(self, now: int) -> None:
        """The network may have changed: probe every pair now."""
        for pair in self._pairs:
            if pair.state is PairState.CONSENTED:
                pair.happen(Happening.DOUBTED, now)
            elif pair.state is not PairState.SUSPECTED:
                pair.happen(Happening.AWAKENED, now)
        self._hope(now)

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due; None: nothing is waited for."""
        check_at = over_at = None
        for pair in self._pairs.by_ends.values():
            due = pair.due
            if due is not None and (check_at is None or due < check_at):
                check_at = due
            if pair.state in USABLE:
                expires_at = pair.expires_at
                if over_at is None or (expires_at is not None and expires_at < over_at):
                    over_at = expires_at
        if check_at is not None and check_at < self._next_check_ns:
            check_at = self._next_check_ns
        return earliest(
            self._give_up_at,
            self._report_lost_at,
            self._probe_others_at,
            check_at,
            over_at,
            None if self.selected is None else self.selected.suspect_at,
        )

    def handle_timeout(self, now: int) -> None:
        suspect_at = None if self.selected is None else self.selected.suspect_at
        if suspect_at is not None and suspect_at <= now:
            self._doubt(now)
        if self._probe_others_at is not None and self._probe_others_at <= now:
            self._doubt_others(now)
        for pair in self._pairs:
            expires_at = pair.expires_at
            if expires_at is not None and expires_at <= now:
                self._expired(pair, now)
        self._reselect(now)
        self._report_loss(now)
        if self._give_up_at is not None and self._give_up_at <= now:
            self._give_up()
        if now >= self._next_check_ns:
            self._check_next(now)

    def drain_checks(self) -> list[Outgoing]:
        """STUN datagrams to send."""
        drained, self._checks = self._checks, []
        return drained

    def drain_events(self) -> list[Event]:
        drained, self._events = self._events, []
        return drained

    def statistics(self) -> IceStatistics:
        return attrs.evolve(
            self._counts,
            pairs=len(self._pairs),
            usable_pairs=sum(pair.usable for pair in self._pairs),
            remotes=len(self._pairs.remote_addresses),
            refused=self._counts.refused + self._pairs.refused,
            stale_generations=self._pairs.stale_generations,
        )

    # --- what happens to pairs -----------------------------------------------------------------

    def _trigger(self, pair: Pair, now: int) -> None:
        """A triggered check (section 7.3.1.4): the peer's packet came through, so ours may now."""
        if pair.state is PairState.CONSENTED:
            return
        if pair.state is PairState.DORMANT:
            pair.happen(Happening.AWAKENED, now)
        pair.due, pair.triggered = now, True
        self._hope(now)

    def _answered(self, pair: Pair, rtt_ns: int, now: int) -> None:
        if not pair.usable:
            pair.proven_at = now
        pair.happen(Happening.ANSWERED, now)
        if pair is self.selected:
            self._probe_others_at = None
        pair.rtt_ns = rtt_ns
        pair.consent_until = now + CONSENT_LIFETIME_NS
        pair.unanswered_since = None
        pair.due = now + self._consent_interval(pair, now)

    def _doubt(self, now: int) -> None:
        """The path in use was silent for too long: find out whether it still works. Mostly it does:
        nothing answers the last packet of a conversation."""
        self._events.append(Doubted())
        if self.selected is not None and self.selected.state is PairState.CONSENTED:
            self.selected.happen(Happening.DOUBTED, now)
            self._probe_others_at = now + PROBE_OTHERS_AFTER_NS

    def _doubt_others(self, now: int) -> None:
        """It still is: find out which other pairs work. They are judged when the path is."""
        self._probe_others_at = None
        silent = self.selected
        if silent is None or silent.state is not PairState.SUSPECTED:
            return
        self._events.append(Silent())
        for pair in self._pairs:
            if pair.state is PairState.CONSENTED:
                pair.happen(Happening.DOUBTED, now, since=silent.doubted_at)

    def _expired(self, pair: Pair, now: int) -> None:
        pair.happen(Happening.EXPIRED, now)
        self._pairs.drop_if_gone(pair.remote)

    def _reselect(self, now: int, grace_ns: int = 0) -> None:
        """Send on the best usable pair from now on; report what changed, a loss after a grace."""
        before = self.selected
        usable = [pair for pair in self._pairs.by_ends.values() if pair.state in USABLE]
        best = usable[0] if usable else None
        if len(usable) > 1:
            best = max(usable, key=lambda pair: self._preference(pair, now))
        if best is before:
            return
        self.selected = best
        if best is None:
            ours = before is not None and self._pairs.is_leaving(before)
            self._report_lost_at = now + (ROAMING_GRACE_NS if ours else grace_ns)
            self._pairs.searching_since = now
            self._report_loss(now)
            self.suspect(now)
            return
        self._report_lost_at = self._give_up_at = None
        self._patience_ns = PATIENCE_NS
        best.due = now if self.role == "controlling" else best.due
        self._events.append(Selected(path=_path(best)))
        for pair in self._pairs:
            if pair.state is PairState.DORMANT:
                pair.due = self._dormant_due(pair, now)

    def _replace_what_ends(self, now: int) -> None:
        """The path in use will soon be gone: try all that would be better."""
        selected = self.selected
        if selected is None or not self._pairs.will_end(selected):
            return
        for pair in self._pairs:
            is_better = self._preference(pair, now) > self._preference(selected, now)
            if pair.state is PairState.DORMANT and is_better:
                pair.happen(Happening.AWAKENED, now)

    def _report_loss(self, now: int) -> None:
        if self._report_lost_at is not None and self._report_lost_at <= now:
            self._report_lost_at = None
            self._events.append(Lost())

    def _preference(self, pair: Pair, now: int) -> tuple[bool, bool, bool, bool, int]:
        """Pairs that answer first; direct before relayed; what will last before what will end;
        then what the controlling peer sends on, so that both directions take the same way where
        they can; then the priority."""
        nominated, lasts = pair is self._nominated, not self._pairs.will_end(pair)
        return (not pair.distrusted(now), not pair.relayed, lasts, nominated, pair.priority)

    def _hope(self, now: int) -> None:
        """Something new happened: without a path, wait for it from now on."""
        if self.selected is None:
            self._give_up_at = now + self._patience_ns

    def _give_up(self) -> None:
        self._give_up_at = None
        for pair in self._pairs:
            if pair.state is PairState.PROBING:
                pair.happen(Happening.EXHAUSTED, 0)
            pair.due = None
        self._events.append(GaveUp())

    # --- checks --------------------------------------------------------------------------------

    def _check_next(self, now: int) -> None:
        pairs = self._pairs.by_ends.values()
        due = [pair for pair in pairs if pair.due is not None and pair.due <= now]
        if not due:
            return
        pair = min(due, key=_urgency)
        if self._is_unneeded(pair, now):
            pair.happen(Happening.UNNEEDED, now)
            pair.due = self._dormant_due(pair, now)
            return
        if self._is_roundabout(pair):
            pair.happen(Happening.EXHAUSTED, now)
            pair.due = self._dormant_due(pair, now)
            return
        self._send_check(pair, now)
        self._next_check_ns = now + CHECK_INTERVAL_NS
        pair.triggered = False
        self._schedule(pair, now)

    def _schedule(self, pair: Pair, now: int) -> None:
        """When the check that just went out is followed by the next, if no answer comes."""
        attempt = pair.attempt
        pair.attempt += 1
        if pair.state is PairState.SUSPECTED:
            pair.due = now + SUSPECT_INTERVALS_NS[min(attempt, len(SUSPECT_INTERVALS_NS) - 1)]
        elif pair is self.selected and attempt > 0 and pair.state is PairState.CONSENTED:
            self._doubt(now)
        elif pair.state is PairState.CONSENTED:
            pair.due = now + CONSENT_REPEATS_NS[min(attempt, len(CONSENT_REPEATS_NS) - 1)]
        elif pair.state is PairState.DORMANT:
            pair.due = self._dormant_due(pair, now)
        elif attempt < len(PROBE_INTERVALS_NS):
            pair.due = now + PROBE_INTERVALS_NS[attempt]
        elif self.selected is None:
            pair.due = now + PROBE_SLOW_NS
        else:
            pair.happen(Happening.EXHAUSTED, now)
            pair.due = self._dormant_due(pair, now)

    def _consent_interval(self, pair: Pair, now: int) -> int:
        """1 s, by 0.8 to 1.2, on the path that carried data of late: a side that only answers would
        not see for long that its NAT forgot the binding. 15 to 20 s elsewhere, which keeps the
        bindings of NATs open (RFC 4787 asks for 2 minutes, many give 30 s)."""
        active = pair.sent_at is not None and now - pair.sent_at < ACTIVE_NS
        if pair is self.selected and active:
            return CONSENT_INTERVAL_NS * (800 + self._randomness.integer(400)) // 1000
        return CONSENT_IDLE_INTERVAL_NS + self._randomness.integer(CONSENT_IDLE_JITTER_NS)

    def _dormant_due(self, pair: Pair, now: int) -> int | None:
        """Pairs that would be better than the one in use are tried again and again."""
        selected = self.selected
        if selected is None or self._preference(pair, now) <= self._preference(selected, now):
            return None
        return now + DORMANT_INTERVAL_NS

    def _is_unneeded(self, pair: Pair, now: int) -> bool:
        """Of the pairs that are not in use, two are kept warm: the best, and the best that goes
        through another relay than the one in use, which may die."""
        if pair.state is not PairState.CONSENTED or pair is self.selected:
            return False
        if now - pair.proven_at < UNNEEDED_AFTER_NS:
            return False
        others = [p for p in self._pairs if p.usable and p is not self.selected]
        others.sort(key=lambda p: p.priority, reverse=True)
        in_use = frozenset[str]() if self.selected is None else self.selected.relay_hosts
        elsewhere = (p for p in others if p.relayed and not p.relay_hosts & in_use)
        return pair is not others[0] and pair is not next(elsewhere, None)

    def _is_roundabout(self, pair: Pair) -> bool:
        """Two relays in a row are not even tried where there is another way; see
        `TWICE_RELAYED_AFTER_NS`. A check of the peer over them is followed by ours, as ever."""
        is_fresh = pair.state is PairState.PROBING and pair.attempt == 0 and not pair.triggered
        return is_fresh and pair.twice_relayed and self.selected is not None

    def _send_check(self, pair: Pair, now: int) -> None:
        transaction_id = self.transaction_prefix + self._randomness.bytes(
            12 - TRANSACTION_PREFIX_BYTES
        )
        data = self._messages.request(
            transaction_id,
            priority=reflexive_priority(pair.base),
            role=self.role,
            tie_breaker=self._tie_breaker,
            nominates=self.role == "controlling" and pair is self.selected,
        )
        self._remember(transaction_id, _Outstanding(pair, now, self.role))
        self._checks.append(Outgoing(pair.base, pair.remote.address, data))
        self._counts.checks_sent += 1

    def _remember(self, transaction_id: bytes, outstanding: _Outstanding) -> None:
        """Note a check for its answer, and drop those that are too old to be answered."""
        self._outstanding[transaction_id] = outstanding
        while True:
            oldest = next(iter(self._outstanding))
            age_ns = outstanding.sent_at - self._outstanding[oldest].sent_at
            if age_ns < CHECK_MEMORY_NS and len(self._outstanding) <= MAX_OUTSTANDING:
                return
            del self._outstanding[oldest]

    # --- roles ---------------------------------------------------------------------------------

    def _settle_roles(self, request: CheckRequest) -> bool:
        """RFC 8445, section 7.3.1.1. False: the peer has to switch."""
        if request.role != self.role:
            return True
        wins = self._tie_breaker >= request.tie_breaker
        if wins == (self.role == "controlling"):
            return False
        self._take_role("controlling" if wins else "controlled")
        return True

    def _take_role(self, role: Role) -> None:
        self.role = role
        self._pairs.take_role(role)


def _urgency(pair: Pair) -> tuple[bool, bool, int, int]:
    """Triggered checks first, then those of usable pairs, then by due time and priority."""
    return (not pair.triggered, not pair.usable, pair.due or 0, -pair.priority)


def _path(pair: Pair) -> Path:
    local, relay = pair.base.address, pair.base.server
    if relay is None:
        local = pair.mapped or local
        relay = pair.remote.address if pair.relayed else None
    return Path(
        kind="relayed" if pair.relayed else "direct",
        local=local,
        remote=pair.remote.address,
        relay=relay,
        rtt_ns=pair.rtt_ns or 0,
    )
