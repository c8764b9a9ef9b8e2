"""From entities to a declaration: by which name each thing is known, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
from msgspec import structs

from actors.declaration.form import (
    AccountSection,
    AnyEntry,
    AuthProviderEntry,
    ConditionsPart,
    Declaration,
    DirectoryEntry,
    GroupEntry,
    PolicyEntry,
    PolicyTestEntry,
    PrincipalEntry,
    ResourceEntry,
    SiteEntry,
    without_defaults,
)
from actors.model import (
    KIND_OF,
    Account,
    AuthProvider,
    Conditions,
    Directory,
    Entity,
    EntityKind,
    Group,
    Membership,
    Policy,
    PolicyTest,
    Principal,
    Resource,
    Site,
)
from actors.store.codec import read_value, write_value
from actors.store.interface import Contents

SECTIONS: Final[dict[EntityKind, str]] = {
    "auth_provider": "auth_providers",
    "directory": "directories",
    "principal": "principals",
    "group": "groups",
    "site": "sites",
    "resource": "resources",
    "policy": "policies",
    "policy_test": "policy_tests",
}
"""The section of each kind, in the order in which things refer to each other."""
ID_MARK: Final = "id:"

T = TypeVar("T")


class Names:
    """The entities of an account, and the reference by which each is known.

    A reference is the key of the thing (see `key_of`) if no other of its kind has it, else
    `id:<uuid>`.
    """

    def __init__(self, entities: Iterable[Entity]) -> None:
        self.by_kind: dict[EntityKind, dict[UUID, Entity]] = {kind: {} for kind in SECTIONS}
        self.members: dict[UUID, dict[UUID, Membership]] = {}
        self._ids_by_key: dict[EntityKind, dict[str, list[UUID]]] = {k: {} for k in SECTIONS}
        for entity in entities:
            kind = KIND_OF[type(entity)]
            if isinstance(entity, Membership):
                self.members.setdefault(entity.group_id, {})[entity.principal_id] = entity
            elif kind in SECTIONS:
                self.by_kind[kind][entity.id] = entity
                self._ids_by_key[kind].setdefault(key_of(entity), []).append(entity.id)

    def named(self, kind: EntityKind, reference: str) -> Sequence[UUID]:
        """The ids of all that this reference may mean."""
        if reference.startswith(ID_MARK):
            try:
                id = UUID(reference.removeprefix(ID_MARK))
            except ValueError:
                return ()
            return (id,) if id in self.by_kind[kind] else ()
        return self.keyed(kind, reference)

    def keyed(self, kind: EntityKind, key: str) -> Sequence[UUID]:
        """The ids of all that have this key."""
        return self._ids_by_key[kind].get(key, ())

    def reference(self, kind: EntityKind, id: UUID) -> str:
        """By what the thing is known."""
        key = key_of(self.by_kind[kind][id])
        return f"{ID_MARK}{id}" if self.is_shared(kind, key) else key

    def is_shared(self, kind: EntityKind, key: str) -> bool:
        """Whether this key alone does not say what is meant."""
        return key.startswith(ID_MARK) or len(self._ids_by_key[kind].get(key, ())) > 1


def key_of(thing: Entity | AnyEntry) -> str:
    """The e-mail address of a user who has one; the name of everything else."""
    if isinstance(thing, Principal | PrincipalEntry) and thing.kind == "user" and thing.email:
        return thing.email
    return str(getattr(thing, "name", ""))


def is_declared(entity: Entity) -> bool:
    """Whether a section may hold it. What Holloway or a directory keeps is only referred to."""
    return not isinstance(entity, Group | Site) or entity.kind == "static"


def export(contents: Contents) -> Declaration:
    """The whole account in normal form: sorted by name, defaults left out, without secrets.

    Left out as well: what devices and people make (clients, gateways, tokens, identities), what is
    managed or follows a directory (Everyone, the site Internet, synced groups), and what only
    operators set (slug, ranges, limits).
    """
    names = Names(contents.entities)

    def section(kind: EntityKind) -> tuple[Any, ...]:
        declared = filter(is_declared, names.by_kind[kind].values())
        return tuple(sorted((entry_of(each, names) for each in declared), key=sort_key))

    sections = {name: section(kind) for kind, name in SECTIONS.items()}
    declared = Declaration(account=account_section(contents.account))
    return without_defaults(structs.replace(declared, **sections))


def sort_key(entry: AnyEntry) -> tuple[str, ...]:
    """The order of entries in a section."""
    if isinstance(entry, PolicyEntry):
        encoded = msgspec.json.encode(entry).decode()
        return (entry.group, entry.resource, entry.description, encoded)
    return (key_of(entry), str(entry.id))


def account_section(account: Account) -> AccountSection:
    """The settings that admins may change."""
    return like(account, AccountSection)


def entry_of(entity: Entity, names: Names) -> Any:
    """What a declaration says of an entity."""
    kind = KIND_OF[type(entity)]
    fields: dict[str, Any] = {}
    if kind != "policy" and names.is_shared(kind, key_of(entity)):
        fields["id"] = entity.id

    def take(*wanted: str) -> None:
        fields.update({name: getattr(entity, name) for name in wanted})

    match entity:
        case AuthProvider():
            take("kind", "name", "issuer", "client_id", "context", "disabled")
            take("client_session_s", "portal_session_s")
            return AuthProviderEntry(**fields)
        case Directory():
            take("kind", "name", "disabled")
            return DirectoryEntry(**fields)
        case Principal():
            take("kind", "role", "name", "email", "disabled")
            return PrincipalEntry(**fields)
        case Group():
            take("name")
            members = names.members.get(entity.id, ())
            fields["members"] = tuple(sorted(names.reference("principal", id) for id in members))
            return GroupEntry(**fields)
        case Site():
            take("name")
            return SiteEntry(**fields)
        case Resource():
            take("kind", "name", "address", "ip_stack", "filters")
            fields["sites"] = tuple(sorted(names.reference("site", id) for id in entity.site_ids))
            fields["devices"] = tuple(sorted(entity.device_ids))
            return like(fields, ResourceEntry)
        case Policy():
            take("description", "disabled", "expires_at", "lease_s")
            fields["group"] = names.reference("group", entity.group_id)
            fields["resource"] = names.reference("resource", entity.resource_id)
            fields["conditions"] = _conditions(entity.conditions, names)
            return PolicyEntry(**fields)
        case PolicyTest():
            take("name", "expected", "at", "remote_ip", "client_verified", "posture")
            fields["principal"] = names.reference("principal", entity.principal_id)
            fields["resource"] = names.reference("resource", entity.resource_id)
            if entity.auth_provider_id is not None:
                reference = names.reference("auth_provider", entity.auth_provider_id)
                fields["auth_provider"] = reference
            return like(fields, PolicyTestEntry)
    raise TypeError(f"a {kind} is not declared")


def _conditions(conditions: Conditions, names: Names) -> ConditionsPart:
    plain = msgspec.to_builtins(conditions)
    for condition in plain.values():
        if condition is not None:
            del condition["property"]
    if conditions.auth_provider is not None:
        # A provider that is gone keeps its place, so that nothing is opened by an export.
        known = names.by_kind["auth_provider"]
        plain["auth_provider"]["values"] = sorted(
            names.reference("auth_provider", id) if id in known else f"{ID_MARK}{id}"
            for id in conditions.auth_provider.values
        )
    return msgspec.convert(plain, ConditionsPart)


def like(value: object, as_type: type[T]) -> T:
    """A value of the model as the same thing of the declaration, or the other way round. Fields
    that the target does not know are left behind. Raises msgspec.ValidationError."""
    plain = msgspec.to_builtins(value, enc_hook=write_value)
    known = getattr(as_type, "__struct_fields__", None) or as_type.__annotations__
    fields = {name: each for name, each in plain.items() if name in known}
    return msgspec.convert(fields, as_type, dec_hook=read_value)
