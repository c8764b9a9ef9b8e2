"""The declaration of an account: that it round-trips, and what it says of what cannot be."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from msgspec import UNSET, structs

from actors.declaration import SECTIONS, Declaration, Undeclarable, export
from actors.declaration.exporting import key_of
from actors.declaration.form import (
    AuthProviderEntry,
    DirectoryEntry,
    GroupEntry,
    PolicyEntry,
    PrincipalEntry,
    ResourceEntry,
    SiteEntry,
)
from actors.model import (
    KIND_OF,
    AuthProvider,
    Directory,
    Entity,
    Group,
    Membership,
    Policy,
    Principal,
    Resource,
    Token,
)
from actors.store.interface import Contents
from tests.unit.actors.declarations import (
    ACCOUNT_ID,
    START,
    Installation,
    declarations,
    normal,
    partial_declarations,
)

thorough = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
COMMON: dict[str, Any] = {"account_id": ACCOUNT_ID, "created_at": START}


def without_ids(declaration: Declaration) -> Declaration:
    """Ids are written for names that look like one; which ids, nobody can say beforehand."""
    changes = {
        section: tuple(
            structs.replace(entry, id=UNSET) if hasattr(entry, "id") else entry
            for entry in getattr(declaration, section)
        )
        for section in SECTIONS.values()
        if getattr(declaration, section) is not UNSET
    }
    return structs.replace(declaration, **changes)


def faults_of(here: Installation, **sections: Any) -> dict[str, str]:
    with pytest.raises(Undeclarable) as refused:
        here.plan(Declaration(**sections))
    return {fault.field: fault.message for fault in refused.value.faults}


def only(entities: tuple[Entity, ...], kind: type) -> list[Any]:
    return [entity for entity in entities if isinstance(entity, kind)]


# --- what holds of all declarations --------------------------------------------------------------


@given(declaration=declarations())
@thorough
def test_what_is_applied_is_exported_and_applies_to_nothing_more(declaration: Declaration) -> None:
    here = Installation()
    here.apply(declaration)
    exported = export(here.contents)
    assert without_ids(exported) == normal(declaration)
    assert here.plan(exported).mutations == ()
    assert here.plan(exported).steps == ()
    assert here.plan(declaration).mutations == ()


@given(first=declarations(), second=partial_declarations())
@thorough
def test_an_account_becomes_what_another_declaration_says_and_only_that(
    first: Declaration, second: Declaration
) -> None:
    here = Installation()
    here.apply(first)
    before = here.contents
    try:
        planned = here.plan(second)
    except Undeclarable:
        assume(False)
    here.apply(second)
    after = here.contents
    exported, wanted = without_ids(export(after)), normal(second)
    for section in ("account", *SECTIONS.values()):
        declared = getattr(wanted, section)
        if declared is not UNSET:
            assert getattr(exported, section) == declared, section
    assert here.plan(second).mutations == ()
    assert {(step.action, step.id) for step in planned.steps if step.action != "create"} == {
        (action, id) for action, id in differences(before, after) if action != "create"
    }
    created = [step for step in planned.steps if step.action == "create"]
    assert len(created) == sum(action == "create" for action, _ in differences(before, after))


def differences(before: Contents, after: Contents) -> set[tuple[str, UUID]]:
    """What became of each entity; memberships count as their groups'."""

    def told(contents: Contents) -> dict[UUID, object]:
        entities: dict[UUID, Any] = {
            each.id: [each]
            for each in (contents.account, *contents.entities)
            if not isinstance(each, Membership)
        }
        for membership in only(contents.entities, Membership):
            entities[membership.group_id].append(membership)
        return {id: set(group) for id, group in entities.items()}

    old, new = told(before), told(after)
    return (
        {("delete", id) for id in old.keys() - new.keys()}
        | {("create", id) for id in new.keys() - old.keys()}
        | {("update", id) for id in old.keys() & new.keys() if old[id] != new[id]}
    )


@given(declaration=declarations())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_declaration_survives_json(declaration: Declaration) -> None:
    assert msgspec.json.decode(msgspec.json.encode(declaration), type=Declaration) == declaration


# --- names ---------------------------------------------------------------------------------------


def test_people_of_one_name_are_told_apart_by_their_ids() -> None:
    here = Installation()
    twins = [Principal(id=here.new_id(), name="Robin", **COMMON) for _ in range(2)]
    staff = Group(id=here.new_id(), name="Staff", **COMMON)
    here.put(
        *twins,
        staff,
        Membership(id=here.new_id(), group_id=staff.id, principal_id=twins[1].id, **COMMON),
    )
    exported = export(here.contents)
    assert [entry.id for entry in exported.principals] == [twin.id for twin in twins]
    assert exported.groups[0].members == (f"id:{twins[1].id}",)
    assert here.plan(exported).mutations == ()
    said = faults_of(here, groups=(GroupEntry(name="Staff", members=("Robin",)),))
    assert said == {"groups[0].members[0]": "2 are called 'Robin': write id:<uuid>"}
    said = faults_of(here, principals=(PrincipalEntry(name="Robin"),))
    assert (
        said == {"principals[0]": "2 of these are called 'Robin': say by `id` which is meant"}
        or "principals[0]" in said
    )


