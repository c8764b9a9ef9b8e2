"""Each rule of safety breaks on what it forbids, and on nothing else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from uuid import UUID

import attrs
import pytest

from actors.model import Authorization, Change, Client, Entity, Membership, Policy, Principal
from actors.model import Resource as Protected
from channel.messages import (
    AuthorizationRenewed,
    Authorize,
    GatewayInit,
    IceCredentials,
    IceParameters,
    Interface,
    IpText,
    LiveAuthorization,
    Peer,
    Resource,
    Revoke,
)
from runtime.net.address import Address
from simulations.checks.interface import Observer, Subject
from simulations.checks.safety import (
    CALM_BOUND_NS,
    AccessRule,
    IntegrityRule,
    NoncesRule,
    OwnersRule,
    PlaintextRule,
    PolicyRule,
    RevocationRule,
    SilenceRule,
    SpoofingRule,
    WrittenRule,
    all_rules,
)
from simulations.scenario.schema import Client as ClientHost
from simulations.scenario.schema import Fault, Scenario
from tests.small_scenario import SCENARIO

S = 10**9
AT = datetime(2026, 1, 1, tzinfo=UTC)
ACCOUNT, USER, GROUP, POLICY, RESOURCE, CLIENT, GATEWAY, TOKEN = (UUID(int=n) for n in range(1, 9))
LAPTOP = IPv4Address("100.64.0.5")
SERVER = IPv4Address("10.20.0.80")
WORDS = b"who is there? 0123"


def packet(source: IPv4Address, destination: IPv4Address, data: bytes = WORDS) -> bytes:
    header = bytes([0x45]) + bytes(8) + bytes([17, 0, 0])
    return header + source.packed + destination.packed + bytes(8) + data


QUESTION = packet(LAPTOP, SERVER)
ICE = IceCredentials(fragment="a" * 8, password="b" * 32)
AUTHORIZE = Authorize(
    authorization_id=UUID(int=100),
    connection_id=UUID(int=200),
    client=Peer(id=CLIENT, public_key=bytes(32), ipv4=LAPTOP, ipv6=IPv6Address("fd00::5")),
    resource=Resource(id=RESOURCE, name="Intranet", kind="cidr", address="10.20.0.0/24"),
    ice=IceParameters(client=ICE, gateway=ICE),
    expires_in_ns=100 * S,
)
WRITTEN = Authorization(
    id=UUID(int=100),
    account_id=ACCOUNT,
    policy_id=POLICY,
    client_id=CLIENT,
    gateway_id=GATEWAY,
    resource_id=RESOURCE,
    token_id=TOKEN,
    connection_id=UUID(int=200),
    remote_ip=IpText("192.0.2.1"),
    created_at=AT,
    expires_at=AT + timedelta(hours=1),
)
ENDED = attrs.evolve(WRITTEN, ended_at=AT + timedelta(seconds=5), end_reason="policy")


def begun(rule: Observer, scenario: Scenario = SCENARIO, *hostile: str) -> Observer:
    rule.began(0, scenario, 1, frozenset(hostile))
    subjects = (
        Subject(kind="client", name="laptop", id=CLIENT, addresses=(LAPTOP.packed,)),
        Subject(kind="gateway", name="gateway", id=GATEWAY),
        Subject(kind="resource", name="intranet", id=RESOURCE, addresses=(SERVER.packed,)),
    )
    for subject in subjects:
        rule.introduced(0, subject)
    return rule


def broken(rule: Observer) -> list[str]:
    return [each.rule for each in rule.violations]


# --- access ---------------------------------------------------------------------------------------


def test_what_a_gateway_was_given_may_pass_until_it_is_revoked() -> None:
    rule = begun(AccessRule())
    rule.heard(1, "gateway", AUTHORIZE, 1)
    rule.forwarded(2, "gateway", "laptop", QUESTION)
    assert not rule.violations
    rule.heard(3, "gateway", Revoke(authorization_id=AUTHORIZE.authorization_id), 1)
    rule.forwarded(4, "gateway", "laptop", QUESTION)
    assert broken(rule) == ["access"]


@pytest.mark.parametrize(
    "other",
    [packet(LAPTOP, IPv4Address("10.21.0.80")), packet(IPv4Address("100.64.0.6"), SERVER)],
    ids=["another resource", "another client"],
)
def test_what_it_was_not_given_must_not(other: bytes) -> None:
    rule = begun(AccessRule())
    rule.heard(1, "gateway", AUTHORIZE, 1)
    rule.forwarded(2, "gateway", "laptop", other)
    assert broken(rule) == ["access"]


def test_nothing_passes_after_the_lease_or_at_another_gateway() -> None:
    rule = begun(AccessRule())
    rule.heard(0, "gateway", AUTHORIZE, 1)
    rule.forwarded(101 * S, "gateway", "laptop", QUESTION)  # its clock may run slower
    assert not rule.violations
    rule.forwarded(103 * S, "gateway", "laptop", QUESTION)
    rule.forwarded(5, "another", "laptop", QUESTION)
    assert broken(rule) == ["access", "access"]


def test_a_renewed_lease_is_a_longer_one() -> None:
    rule = begun(AccessRule())
    rule.heard(0, "gateway", AUTHORIZE, 1)
    id = AUTHORIZE.authorization_id
    renewed = AuthorizationRenewed(authorization_id=id, expires_in_ns=100 * S)
    rule.heard(90 * S, "gateway", renewed, 1)
    rule.forwarded(180 * S, "gateway", "laptop", QUESTION)
    assert not rule.violations
    rule.forwarded(193 * S, "gateway", "laptop", QUESTION)
    assert broken(rule) == ["access"]


def test_the_truth_at_a_rejoin_ends_what_is_not_in_it_and_renews_the_rest() -> None:
    rule = begun(AccessRule())
    other = attrs.evolve(AUTHORIZE, authorization_id=UUID(int=101))
    rule.heard(0, "gateway", AUTHORIZE, 1)
    rule.heard(0, "gateway", other, 1)
    live = LiveAuthorization(
        authorization_id=other.authorization_id,
        connection_id=other.connection_id,
        resource_id=RESOURCE,
        expires_in_ns=500 * S,
    )
    network = AUTHORIZE.client.ipv4, AUTHORIZE.client.ipv6
    interface = Interface(
        ipv4=network[0],
        ipv6=network[1],
        range_ipv4=IPv4Network("100.64.0.0/11"),
        range_ipv6=IPv6Network("fd48::/64"),
    )

    def truth(*authorizations: LiveAuthorization) -> GatewayInit:
        return GatewayInit(
            account_id=ACCOUNT,
            gateway_id=GATEWAY,
            interface=interface,
            relays=(),
            authorizations=authorizations,
        )

    rule.heard(50 * S, "gateway", truth(live), 1)
    rule.forwarded(400 * S, "gateway", "laptop", QUESTION)
    assert not rule.violations
    rule.heard(401 * S, "gateway", truth(), 1)
    rule.forwarded(402 * S, "gateway", "laptop", QUESTION)
    assert broken(rule) == ["access"]


def test_of_a_hostile_gateway_nothing_is_expected() -> None:
    rule = begun(AccessRule(), SCENARIO, "gateway")
    rule.forwarded(1, "gateway", "laptop", QUESTION)
    assert not rule.violations


def test_addresses_of_others_are_not_taken() -> None:
    rule = begun(SpoofingRule())
    rule.forwarded(1, "gateway", "laptop", QUESTION)
    rule.asked(1, "laptop", "intranet", QUESTION)
    rule.answered(1, "laptop", packet(SERVER, LAPTOP))
    assert not rule.violations
    rule.forwarded(2, "gateway", "laptop", packet(IPv4Address("100.64.0.6"), SERVER))
    rule.answered(2, "laptop", packet(IPv4Address("10.20.0.81"), LAPTOP))
    assert broken(rule) == ["spoofing", "spoofing"]


def test_what_is_forwarded_was_said_and_is_forwarded_once() -> None:
    rule = begun(IntegrityRule())
    rule.asked(1, "laptop", "intranet", QUESTION)
    rule.forwarded(2, "gateway", "laptop", QUESTION)
    assert not rule.violations
    rule.forwarded(3, "gateway", "laptop", QUESTION)
    rule.forwarded(3, "gateway", "laptop", packet(LAPTOP, SERVER, b"never said before"))
    assert broken(rule) == ["integrity", "integrity"]


# --- the store ------------------------------------------------------------------------------------


def test_what_is_given_out_was_written_before() -> None:
    rule = begun(WrittenRule())
    rule.authorization_written(1, "portal-1", WRITTEN, 1)
    rule.granted(2, "gateway", "laptop", WRITTEN.id, RESOURCE)
    assert not rule.violations
    rule.granted(3, "gateway", "laptop", UUID(int=101), RESOURCE)
    assert broken(rule) == ["written"]


def test_a_revocation_takes_effect_within_its_bound_in_calm_times() -> None:
    rule = begun(RevocationRule())
    rule.authorization_written(0, "portal-1", WRITTEN, 1)
    rule.authorization_written(5 * S, "portal-1", ENDED, 1)
    rule.forwarded(5 * S + CALM_BOUND_NS, "gateway", "laptop", QUESTION)
    assert not rule.violations
    rule.forwarded(5 * S + CALM_BOUND_NS + 1, "gateway", "laptop", QUESTION)
    assert broken(rule) == ["revocation"]


def test_another_access_to_the_same_resource_lives_on() -> None:
    rule = begun(RevocationRule())
    rule.authorization_written(0, "portal-1", WRITTEN, 1)
    rule.authorization_written(0, "portal-1", attrs.evolve(WRITTEN, id=UUID(int=101)), 1)
    rule.authorization_written(5 * S, "portal-1", ENDED, 1)
    rule.forwarded(60 * S, "gateway", "laptop", QUESTION)
    assert not rule.violations


def test_amid_faults_a_revocation_may_be_late() -> None:
    fault = Fault(at="1s", kind="partition", targets=("gateway",), others=("portal-1",),
                  duration="30s")  # fmt: skip
    rule = begun(RevocationRule(), attrs.evolve(SCENARIO, faults=(fault,)))
    rule.fault(1 * S, "partition", ("gateway",), "")
    rule.authorization_written(0, "portal-1", WRITTEN, 1)
    rule.authorization_written(5 * S, "portal-1", ENDED, 1)
    rule.forwarded(30 * S, "gateway", "laptop", QUESTION)
    assert not rule.violations
    rule.authorization_written(60 * S, "portal-1", ENDED, 1)
    rule.forwarded(62 * S, "gateway", "laptop", QUESTION)
    assert broken(rule) == ["revocation"]


ENTITIES: tuple[Entity, ...] = (
    Principal(id=USER, account_id=ACCOUNT, name="Grace", created_at=AT),
    Membership(id=UUID(int=50), account_id=ACCOUNT, group_id=GROUP, principal_id=USER,
               created_at=AT),
    Protected(id=RESOURCE, account_id=ACCOUNT, site_ids=(UUID(int=60),), name="Intranet",
              kind="cidr", address="10.20.0.0/24", created_at=AT),
    Policy(id=POLICY, account_id=ACCOUNT, group_id=GROUP, resource_id=RESOURCE, created_at=AT),
    Client(id=CLIENT, account_id=ACCOUNT, principal_id=USER, token_id=TOKEN, device_key=bytes(32),
           name="laptop", ipv4=LAPTOP, ipv6=IPv6Address("fd00::5"), created_at=AT),
)  # fmt: skip


def change(before: Entity | None, after: Entity | None) -> Change:
    entity = after or before
    assert entity is not None
    return Change(
        account_id=ACCOUNT,
        number=1,
        at=AT,
        who="admin",
        kind="policy",
        entity_id=entity.id,
        before=before,
        after=after,
    )


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_an_access_without_its_ground_does_not_live_on(number: int) -> None:
    rule = begun(PolicyRule())
    rule.changed(0, tuple(change(None, entity) for entity in ENTITIES))
    rule.authorization_written(1 * S, "portal-1", WRITTEN, 1)
    rule.ended(100 * S)
    assert not rule.violations
    rule.changed(101 * S, (change(ENTITIES[number], None),))
    rule.ended(101 * S + CALM_BOUND_NS)
    assert not rule.violations
    rule.ended(102 * S + CALM_BOUND_NS)
    assert broken(rule) == ["policy"]


def test_an_access_that_is_ended_in_time_breaks_nothing() -> None:
    rule = begun(PolicyRule())
    rule.changed(0, tuple(change(None, entity) for entity in ENTITIES))
    rule.authorization_written(1 * S, "portal-1", WRITTEN, 1)
    rule.changed(2 * S, (change(ENTITIES[3], None),))
    rule.authorization_written(2 * S, "portal-1", ENDED, 1)
    rule.ended(100 * S)
    assert not rule.violations


# --- owners ---------------------------------------------------------------------------------------


def test_epochs_rise_and_nothing_is_written_under_an_old_one() -> None:
    rule = begun(OwnersRule())
    rule.owner_claimed(0, "portal-1", 1, ACCOUNT, 1)
    rule.owner_claimed(1, "portal-2", 1, ACCOUNT, 2)
    rule.authorization_written(2, "portal-2", WRITTEN, 2)
    assert not rule.violations
    rule.authorization_written(3, "portal-1", WRITTEN, 1)
    rule.owner_claimed(4, "portal-1", 1, ACCOUNT, 2)
    assert broken(rule) == ["owners", "owners"]


def test_no_agent_takes_the_word_of_a_former_owner() -> None:
    rule = begun(OwnersRule())
    rule.heard(0, "gateway", AUTHORIZE, 2)
    rule.heard(1, "laptop", AUTHORIZE, 1)
    assert not rule.violations
    rule.heard(2, "gateway", AUTHORIZE, 1)
    assert broken(rule) == ["owners"]


# --- the wire -------------------------------------------------------------------------------------

HERE, THERE = Address("192.0.2.1", 1), Address("192.0.2.2", 2)


def test_what_an_application_says_is_on_no_wire() -> None:
    rule = begun(PlaintextRule())
    rule.asked(0, "laptop", "intranet", QUESTION)
    rule.datagram(1, "sent", "laptop", HERE, THERE, b"sealed and sealed")
    assert not rule.violations
    rule.datagram(2, "sent", "laptop", HERE, THERE, b"tunnel:" + QUESTION)
    assert broken(rule) == ["plaintext"]


def test_no_counter_is_used_twice_under_one_key() -> None:
    rule = begun(NoncesRule())
    for key, counter in ((b"1", 0), (b"1", 1), (b"2", 0), (b"1", 3)):
        rule.sealed(0, "laptop", key, counter, b"")
    rule.sealed(0, "gateway", b"1", 3, b"")
    assert not rule.violations
    rule.sealed(1, "laptop", b"1", 3, b"")
    assert broken(rule) == ["nonces"]


def test_a_gateway_does_not_answer_a_scan() -> None:
    scanner = ClientHost(name="mallory", network="home", user="grace", hostile="scans")
    rule = begun(SilenceRule(), attrs.evolve(SCENARIO, clients=(*SCENARIO.clients, scanner)))
    rule.datagram(0, "sent", "mallory", Address("192.168.1.9", 5), THERE, b"scan")
    rule.datagram(1, "delivered", "gateway", HERE, THERE, b"scan")
    rule.datagram(2, "sent", "gateway", THERE, Address("192.0.2.7", 1), b"to somebody else")
    assert not rule.violations
    rule.datagram(3, "sent", "gateway", THERE, HERE, b"here I am")
    assert broken(rule) == ["silence"]


def test_every_rule_takes_part() -> None:
    names = {type(rule).__name__ for rule in all_rules()}
    assert len(names) == 10
