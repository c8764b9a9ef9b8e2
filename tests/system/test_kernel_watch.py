"""What the taps of the kernel twin see, and which breaches are found by it: who lies here sends
real packets from the namespaces of a client and a gateway."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import attrs
import msgspec
import pytest

from simulations.faults import Struck
from simulations.kernel.follow import Follow
from simulations.kernel.lab import Lab
from simulations.kernel.taps import Seen, Taps
from simulations.kernel.topology import Topology
from simulations.kernel.watch import BOUND_NS, Authorized, Watch, question
from simulations.result import Violation
from simulations.scenario.load import ready
from simulations.scenario.schema import Fault, Scenario
from simulations.traffic import Pair
from tests.system.both_worlds import hastened, in_both_worlds

pytestmark = pytest.mark.system

FILE = """
format = 1
name = "watched"

[[networks]]
name = "home"
nat = {}
uplink = { latency = "0ms" }

[[networks]]
name = "office"
prefix = "10.20.0.0/24"
prefix6 = "2001:db8:2::/64"
nat = {}
uplink = { latency = "0ms" }

[[portals]]
name = "portal"

[[relays]]
name = "relay"

[[gateways]]
name = "gateway"
network = "office"
site = "office"

[[services]]
name = "wiki"
network = "office"
address = "10.20.0.80"

[[clients]]
name = "laptop"
network = "home"
user = "grace"

