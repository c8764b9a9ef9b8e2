"""What must never be, as it can be seen from outside on the kernel: by a tap on every host, by what
the portal has written, and by the account that is kept beside it. Judged when the run is over.

    access      a question reached a service through a gateway without an authorisation of this
                client for this resource and gateway that the portal's API tells of and that stood
                then: it had begun, had not ended BOUND_NS before (in calm times), nor expired
    policy      the same by the account beside: policy had not allowed it for BOUND_NS in calm times
    integrity   it was not what the client had said, or came a second time
    plaintext   an application's words were on a wire in the clear, but between a gateway and a
                service; or a client's own system sent them there while its agent had the resource
    silence     a gateway sent something to where only a client that scans is

Of hostile hosts nothing is expected: what a client of theirs says through an honest gateway is an
`access` without a right to the service. Of a client whose agent does not have the resource (it may
not reach it, or does not run) the system sends questions into the open, as every system does with
an address that no tunnel takes. These are `beside`. In times that are not calm a revocation may be
late, up to the end of the lease.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Final

import attrs

from simulations.checks.safety import CALM_AFTER_NS, CALM_BOUND_NS, DRIFT_SHARE
from simulations.faults import Struck
from simulations.hosts.inner import ends_of
from simulations.kernel.obstacles import agents_of
from simulations.kernel.taps import Seen
from simulations.kernel.topology import Topology
from simulations.result import Violation
from simulations.scenario.schema import Scenario
from simulations.traffic import Pair

MARK_BYTES: Final = 8
HEAD_BYTES: Final = 16
WIRE: Final = "eth0"
ICMP, ICMP6 = 1, 58
SLACK_NS: Final = 3 * 10**9
BOUND_NS: Final = 2 * CALM_BOUND_NS + SLACK_NS
"""That of virtual time, with the slack of checks."""
EARLY_NS: Final = 100 * 10**6
"""So much earlier than by the portal's own clock an authorisation may be seen."""
STEADY_NS: Final = 2 * 10**9
"""So long before, and half as long after, an agent has to say that it has a resource."""
AFTER_FAULT_NS: Final = 5 * 10**9
MAX_ARRIVALS: Final = 1_000_000
MAX_VIOLATIONS: Final = 100