def test_a_user_is_known_by_the_address_and_may_change_names() -> None:
    here = Installation()
    here.apply(Declaration(principals=(PrincipalEntry(name="Uwe", email="u@example.org"),)))
    [user] = only(here.contents.entities, Principal)
    here.apply(Declaration(principals=(PrincipalEntry(name="Ute", email="u@example.org"),)))
    assert only(here.contents.entities, Principal) == [attrs.evolve(user, name="Ute")]


def test_a_new_name_is_another_thing_unless_it_says_what_it_was() -> None:
    here = Installation()
    here.apply(Declaration(sites=(SiteEntry(name="Berlin"),)))
    [old] = [site for site in here.contents.entities if key_of(site) == "Berlin"]
    renamed = Declaration(sites=(SiteEntry(name="Bonn", was="Berlin"),))
    made = here.apply(renamed)
    assert [(step.action, step.name, step.id) for step in made.steps] == [
        ("update", "Bonn", old.id)
    ]
    assert here.plan(renamed).mutations == ()
    made = here.apply(Declaration(sites=(SiteEntry(name="Berlin"),)))
    assert {(step.action, step.name) for step in made.steps} == {
        ("create", "Berlin"),
        ("delete", "Bonn"),
    }


def test_names_move_along_a_chain_and_one_is_given_to_a_new_thing() -> None:
    here = Installation()
    here.apply(Declaration(sites=(SiteEntry(name="A"), SiteEntry(name="B"))))
    ids = {key_of(site): site.id for site in here.contents.entities}
    chain = Declaration(
        sites=(SiteEntry(name="B", was="A"), SiteEntry(name="C", was="B"), SiteEntry(name="A"))
    )
    here.apply(chain)
    moved = {key_of(site): site.id for site in here.contents.entities}
    assert (moved["B"], moved["C"]) == (ids["A"], ids["B"])
    assert moved["A"] not in ids.values()
    assert here.plan(chain).mutations == ()


def test_a_renaming_to_what_exists_is_refused() -> None:
    here = Installation()
    here.apply(Declaration(groups=(GroupEntry(name="A"), GroupEntry(name="B"))))
    said = faults_of(here, groups=(GroupEntry(name="B", was="A"),))
    assert said == {"groups[0].was": "'A' and 'B' both exist: remove one, or leave `was` out"}
    [a, b] = [g for g in only(here.contents.entities, Group) if g.kind == "static"]
    said = faults_of(here, groups=(GroupEntry(name="B", id=a.id), GroupEntry(name="A", id=b.id)))
    assert list(said) == ["groups"]


def test_what_stands_twice_or_nowhere_is_named_with_its_place() -> None:
    here = Installation()
    said = faults_of(
        here,
        sites=(SiteEntry(name="A"), SiteEntry(name="A"), SiteEntry(name="X", id=UUID(int=1))),
    )
    assert set(said) == {"sites[0]", "sites[1]", "sites[2].id"}
    said = faults_of(
        here,
        groups=(GroupEntry(name="Staff", members=("nobody",)),),
        policies=(PolicyEntry(group="Crew", resource="Hall"),),
    )
    assert said == {
        "groups[0].members[0]": "there is no principal 'nobody'",
        "policies[0].group": "no group 'Crew' is declared in groups",
        "policies[0].resource": "there is no resource 'Hall'",
    }


# --- what is nobody's to declare -----------------------------------------------------------------


def test_what_is_managed_or_synced_is_referred_to_and_never_declared() -> None:
    here = Installation()
    directory = Directory(id=here.new_id(), kind="okta", name="Okta", **COMMON)
    synced = Group(
        id=here.new_id(), kind="synced", name="Engineers", directory_id=directory.id,
        external_id="e", **COMMON,
    )  # fmt: skip
    here.put(directory, synced)
    assert export(here.contents).groups == ()
    assert export(here.contents).sites == ()
    said = faults_of(here, groups=(GroupEntry(name="Everyone"), GroupEntry(name="Engineers")))
    assert set(said) == {"groups[0]", "groups[1]"}
    here.apply(
        Declaration(
            groups=(),
            sites=(SiteEntry(name="Berlin"),),
            resources=(
                ResourceEntry(name="Hall", kind="ip", address="10.0.0.1", sites=("Berlin",)),
            ),
            policies=(
                PolicyEntry(group="Everyone", resource="Hall"),
                PolicyEntry(group="Engineers", resource="Hall"),
            ),
        )
    )
    assert synced in here.contents.entities
    assert {policy.group for policy in export(here.contents).policies} == {"Everyone", "Engineers"}
    made = here.plan(Declaration(directories=()))
    assert {(step.kind, step.name, step.because) for step in made.steps} == {
        ("directory", "Okta", ""),
        ("group", "Engineers", "directory Okta"),
        ("policy", "Engineers -> Hall", "directory Okta"),
    }


