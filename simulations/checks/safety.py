"""What must never be, in any run and under any faults. Each rule is an observer of its own:

    access        no packet reaches a resource without an authorisation that its gateway was given,
                  for this client and this resource, and that has neither ended nor expired
    spoofing      no packet is forwarded under an address that is not the client's, and no client
                  takes a packet from an address that it may not reach
    integrity     what a gateway forwards is what the client's application said, and once only
    written       no authorisation is given out that the store has not taken
    policy        none lives on when no policy, member and account allow it any more (in calm times
                  within CALM_BOUND_NS)
    revocation    in calm times nothing passes CALM_BOUND_NS after the end was written
    owners        no two owners of an account: epochs rise, nothing is written under an old one, no
                  agent takes the word of a former owner
    plaintext     what applications say is not on any wire between the ends of a tunnel
    nonces        no sending key uses a counter twice
    silence       a gateway sends nothing to who scans it without being authorised

Times are "calm" when no fault is going on and none has ended within CALM_AFTER_NS. In other times
a revocation may come late, but never later than the end of the lease (rule `access`).
"""

from __future__ import annotations

from collections import Counter, deque
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any, Final
from uuid import UUID

import attrs

from actors.model import Authorization, Change, Client, Group, Membership, Policy, Principal
from channel.messages import AuthorizationRenewed, Authorize, GatewayInit, Resource, Revoke
from runtime.net.address import Address
from simulations.checks.interface import Observer, Subject
from simulations.scenario.schema import Scenario
from simulations.scenario.units import duration_ns

NS_PER_S: Final = 10**9
CALM_BOUND_NS: Final = NS_PER_S
CALM_AFTER_NS: Final = 20 * NS_PER_S
DRIFT_SHARE: Final = 50
"""A gateway's clock may run slower by a fiftieth: so much longer it takes a lease for good."""
MARK_BYTES: Final = 12
"""So many bytes of an application's words are looked for on the wire."""
BEGINNING_BYTES: Final = 8
MAX_MARKS: Final = 256
MAX_REMEMBERED: Final = 4_096


def all_rules() -> tuple[Observer, ...]:
    """One of each, for one run."""
    return (
        AccessRule(), SpoofingRule(), IntegrityRule(), WrittenRule(), PolicyRule(),
        RevocationRule(), OwnersRule(), PlaintextRule(), NoncesRule(), SilenceRule(),
    )  # fmt: skip


# --- access ---------------------------------------------------------------------------------------


@attrs.frozen
class _Right:
    """What a gateway was given: for whom, to what, until when at most."""

    client: frozenset[bytes]
    networks: tuple[Any, ...]
    until_ns: int

    def covers(self, packet: bytes) -> bool:
        source, destination = ends_of(packet)
        target = address_of(destination)
        return source in self.client and any(target in network for network in self.networks)


class AccessRule(Observer):
    """Keeps, for each honest gateway, what it was given on its channel, as it heard it."""

    def __init__(self) -> None:
        super().__init__()
        self._hostile: frozenset[str] = frozenset()
        self._rights: dict[str, dict[UUID, _Right]] = {}

    def began(self, now: int, scenario: Scenario, seed: int, hostile: frozenset[str]) -> None:
        self._hostile = hostile

    def heard(self, now: int, agent: str, message: object, epoch: int | None) -> None:
        match message:
            case Authorize():
                self._give(now, agent, message.authorization_id, message)
            case AuthorizationRenewed():
                rights = self._rights.get(agent, {})
                if (right := rights.get(message.authorization_id)) is not None:
                    until_ns = end_ns(now, message.expires_in_ns)
                    rights[message.authorization_id] = attrs.evolve(right, until_ns=until_ns)
            case Revoke():
                self._rights.get(agent, {}).pop(message.authorization_id, None)
            case GatewayInit():
                rights = self._rights.get(agent, {})
                self._rights[agent] = {
                    each.authorization_id: attrs.evolve(
                        rights[each.authorization_id], until_ns=end_ns(now, each.expires_in_ns)
                    )
                    for each in message.authorizations
                    if each.authorization_id in rights
                }

    def forwarded(self, now: int, gateway: str, client: str, packet: bytes) -> None:
        if gateway in self._hostile:
            return
        covering = [each for each in self._rights.get(gateway, {}).values() if each.covers(packet)]
        if not covering:
            self.broken(now, "access", f"{gateway} let {client} through: {told_of(packet)}")
        elif now > max(each.until_ns for each in covering):
            self.broken(now, "access", f"{gateway} let {client} through after the lease")

    def _give(self, now: int, gateway: str, id: UUID, message: Authorize) -> None:
        addresses = frozenset({message.client.ipv4.packed, message.client.ipv6.packed})
        until_ns = end_ns(now, message.expires_in_ns)
        right = _Right(addresses, networks_of(message.resource), until_ns)
        self._rights.setdefault(gateway, {})[id] = right