def question(mark: bytes, pair: int, index: int, size: int) -> bytes:
    """What an asker sends (`asking`), and nobody else."""
    words = mark * (size // MARK_BYTES)
    return mark + pair.to_bytes(4, "big") + index.to_bytes(4, "big") + words[: size - HEAD_BYTES]


@attrs.frozen(kw_only=True)
class Authorized:
    """One authorisation as the portal's API has it in the end, by names of the file; instants of
    the machine's monotonic clock."""

    client: str
    gateway: str
    resource: str
    created_ns: int
    expires_ns: int
    ended_ns: int | None


@attrs.frozen
class _Arrival:
    at_ns: int
    gateway: str
    pair: int
    index: int


@attrs.frozen
class _Unmarked:
    """What no asker sent: it can only be a hostile client's."""

    at_ns: int
    gateway: str
    service: str


@attrs.frozen
class Calm:
    """When no fault goes on and none has ended within CALM_AFTER_NS."""

    struck: Sequence[Struck]

    def between(self, since: int, until: int) -> bool:
        """Whether all the time between two instants is calm."""
        return not any(
            each.at <= until and (each.over_at or each.at) + CALM_AFTER_NS >= since
            for each in self.struck
            if each.fault.kind != "change"
        )

    def spares(self, name: str, at: int) -> bool:
        """Whether no fault is at work on a host at an instant."""
        return not any(
            each.at - STEADY_NS <= at <= (each.over_at or each.at) + AFTER_FAULT_NS
            for each in self.struck
            if name in each.fault.targets
        )


class Watch:
    """Sees all packets of a run whose questions bear `mark`."""

    def __init__(self, scenario: Scenario, topology: Topology, mark: bytes) -> None:
        self._topology = topology
        self._mark = mark
        self._clients = {each.name for each in scenario.clients}
        self._gateways = [each.name for each in scenario.gateways]
        self._hostile = {each.name for each in agents_of(scenario) if each.hostile}
        self._hostile_clients = self._hostile & self._clients
        self._services = {each.name for each in scenario.services}
        self._scanning = {each.name for each in scenario.clients if each.hostile == "scans"}
        self._scanners: set[bytes] = set()
        self._resources: dict[str, list[str]] = {}
        for resource in scenario.account.resources:
            self._resources.setdefault(resource.service, []).append(resource.name)
        self._by_address: dict[bytes, str] = {}
        self._service_addresses = {
            ip_address(address).packed
            for name in self._services
            for address in topology.addresses_of(name)
        }
        self._arrivals: list[_Arrival] = []
        self._came: Counter[tuple[int, int]] = Counter()
        self._unmarked: deque[_Unmarked] = deque(maxlen=MAX_ARRIVALS)
        self._in_the_open: deque[tuple[int, str, int]] = deque(maxlen=MAX_ARRIVALS)
        self._broken: list[Violation] = []
        self.unjudged = 0
        self.refresh()

    def refresh(self) -> None:
        """Look where gateways are now."""
        for name in self._gateways:
            if name in self._hostile:
                continue
            for address in self._topology.addresses_of(name):
                self._by_address[ip_address(address).packed] = name
        topology = self._topology
        seen_at = {
            name: {*topology.addresses_of(name), topology.outside_ipv4(name)}
            for name in topology.names
        }
        others = {
            address
            for name, addresses in seen_at.items()
            for address in addresses
            if name not in self._scanning
        }
        self._scanners = {
            ip_address(address).packed
            for name in self._scanning
            for address in seen_at[name] - others
        }

    @property
    def arrived(self) -> int:
        """How many questions came to services through gateways."""
        return len(self._arrivals)

    @property
    def beside(self) -> int:
        """How many questions a client's system sent into the open."""
        return len(self._in_the_open)

    # --- seeing ----------------------------------------------------------------------------------

    def see(self, seen: Seen) -> None:
        """For the taps."""
        if seen.device != WIRE or seen.host in self._hostile:
            return
        ends = ends_of(seen.packet)
        if seen.host in self._services:
            if ends is not None and not seen.outgoing and ends[0] in self._by_address:
                gateway = self._by_address[ends[0]]
                if self._mark in seen.packet:
                    self._arrived(seen, gateway, seen.packet[ends[4] :])
                else:
                    self._unmarked.append(_Unmarked(seen.at_ns, gateway, seen.host))
        elif seen.outgoing and not _is_icmp(seen.packet):  # an error quotes what was sent to it
            if self._mark in seen.packet:
                self._sent(seen, ends)
            if ends is not None and ends[1] in self._scanners and seen.host in self._gateways:
                self._break(seen.at_ns, "silence", f"{seen.host} answered a scan")

    def _arrived(self, seen: Seen, gateway: str, data: bytes) -> None:
        pair, index = (int.from_bytes(data[at : at + 4], "big") for at in (8, 12))
        if data != question(self._mark, pair, index, len(data)):
            self._break(seen.at_ns, "integrity", f"{gateway} forwarded what nobody said")
            return
        self._came[pair, index] += 1
        if self._came[pair, index] > 1:
            self._break(seen.at_ns, "integrity", f"{gateway} forwarded a question twice")
        if len(self._arrivals) < MAX_ARRIVALS:
            self._arrivals.append(_Arrival(seen.at_ns, gateway, pair, index))
        else:
            self.unjudged += 1

    def _sent(self, seen: Seen, ends: tuple[bytes, bytes, int, int, int] | None) -> None:
        if ends is not None and ends[1] in self._service_addresses:
            if seen.host in self._gateways:
                return
            if seen.host in self._clients:
                pair = int.from_bytes(seen.packet[ends[4] + 8 : ends[4] + 12], "big")
                self._in_the_open.append((seen.at_ns, seen.host, pair))
                return
        text = f"{seen.host} sent an application's words in the clear"
        self._break(seen.at_ns, "plaintext", text)

    def _break(self, at: int, rule: str, detail: str) -> None:
        if len(self._broken) < MAX_VIOLATIONS:
            self._broken.append(Violation(at_ns=at, rule=rule, detail=detail))

    # --- judging ---------------------------------------------------------------------------------

    def judge(
        self,
        pairs: Sequence[Pair],
        struck: Sequence[Struck],
        authorized: Iterable[Authorized] | None,
        known: Mapping[str, Sequence[tuple[int, frozenset[str]]]],
    ) -> list[Violation]:
        """All breaches, in the order of their instants. `authorized`: None where the portal could
        not be asked, so that nothing is judged by it. `known`: which resources agents said that
        they have, and when."""
        calm = Calm(struck)
        found = [*self._broken, *self._against_policy(pairs, calm)]
        if authorized is None:
            self.unjudged += len(self._arrivals)
        else:
            found += self._without_authorization(pairs, calm, authorized)
        found += self._leaks(pairs, calm, known)
        return sorted(found, key=lambda each: each.at_ns)[:MAX_VIOLATIONS]

    def _against_policy(self, pairs: Sequence[Pair], calm: Calm) -> Iterator[Violation]:
        for each in self._arrivals:
            pair = pairs[each.pair]
            if pair.may(each.at_ns):
                continue
            since = max((at for at, _ in pair.allowed if at <= each.at_ns), default=0)
            was_ever = any(may for at, may in pair.allowed if at <= each.at_ns)
            late = each.at_ns - since
            if not was_ever:
                yield self._told("policy", each, pair, "never allowed")
            elif late > BOUND_NS and calm.between(since, each.at_ns):
                yield self._told("policy", each, pair, f"{late // 10**6} ms after the end")

    def _without_authorization(
        self, pairs: Sequence[Pair], calm: Calm, authorized: Iterable[Authorized]
    ) -> Iterator[Violation]:
        by_access: dict[tuple[str, str, str], list[Authorized]] = {}
        for one in authorized:
            by_access.setdefault((one.gateway, one.client, one.resource), []).append(one)
        yield from self._unasked(calm, by_access)
        for each in self._arrivals:
            pair = pairs[each.pair]
            rights = by_access.get((each.gateway, pair.client, pair.resource), [])
            if not any(_covers(right, each.at_ns, calm) for right in rights):
                why = "without a live authorisation" if rights else "without any authorisation"
                yield self._told("access", each, pair, why)

    def _unasked(
        self, calm: Calm, by_access: dict[tuple[str, str, str], list[Authorized]]
    ) -> Iterator[Violation]:
        """What a hostile client sends may pass as long as it has a right to that service."""
        for each in self._unmarked:
            rights = [
                right
                for client in self._hostile_clients
                for resource in self._resources.get(each.service, ())
                for right in by_access.get((each.gateway, client, resource), ())
            ]
            if not any(_covers(right, each.at_ns, calm) for right in rights):
                text = f"{each.gateway} let something through to {each.service} that nobody may say"
                yield Violation(at_ns=each.at_ns, rule="access", detail=text)

    @staticmethod
    def _told(rule: str, arrival: _Arrival, pair: Pair, why: str) -> Violation:
        detail = f"{arrival.gateway} let {pair.client} through to {pair.resource}: {why}"
        return Violation(at_ns=arrival.at_ns, rule=rule, detail=detail)

    def _leaks(
        self,
        pairs: Sequence[Pair],
        calm: Calm,
        known: Mapping[str, Sequence[tuple[int, frozenset[str]]]],
    ) -> Iterator[Violation]:
        for at, client, number in self._in_the_open:
            resource = pairs[number].resource
            around = [
                resource in names
                for said, names in known.get(client, ())
                if at - STEADY_NS <= said <= at + STEADY_NS // 2
            ]
            if len(around) > 2 and all(around) and calm.spares(client, at):
                text = f"{client} asked {resource} in the clear, whose agent has it"
                yield Violation(at_ns=at, rule="plaintext", detail=text)


def _covers(right: Authorized, at: int, calm: Calm) -> bool:
    lasts = right.expires_ns - right.created_ns
    until = right.expires_ns + lasts // DRIFT_SHARE
    if right.ended_ns is not None and calm.between(right.ended_ns, at):
        until = min(until, right.ended_ns + BOUND_NS)
    return right.created_ns - EARLY_NS <= at <= until


def _is_icmp(packet: bytes) -> bool:
    return packet[6] == ICMP6 if packet[0] >> 4 == 6 else packet[9] == ICMP