[account]
sites = ["office"]
users = [{ name = "grace" }]
resources = [{ name = "wiki", sites = ["office"], service = "wiki" }]
policies = [{ name = "wiki", group = "everyone", resource = "wiki" }]
"""
SCENARIO = msgspec.toml.decode(FILE, type=Scenario)
MARK = b"\xf0one run"
PORT = 7_007
SECOND = 10**9


@attrs.frozen
class Ground:
    """All hosts of the file, and no process of Holloway on them."""

    topology: Topology

    def send(self, host: str, to: str, data: bytes) -> None:
        with self.topology.place(host).host.entered():
            sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sending:
            sending.sendto(data, (to, PORT))

    def seen_while(self, act: Callable[[], None]) -> tuple[Watch, list[Seen]]:
        watch, seen = Watch(SCENARIO, self.topology, MARK), list[Seen]()

        def take(each: Seen) -> None:
            seen.append(each)
            watch.see(each)

        hosts = {name: self.topology.place(name).host for name in self.topology.names}
        with Taps(hosts, take) as taps:
            act()
            time.sleep(0.1)  # what was sent is on its way through veth devices
        assert taps.unseen == 0
        assert taps.seen == len(seen)
        return watch, seen

    @property
    def wiki(self) -> str:
        return self.topology.address_of("wiki")


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Lab() as lab:
        topology = Topology(lab, SCENARIO)
        for name, network in (
            ("portal", "internet"), ("relay", "internet"), ("gateway", "office"),
            ("wiki", "office"), ("laptop", "home"),
        ):  # fmt: skip
            topology.host(name, network, "10.20.0.80" if name == "wiki" else "")
        with contextlib.ExitStack() as listening:
            for name in topology.names:  # else they would answer by ICMP
                with topology.place(name).host.entered():
                    door = listening.enter_context(socket.socket(type=socket.SOCK_DGRAM))
                door.bind(("", PORT))
            yield Ground(topology)


def pair(*allowed: tuple[int, bool]) -> Pair:
    made = Pair(0, "laptop", "wiki", b"")
    made.allowed.extend(allowed)
    return made


def authorized(*, ended_ns: int | None = None, created_ns: int | None = None) -> Authorized:
    now = time.monotonic_ns()
    return Authorized(
        client="laptop",
        gateway="gateway",
        resource="wiki",
        created_ns=now - 100 * SECOND if created_ns is None else created_ns,
        expires_ns=now + 100 * SECOND,
        ended_ns=ended_ns,
    )


def rules(found: list[Violation]) -> list[str]:
    return [each.rule for each in found]


def test_what_a_gateway_lets_through_with_a_right_is_no_breach(ground: Ground) -> None:
    def act() -> None:
        for index in range(3):
            ground.send("gateway", ground.wiki, question(MARK, 0, index, 64 + index))

    watch, seen = ground.seen_while(act)
    assert watch.arrived == 3
    assert watch.judge([pair((0, True))], [], [authorized()], {}) == []
    at_wiki = [each for each in seen if each.host == "wiki" and MARK in each.packet]
    assert [each.outgoing for each in at_wiki] == [False] * 3
    assert abs(at_wiki[0].at_ns - time.monotonic_ns()) < 2 * SECOND


def test_without_an_authorisation_or_a_policy_it_is_one(ground: Ground) -> None:
    watch, _ = ground.seen_while(
        lambda: ground.send("gateway", ground.wiki, question(MARK, 0, 0, 64))
    )
    assert rules(watch.judge([pair((0, True))], [], [], {})) == ["access"]
    assert rules(watch.judge([pair((0, False))], [], [authorized()], {})) == ["policy"]
    other = attrs.evolve(authorized(), client="tablet")
    assert rules(watch.judge([pair((0, True))], [], [other], {})) == ["access"]
    assert watch.judge([pair((0, True))], [], None, {}) == []
    assert watch.unjudged == 1


def test_after_a_revocation_and_its_bound_it_is_one_but_not_while_faults_go_on(
    ground: Ground,
) -> None:
    watch, seen = ground.seen_while(
        lambda: ground.send("gateway", ground.wiki, question(MARK, 0, 0, 64))
    )
    at = next(each.at_ns for each in seen if each.host == "wiki" and MARK in each.packet)
    for late, broken in ((BOUND_NS - SECOND, []), (BOUND_NS + SECOND, ["policy", "access"])):
        revoked = at - late
        pairs = [pair((0, True), (revoked, False))]
        rights = [authorized(ended_ns=revoked)]
        assert rules(watch.judge(pairs, [], rights, {})) == broken
        for fault in (Fault(at="1s", kind="pause", targets=("gateway",)),):
            struck = [Struck(fault, revoked - 10 * SECOND, revoked - 5 * SECOND)]
            assert watch.judge(pairs, struck, rights, {}) == []
        change = Struck(Fault(at="1s", kind="change"), revoked, None)
        assert rules(watch.judge(pairs, [change], rights, {})) == broken


def test_before_it_was_given_or_after_the_lease_it_is_one(ground: Ground) -> None:
    watch, _ = ground.seen_while(
        lambda: ground.send("gateway", ground.wiki, question(MARK, 0, 0, 64))
    )
    soon = authorized(created_ns=time.monotonic_ns() + SECOND)
    past = attrs.evolve(authorized(), expires_ns=time.monotonic_ns() - 5 * SECOND)
    for right in (soon, past):
        assert rules(watch.judge([pair((0, True))], [], [right], {})) == ["access"]


def test_what_comes_twice_or_changed_is_found(ground: Ground) -> None:
    said = question(MARK, 0, 0, 64)

    def act() -> None:
        for data in (said, said, question(MARK, 0, 1, 64)[:-1] + b"?"):
            ground.send("gateway", ground.wiki, data)

    watch, _ = ground.seen_while(act)
    found = watch.judge([pair((0, True))], [], [authorized()], {})
    assert rules(found) == ["integrity", "integrity"]
    assert "twice" in found[0].detail
    assert "nobody said" in found[1].detail


def test_an_error_that_quotes_a_packet_is_not_taken_for_one(ground: Ground) -> None:
    elsewhere = question(MARK, 0, 0, 64)

    def act() -> None:
        with ground.topology.place("laptop").host.entered():
            sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sending:
            sending.sendto(elsewhere, (ground.topology.address_of("relay"), PORT + 1))

    watch, seen = ground.seen_while(act)
    assert any(each.host == "relay" and each.outgoing and MARK in each.packet for each in seen)
    assert [each.detail.partition(" ")[0] for each in watch.judge([], [], [], {})] == ["laptop"]


def test_words_in_the_clear_are_found_wherever_they_are_sent(ground: Ground) -> None:
    relay = ground.topology.address_of("relay")
    said = question(MARK, 0, 0, 64)
    for host in ("gateway", "laptop", "portal"):
        watch, _ = ground.seen_while(lambda host=host: ground.send(host, relay, b"xx" + said))  # type: ignore[misc]
        [found] = watch.judge([pair((0, True))], [], [], {})
        assert (found.rule, found.detail.partition(" ")[0]) == ("plaintext", host)


def test_a_client_that_asks_past_its_agent_is_found_only_if_the_agent_has_the_resource(
    ground: Ground,
) -> None:
    watch, seen = ground.seen_while(
        lambda: ground.send("laptop", ground.wiki, question(MARK, 0, 0, 64))
    )
    at = next(each.at_ns for each in seen if each.host == "laptop" and MARK in each.packet)
    pairs = [pair((0, True))]
    assert watch.beside == 1
    assert watch.judge(pairs, [], [], {}) == []

    def said(*names: str) -> dict[str, list[tuple[int, frozenset[str]]]]:
        return {"laptop": [(at + step * SECOND // 2, frozenset(names)) for step in range(-4, 4)]}

    assert watch.judge(pairs, [], [], said()) == []
    assert rules(watch.judge(pairs, [], [], said("wiki"))) == ["plaintext"]
    crash = Struck(Fault(at="1s", kind="crash", targets=("laptop",)), at - SECOND, None)
    assert watch.judge(pairs, [crash], [], said("wiki")) == []


def test_a_followed_session_is_told_by_what_its_hosts_send_and_get(ground: Ground) -> None:
    follow = Follow(SCENARIO, ground.topology, "laptop", "wiki")
    relay = ground.topology.address_of("relay")
    initiation = b"\x01\0\0\0" + bytes(144)

    def act() -> None:
        ground.send("laptop", relay, initiation)
        ground.send("gateway", relay, initiation)
        ground.send("relay", ground.topology.address_of("portal"), initiation)

    _, seen = ground.seen_while(act)
    for each in seen:
        follow.see(each)
    follow.fault(0, "a fault")
    fault, *steps = follow.steps(0)
    assert (fault.kind, fault.text) == ("fault", "a fault")
    told = [(step.kind, step.where, step.text, step.peer, step.size) for step in steps]
    assert told == [
        ("wireguard", "laptop", "sent initiation", f"{relay}:{PORT}", 176),
        ("wireguard", "relay", "delivered initiation", f"{relay}:{PORT}", 176),
    ]


def test_taps_see_hosts_that_have_moved_and_end_with_what_was_seen(ground: Ground) -> None:
    def act() -> None:
        ground.topology.move("laptop", "office")
        ground.send("laptop", ground.wiki, question(MARK, 0, 7, 64))
        ground.topology.move("laptop", "home")

    watch, seen = ground.seen_while(act)
    assert watch.beside == 1
    assert watch.arrived == 0, "it did not come from a gateway"
    assert any(each.host == "wiki" and MARK in each.packet for each in seen)


def test_what_real_processes_do_is_seen_whole_and_breaks_no_rule() -> None:
    virtual, kernel = in_both_worlds(hastened(ready("home-office"), 3), follow=("laptop", "wiki"))
    counters = kernel.counters
    assert counters["questions_through_gateways"] >= counters["answers"] > 0
    assert counters["questions_unjudged"] == counters["packets_unseen"] == 0
    assert counters["questions_in_the_open"] > 0, "the tablet has no way into the tunnel"
    kinds = {step.kind for step in kernel.timeline}
    assert kinds == {"channel", "stun", "wireguard", "fault"}, "it needs no relay of its own"
    for result in (virtual, kernel):
        steps = [(step.where, step.text) for step in result.timeline]
        order = [
            ("laptop", "sent binding request"),
            ("laptop", "sent initiation"),
            ("laptop", "delivered response"),
            ("laptop", "sent data"),
            ("laptop", "delivered data"),
        ]
        assert [steps.index(each) for each in order] == sorted(steps.index(each) for each in order)


def test_a_policy_that_expires_is_over_in_both_worlds() -> None:
    scenario = hastened(ready("home-office"), 3)
    [engineers, *_] = scenario.account.policies
    account = attrs.evolve(scenario.account, policies=(attrs.evolve(engineers, expires_in="12s"),))
    scenario = attrs.evolve(scenario, account=account, faults=(), checks=())
    _, kernel = in_both_worlds(scenario)
    laptop = next(pair for pair in kernel.pairs if pair.client == "laptop")
    assert laptop.outcome == "denied"
    assert laptop.answered < laptop.asked


def test_taps_may_be_closed_twice() -> None:
    with Taps({}, lambda _: None) as taps:
        pass
    taps.close()
    assert taps.seen == taps.unseen == 0