class SpoofingRule(Observer):
    """Knows the tunnel addresses of clients and the addresses of resources."""

    def __init__(self) -> None:
        super().__init__()
        self._hostile: frozenset[str] = frozenset()
        self._addresses: dict[str, set[bytes]] = {}
        self._asked: dict[str, set[bytes]] = {}

    def began(self, now: int, scenario: Scenario, seed: int, hostile: frozenset[str]) -> None:
        self._hostile = hostile

    def introduced(self, now: int, subject: Subject) -> None:
        if subject.kind == "client":
            self._addresses.setdefault(subject.name, set()).update(subject.addresses)

    def asked(self, now: int, client: str, resource: str, packet: bytes) -> None:
        self._asked.setdefault(client, set()).add(ends_of(packet)[1])

    def forwarded(self, now: int, gateway: str, client: str, packet: bytes) -> None:
        known = self._addresses.get(client)
        if gateway not in self._hostile and known and ends_of(packet)[0] not in known:
            self.broken(now, "spoofing", f"{gateway} took {told_of(packet)} of {client}")

    def answered(self, now: int, client: str, packet: bytes) -> None:
        if client in self._hostile or is_icmp(packet):
            return
        if ends_of(packet)[0] not in self._asked.get(client, ()):
            self.broken(now, "spoofing", f"{client} took {told_of(packet)}, which it never asked")


class IntegrityRule(Observer):
    """Nothing is made up, changed or repeated on the way: datagrams of applications are told apart
    by their contents."""

    def __init__(self) -> None:
        super().__init__()
        self._hostile: frozenset[str] = frozenset()
        self._asked: dict[str, set[bytes]] = {}
        self._forwarded: set[tuple[str, bytes]] = set()

    def began(self, now: int, scenario: Scenario, seed: int, hostile: frozenset[str]) -> None:
        self._hostile = hostile

    def asked(self, now: int, client: str, resource: str, packet: bytes) -> None:
        self._asked.setdefault(client, set()).add(_digest(packet))

    def forwarded(self, now: int, gateway: str, client: str, packet: bytes) -> None:
        if gateway in self._hostile or client in self._hostile or is_icmp(packet):
            return
        digest = _digest(packet)
        if digest not in self._asked.get(client, ()):
            self.broken(now, "integrity", f"{gateway} forwarded what {client} never said")
        elif (client, digest) in self._forwarded:
            self.broken(now, "integrity", f"{gateway} forwarded a datagram of {client} twice")
        self._forwarded.add((client, digest))


# --- what the store says --------------------------------------------------------------------------


class WrittenRule(Observer):
    def __init__(self) -> None:
        super().__init__()
        self._written: set[UUID] = set()

    def authorization_written(
        self, now: int, node: str, authorization: Authorization, epoch: int
    ) -> None:
        self._written.add(authorization.id)

    def granted(
        self, now: int, gateway: str, client: str, authorization_id: UUID, resource_id: UUID
    ) -> None:
        if authorization_id not in self._written:
            self.broken(now, "written", f"{gateway} was given {authorization_id}, never written")