def test_what_goes_along_is_told() -> None:
    here = Installation()
    here.apply(
        Declaration(
            principals=(PrincipalEntry(name="Uwe"),),
            groups=(GroupEntry(name="S", members=("Uwe",)),),
        )
    )
    [user] = only(here.contents.entities, Principal)
    token = Token(
        id=here.new_id(), kind="client", name="laptop", hash=bytes(32), principal_id=user.id,
        **COMMON,
    )  # fmt: skip
    here.put(token)
    made = here.plan(Declaration(principals=()))
    assert [(step.action, step.kind, step.name, step.because) for step in made.steps] == [
        ("delete", "principal", "Uwe", ""),
        ("update", "group", "S", ""),
        ("delete", "token", "laptop", "principal Uwe"),
    ]
    assert len(made.mutations) == 1


def test_members_that_are_not_named_are_left_alone() -> None:
    here = Installation()
    here.apply(
        Declaration(
            principals=(PrincipalEntry(name="Uwe"),),
            groups=(GroupEntry(name="S", members=("Uwe",)),),
        )
    )
    assert here.plan(Declaration(groups=(GroupEntry(name="S"),))).mutations == ()
    assert len(here.plan(Declaration(groups=(GroupEntry(name="S", members=()),))).mutations) == 1


# --- policies, resources, secrets ----------------------------------------------------------------


def test_policies_of_one_pair_keep_their_ids_as_far_as_they_can() -> None:
    here = Installation()
    first = PolicyEntry(group="Everyone", resource="Hall", description="day")
    second = PolicyEntry(group="Everyone", resource="Hall", description="night", lease_s=60)
    base = Declaration(
        sites=(SiteEntry(name="B"),),
        resources=(ResourceEntry(name="Hall", kind="cidr", address="10.0.0.0/8", sites=("B",)),),
    )
    here.apply(structs.replace(base, policies=(first, second)))
    ids = {policy.description: policy.id for policy in only(here.contents.entities, Policy)}
    changed = structs.replace(second, lease_s=90)
    made = here.apply(Declaration(policies=(changed, first)))
    assert [(step.action, step.id) for step in made.steps] == [("update", ids["night"])]
    made = here.apply(Declaration(policies=(structs.replace(changed, description="dusk"),)))
    assert {(step.action, step.id) for step in made.steps} == {
        ("update", ids["day"]),
        ("delete", ids["night"]),
    }


def test_the_internet_resource_is_one_whatever_its_name() -> None:
    here = Installation()

    def declared(name: str) -> Declaration:
        return Declaration(
            resources=(ResourceEntry(name=name, kind="internet", sites=("Internet",)),)
        )

    here.apply(declared("Internet"))
    [before] = only(here.contents.entities, Resource)
    here.apply(declared("Web"))
    assert only(here.contents.entities, Resource) == [attrs.evolve(before, name="Web")]


def test_devices_of_a_pool_are_those_that_there_are() -> None:
    here = Installation()
    said = faults_of(
        here,
        resources=(ResourceEntry(name="Pool", kind="device_pool", devices=(UUID(int=5),)),),
    )
    assert said["resources[0].devices[0]"] == "there is no such client"


def test_a_secret_is_written_once_and_never_told() -> None:
    here = Installation()
    provider = AuthProviderEntry(
        name="Login", kind="oidc", issuer="https://a.example", client_id="c", client_secret="sesame"
    )
    directory = DirectoryEntry(name="Okta", kind="okta", credentials="sesame")
    declared = Declaration(auth_providers=(provider,), directories=(directory,))
    assert "sesame" not in repr(declared)
    made = here.apply(declared)
    assert "sesame" not in repr(made.steps)
    assert "sesame" not in msgspec.json.encode(export(here.contents)).decode()
    assert here.plan(declared).mutations == ()
    assert here.plan(export(here.contents)).mutations == ()
    [kept] = only(here.contents.entities, AuthProvider)
    assert kept.client_secret.box == f"auth_provider client_secret {kept.id} sesame".encode()
    changed = here.plan(
        Declaration(auth_providers=(structs.replace(provider, client_secret="other"),))
    )
    [step] = changed.steps
    assert [(f.field, f.before, f.after) for f in step.fields] == [
        ("client_secret", "(secret)", "(secret)")
    ]


def test_a_value_outside_the_model_is_named() -> None:
    here = Installation()
    said = faults_of(
        here,
        sites=(SiteEntry(name="B"),),
        resources=(ResourceEntry(name="Hall", kind="cidr", address="10.0.0.1/8", sites=("B",)),),
    )
    assert said == {"resources[0].address": "cannot be taken"}


def test_every_kind_is_declared_or_made_by_devices_and_people() -> None:
    elsewhere = {"account", "identity", "membership", "token", "client", "gateway"}
    assert set(KIND_OF.values()) == {*SECTIONS, *elsewhere}