@attrs.define
class _Calm:
    """When faults go on, by the file: their lengths are looked up as they strike."""

    lengths: dict[tuple[str, tuple[str, ...]], deque[int]] = attrs.Factory(dict)
    until_ns: int = 0

    def begin(self, scenario: Scenario) -> None:
        for fault in scenario.faults:
            length_ns = duration_ns(fault.duration) if fault.duration else 0
            if fault.kind == "upgrade":
                length_ns = duration_ns(fault.every) * len(fault.targets)
            self.lengths.setdefault((fault.kind, fault.targets), deque()).append(length_ns)

    def fault(self, now: int, kind: str, targets: tuple[str, ...]) -> None:
        if kind not in ("change", "shrink_directory"):
            lengths = self.lengths.get((kind, targets))
            length_ns = lengths.popleft() if lengths else 0
            self.until_ns = max(self.until_ns, now + length_ns + CALM_AFTER_NS)

    def since(self, at_ns: int) -> bool:
        """Whether times are calm from then to now."""
        return at_ns >= self.until_ns


class RevocationRule(Observer):
    """In calm times, how long after the end of an access was written something passes by it."""

    def __init__(self) -> None:
        super().__init__()
        self._calm = _Calm()
        self._hostile: frozenset[str] = frozenset()
        self._names: dict[UUID, str] = {}
        self._resources: dict[bytes, list[UUID]] = {}
        self._live: dict[_Access, set[UUID]] = {}
        self._ended_ns: dict[_Access, int] = {}

    def began(self, now: int, scenario: Scenario, seed: int, hostile: frozenset[str]) -> None:
        self._calm.begin(scenario)
        self._hostile = hostile

    def introduced(self, now: int, subject: Subject) -> None:
        self._names[subject.id] = subject.name
        if subject.kind == "resource":
            for address in subject.addresses:
                self._resources.setdefault(address, []).append(subject.id)

    def fault(self, now: int, kind: str, targets: tuple[str, ...], text: str) -> None:
        self._calm.fault(now, kind, targets)

    def authorization_written(
        self, now: int, node: str, authorization: Authorization, epoch: int
    ) -> None:
        access = (
            self._names.get(authorization.gateway_id, ""),
            self._names.get(authorization.client_id, ""),
            authorization.resource_id,
        )
        live = self._live.setdefault(access, set())
        if authorization.ended_at is None:
            live.add(authorization.id)
        else:
            live.discard(authorization.id)
            self._ended_ns[access] = now

    def forwarded(self, now: int, gateway: str, client: str, packet: bytes) -> None:
        if gateway in self._hostile:
            return
        resources = self._resources.get(ends_of(packet)[1], ())
        accesses = [(gateway, client, resource) for resource in resources]
        ended = [self._ended_ns[each] for each in accesses if each in self._ended_ns]
        if not ended or any(self._live.get(each) for each in accesses):
            return
        late_ns = now - max(ended)
        if self._calm.since(max(ended)) and late_ns > CALM_BOUND_NS:
            text = f"{gateway} let {client} through {late_ns // 10**6} ms after the end"
            self.broken(now, "revocation", text)


_Access = tuple[str, str, UUID]
"""A gateway, a client (by their names) and a resource."""


class PolicyRule(Observer):
    """A slow direct reading of what an authorisation needs at least: the policy it was given by
    stands and is enabled, the client's user is a member and enabled, the client exists. Conditions
    are the engine's matter."""

    def __init__(self) -> None:
        super().__init__()
        self._calm = _Calm()
        self._by_id: dict[UUID, Any] = {}
        self._members: set[tuple[UUID, UUID]] = set()
        self._live: dict[UUID, Authorization] = {}
        self._unfounded_ns: dict[UUID, int] = {}

    def began(self, now: int, scenario: Scenario, seed: int, hostile: frozenset[str]) -> None:
        self._calm.begin(scenario)

    def fault(self, now: int, kind: str, targets: tuple[str, ...], text: str) -> None:
        self._calm.fault(now, kind, targets)

    def changed(self, now: int, changes: tuple[Change, ...]) -> None:
        self._look(now)
        for change in changes:
            self._apply(change)
        for id, authorization in self._live.items():
            if self._is_founded(authorization):
                self._unfounded_ns.pop(id, None)
            else:
                self._unfounded_ns.setdefault(id, now)

    def authorization_written(
        self, now: int, node: str, authorization: Authorization, epoch: int
    ) -> None:
        self._look(now)
        if authorization.ended_at is None:
            self._live[authorization.id] = authorization
            if not self._is_founded(authorization):
                self._unfounded_ns.setdefault(authorization.id, now)
        else:
            self._live.pop(authorization.id, None)
            self._unfounded_ns.pop(authorization.id, None)

    def ended(self, now: int) -> None:
        self._look(now)

    def _look(self, now: int) -> None:
        for id, since_ns in list(self._unfounded_ns.items()):
            if self._calm.since(since_ns) and now - since_ns > CALM_BOUND_NS:
                self.broken(now, "policy", f"{id} lives on without a policy")
                del self._unfounded_ns[id]

    def _apply(self, change: Change) -> None:
        for entity in (change.before, change.after):
            if isinstance(entity, Membership):
                pair = (entity.group_id, entity.principal_id)
                (self._members.add if entity is change.after else self._members.discard)(pair)
        if change.after is None:
            self._by_id.pop(change.entity_id, None)
        else:
            self._by_id[change.entity_id] = change.after

    def _is_founded(self, authorization: Authorization) -> bool:
        policy = self._by_id.get(authorization.policy_id)
        client = self._by_id.get(authorization.client_id)
        if not isinstance(policy, Policy) or not isinstance(client, Client) or policy.disabled:
            return False
        principal = self._by_id.get(client.principal_id)
        if not isinstance(principal, Principal) or principal.disabled:
            return False
        group = self._by_id.get(policy.group_id)
        is_member = (policy.group_id, principal.id) in self._members or (
            isinstance(group, Group) and group.kind == "everyone" and principal.kind == "user"
        )
        return is_member and authorization.resource_id in self._by_id


# --- the cluster ----------------------------------------------------------------------------------


class OwnersRule(Observer):
    def __init__(self) -> None:
        super().__init__()
        self._owners: dict[UUID, tuple[int, str, int]] = {}
        self._highest_heard: dict[str, int] = {}

    def owner_claimed(
        self, now: int, node: str, incarnation: int, account_id: UUID, epoch: int
    ) -> None:
        known = self._owners.get(account_id)
        claim = (epoch, node, incarnation)
        if known is not None and epoch <= known[0] and claim != known:
            self.broken(now, "owners", f"{node} took epoch {epoch}, which {known[1]} had")
        if known is None or epoch >= known[0]:
            self._owners[account_id] = claim

    def authorization_written(
        self, now: int, node: str, authorization: Authorization, epoch: int
    ) -> None:
        known = self._owners.get(authorization.account_id)
        if known is not None and epoch < known[0]:
            self.broken(now, "owners", f"{node} wrote under epoch {epoch}; it is {known[0]} now")

    def heard(self, now: int, agent: str, message: object, epoch: int | None) -> None:
        if epoch is None:
            return
        highest = self._highest_heard.get(agent, 0)
        if epoch < highest:
            self.broken(now, "owners", f"{agent} took epoch {epoch} after {highest}")
        self._highest_heard[agent] = max(highest, epoch)


# --- the wire -------------------------------------------------------------------------------------


class PlaintextRule(Observer):
    """Looks for the newest words of applications in every datagram, but for those between a gateway
    and its own network. Words that begin alike are looked for together."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: deque[bytes] = deque(maxlen=MAX_MARKS)
        self._beginnings: Counter[bytes] = Counter()
        self._open: set[str] = set()

    def began(self, now: int, scenario: Scenario, seed: int, hostile: frozenset[str]) -> None:
        self._open = {each.name for each in scenario.services}

    def asked(self, now: int, client: str, resource: str, packet: bytes) -> None:
        mark = payload_of(packet)[:MARK_BYTES]
        if len(mark) < MARK_BYTES:
            return
        if len(self._marks) == MAX_MARKS:
            oldest = self._marks[0][:BEGINNING_BYTES]
            self._beginnings[oldest] -= 1
            if not self._beginnings[oldest]:
                del self._beginnings[oldest]
        self._marks.append(mark)
        self._beginnings[mark[:BEGINNING_BYTES]] += 1

    def datagram(
        self, now: int, event: str, hop: str, source: Address, destination: Address, data: bytes
    ) -> None:
        if event != "sent" or hop in self._open:
            return
        if any(begin in data for begin in self._beginnings) and any(
            mark in data for mark in self._marks
        ):
            self.broken(now, "plaintext", f"{hop} sent an application's words in the clear")


class NoncesRule(Observer):
    """Counters of a sending key only rise: RFC-less, the WireGuard paper, section 5.4.6."""

    def __init__(self) -> None:
        super().__init__()
        self._highest: dict[tuple[str, bytes], int] = {}

    def sealed(self, now: int, host: str, key: bytes, counter: int, datagram: bytes) -> None:
        highest = self._highest.get((host, key), -1)
        if counter <= highest:
            self.broken(now, "nonces", f"{host} sealed under counter {counter} after {highest}")
        self._highest[(host, key)] = max(highest, counter)


class SilenceRule(Observer):
    """A gateway does not show itself to a client that has no authorisation."""

    def __init__(self) -> None:
        super().__init__()
        self._scanners: frozenset[str] = frozenset()
        self._gateways: frozenset[str] = frozenset()
        self._sent: deque[bytes] = deque(maxlen=MAX_REMEMBERED)
        self._seen_from: set[Address] = set()

    def began(self, now: int, scenario: Scenario, seed: int, hostile: frozenset[str]) -> None:
        self._scanners = frozenset(
            each.name for each in scenario.clients if each.hostile == "scans"
        )
        self._gateways = frozenset(each.name for each in scenario.gateways if not each.hostile)

    def datagram(
        self, now: int, event: str, hop: str, source: Address, destination: Address, data: bytes
    ) -> None:
        if not self._scanners:
            return
        if event == "sent" and hop in self._scanners:
            self._sent.append(data)
        elif event == "delivered" and hop in self._gateways and data in self._sent:
            self._seen_from.add(source)
        elif event == "sent" and hop in self._gateways and destination in self._seen_from:
            self.broken(now, "silence", f"{hop} answered a scan of {destination}")


# --- helpers --------------------------------------------------------------------------------------


def _digest(packet: bytes) -> bytes:
    return blake2b(packet, digest_size=16).digest()


def end_ns(now: int, lasts_ns: int) -> int:
    """When a lease of a gateway ends, at the latest."""
    return now + lasts_ns + lasts_ns // DRIFT_SHARE


def ends_of(packet: bytes) -> tuple[bytes, bytes]:
    """Source and destination of an IPv4 or IPv6 packet, packed."""
    if packet[0] >> 4 == 6:
        return packet[8:24], packet[24:40]
    return packet[12:16], packet[16:20]


def payload_of(packet: bytes) -> bytes:
    """What follows the headers of IP and UDP."""
    return packet[48:] if packet[0] >> 4 == 6 else packet[28:]


def is_icmp(packet: bytes) -> bool:
    return packet[6] == 58 if packet[0] >> 4 == 6 else packet[9] == 1


def address_of(packed: bytes) -> IPv4Address | IPv6Address:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def networks_of(resource: Resource) -> tuple[Any, ...]:
    """The networks of a resource as an agent is told of it."""
    return (ip_network(resource.address),) if resource.kind in ("cidr", "ip") else ()


def told_of(packet: bytes) -> str:
    source, destination = ends_of(packet)
    return f"a packet of {address_of(source)} to {address_of(destination)}"
