"""From a declaration to what has to be done: mutations for the store, and steps for people.

How it works. Entries are matched to entities section by section (`matching`). What matches nothing
is made, what nothing matches is removed. References are then read in the account as it will be, so
that an entry may refer to one that the same declaration makes. Puts come before removals, or else
a resource that moves would go with its old site; what goes along with something else
(`model.REFERENCES`) is a step, but no mutation of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Literal, Protocol
from uuid import UUID

import attrs
import msgspec
from msgspec import UNSET

from actors.declaration.consequences import Future
from actors.declaration.exporting import (
    ID_MARK,
    SECTIONS,
    Names,
    account_section,
    entry_of,
    is_declared,
    key_of,
    like,
)
from actors.declaration.form import (
    AnyEntry,
    ConditionsPart,
    Declaration,
    GroupEntry,
    plain,
)
from actors.declaration.matching import (
    Faults,
    Matching,
    in_place_of,
    match,
    pair_policies,
    with_paths,
)
from actors.model import (
    ENTITIES,
    KIND_OF,
    Conditions,
    DnsUpstream,
    Entity,
    EntityKind,
    Fact,
    Membership,
    Policy,
    Retention,
    SealedSecret,
)
from actors.store.interface import Contents, Invalid, Mutation, Put, Remove
from actors.store.rules import UNIQUE
from actors.store.validity import SECRETS, validate
from channel.messages import Filter, IpText

REFERRED: Final[dict[EntityKind, dict[str, EntityKind]]] = {
    "policy": {"group": "group", "resource": "resource"},
    "policy_test": {
        "principal": "principal",
        "resource": "resource",
        "auth_provider": "auth_provider",
    },
}
"""Fields of an entry that name one other thing; the model's field has `_id` at its end."""
FIELDS: Final = {"site_ids": "sites", "device_ids": "devices"}
"""What a declaration calls fields of the model, where that is another word."""
HIDDEN: Final = "(secret)"


class Vault(Protocol):
    """How secrets are kept: sealed for one field of one row."""

    def seal(self, text: str, *, kind: EntityKind, field: str, id: UUID) -> SealedSecret:
        """The secret as it is stored."""

    def holds(
        self, sealed: SealedSecret, text: str, *, kind: EntityKind, field: str, id: UUID
    ) -> bool:
        """Whether this is what was sealed."""


@attrs.frozen(kw_only=True)
class FieldChange:
    """One field of a step as a declaration has it; None where it is not there, or the default."""

    field: str
    before: Any = None
    after: Any = None


@attrs.frozen(kw_only=True)
class Step:
    """One thing that is made, changed or removed. `because` names what takes it along; it is empty
    for what the declaration itself asks for."""

    action: Literal["create", "update", "delete"]
    kind: EntityKind
    id: UUID
    name: str
    fields: tuple[FieldChange, ...] = ()
    because: str = ""


@attrs.frozen(kw_only=True)
class Plan:
    """What makes an account as declared: nothing, if it is so already. It stands on change
    `number`, and is to be applied to no other."""

    mutations: tuple[Mutation, ...]
    steps: tuple[Step, ...]
    number: int


def plan(
    contents: Contents,
    declaration: Declaration,
    *,
    new_id: Callable[[], UUID],
    at: datetime,
    vault: Vault,
) -> Plan:
    """What has to be done at the instant `at` for the account to be as declared. The contents are
    to hold sealed secrets whole, where a store gives them out one by one.

    Raises Undeclarable with all that is wrong: names that are not there, not clear, or twice, and
    values outside the model.
    """
    return _Planner(contents, declaration, new_id, at, vault).plan()


@attrs.define
class _Planner:
    contents: Contents
    declaration: Declaration
    new_id: Callable[[], UUID]
    at: datetime
    vault: Vault
    faults: Faults = attrs.field(factory=Faults, init=False)
    before: Names = attrs.field(init=False)
    clients: set[UUID] = attrs.field(init=False)
    matchings: dict[EntityKind, Matching] = attrs.field(factory=dict, init=False)
    ids: dict[EntityKind, dict[str, list[UUID]]] = attrs.field(factory=dict, init=False)
    """For each kind that is declared: what each key will mean."""
    new_ids: dict[str, UUID] = attrs.field(factory=dict, init=False)
    """The ids of what is made, by the paths of their entries."""

    def plan(self) -> Plan:
        self.before = Names(self.contents.entities)
        self.clients = {
            each.id for each in self.contents.entities if KIND_OF[type(each)] == "client"
        }
        for kind, section in SECTIONS.items():
            entries = getattr(self.declaration, section)
            if entries is not UNSET and kind != "policy":
                self.matchings[kind] = match(kind, section, entries, self.before, self.faults)
        self.faults.finish()
        self._name_what_will_be()
        puts = [*self._account()]
        unwanted: list[Entity] = []
        for kind, matching in self.matchings.items():
            puts += self._in_order(kind, list(self._puts(kind, matching)))
            unwanted += matching.unmatched
            if kind == "group":
                memberships, left = self._memberships(matching)
                puts += memberships
                unwanted += left
        policies, surplus = self._policies()
        puts += policies
        unwanted += surplus
        self.faults.finish()
        return self._carried_out(puts, unwanted)

    def _name_what_will_be(self) -> None:
        for kind, matching in self.matchings.items():
            ids = self.ids[kind] = {}
            for pair in matching.pairs:
                if pair.entity is None:
                    self.new_ids[pair.path] = self.new_id()
                id = self.new_ids[pair.path] if pair.entity is None else pair.entity.id
                self._note(ids, key_of(pair.entry), id)
            for entity in self.before.by_kind[kind].values():
                if not is_declared(entity):
                    self._note(ids, key_of(entity), entity.id)

    @staticmethod
    def _note(ids: dict[str, list[UUID]], key: str, id: UUID) -> None:
        if not key.startswith(ID_MARK):
            ids.setdefault(key, []).append(id)
        ids[f"{ID_MARK}{id}"] = [id]

    def _resolve(self, kind: EntityKind, reference: str, path: str) -> UUID:
        """What a reference will mean. A fault if that is nothing, or not clear."""
        ids = self.ids.get(kind)
        found: Sequence[UUID] = (
            self.before.named(kind, reference) if ids is None else ids.get(reference, ())
        )
        if len(found) == 1:
            return found[0]
        noun = kind.replace("_", " ")
        if found:
            self.faults.add(path, f"{len(found)} are called {reference!r}: write id:<uuid>")
        elif ids is None:
            self.faults.add(path, f"there is no {noun} {reference!r}")
        else:
            self.faults.add(path, f"no {noun} {reference!r} is declared in {SECTIONS[kind]}")
        return UUID(int=0)

    # --- what is to be written ---

    def _account(self) -> Iterator[Put]:
        section = self.declaration.account
        if section is UNSET:
            return
        account = self.contents.account
        changed = attrs.evolve(
            account,
            name=section.name,
            search_domain=section.search_domain,
            dns_upstreams=tuple(like(each, DnsUpstream) for each in section.dns_upstreams),
            retention=like(section.retention, Retention),
        )
        if changed != account:
            self._check(changed, "account")
            yield Put(changed, account)

    def _puts(self, kind: EntityKind, matching: Matching) -> Iterator[Put]:
        for pair in matching.pairs:
            id = pair.entity.id if pair.entity else self.new_ids[pair.path]
            fields = self._fields(kind, pair.entry, pair.path)
            fields |= self._secret(kind, pair.entry, pair.entity, id)
            put = self._put(kind, id, fields, pair.entity, pair.path)
            if put is not None:
                yield put

    def _put(
        self, kind: EntityKind, id: UUID, fields: dict[str, Any], before: Entity | None, path: str
    ) -> Put | None:
        if before is None:
            account_id = self.contents.account.id
            entity_type: Any = ENTITIES[kind]
            entity: Entity = entity_type(id=id, account_id=account_id, created_at=self.at, **fields)
        else:
            for field in ("site_ids", "device_ids"):  # sets, in whatever order
                if field in fields and set(fields[field]) == set(getattr(before, field)):
                    del fields[field]
            entity = attrs.evolve(before, **fields)
            if entity == before:
                return None
        self._check(entity, path)
        return Put(entity, before)

    def _check(self, entity: Entity, path: str) -> None:
        try:
            validate(entity)
        except Invalid as invalid:
            field = FIELDS.get(invalid.field, invalid.field.removesuffix("_id"))
            self.faults.add(f"{path}.{field}", "cannot be taken")

    def _fields(self, kind: EntityKind, entry: AnyEntry, path: str) -> dict[str, Any]:
        """An entry as fields of the model."""
        fields: dict[str, Any] = {}
        referred = REFERRED.get(kind, {})
        for name in entry.__struct_fields__:
            value = getattr(entry, name)
            if name in referred:
                id = value and self._resolve(referred[name], value, f"{path}.{name}")
                fields[f"{name}_id"] = id
            elif name == "sites":
                sites = (
                    self._resolve("site", each, f"{path}.sites[{i}]")
                    for i, each in enumerate(value)
                )
                fields["site_ids"] = tuple(dict.fromkeys(sites))
            elif name == "devices":
                fields["device_ids"] = tuple(dict.fromkeys(value))
                self._check_devices(value, f"{path}.devices")
            elif name == "filters":
                fields["filters"] = tuple(like(each, Filter) for each in value)
            elif name == "posture":
                fields["posture"] = tuple(like(each, Fact) for each in value)
            elif name == "conditions":
                fields["conditions"] = self._conditions(value, f"{path}.conditions")
            elif name == "remote_ip":
                fields["remote_ip"] = value and IpText(value)
            elif isinstance(value, datetime):
                fields[name] = value.astimezone(UTC)
            elif name not in ("was", "id", "members", *SECRETS.values()):
                fields[name] = value
        return fields

    def _check_devices(self, ids: Sequence[UUID], path: str) -> None:
        for i, id in enumerate(ids):
            if id not in self.clients:
                self.faults.add(f"{path}[{i}]", "there is no such client")

    def _conditions(self, conditions: ConditionsPart, path: str) -> Conditions:
        fields = plain(conditions)
        if conditions.auth_provider is not None:
            operator, references = (
                conditions.auth_provider.operator,
                conditions.auth_provider.values,
            )
            ids = [
                self._provider(reference, f"{path}.auth_provider.values[{i}]")
                for i, reference in enumerate(references)
            ]
            fields["auth_provider"] = {"operator": operator, "values": list(dict.fromkeys(ids))}
        return msgspec.convert(fields, Conditions)

    def _provider(self, reference: str, path: str) -> UUID:
        """A provider in a condition may be gone, as `exporting` leaves it."""
        if reference.startswith(ID_MARK):
            try:
                return UUID(reference.removeprefix(ID_MARK))
            except ValueError:
                pass
        return self._resolve("auth_provider", reference, path)

    def _secret(
        self, kind: EntityKind, entry: AnyEntry, before: Entity | None, id: UUID
    ) -> dict[str, Any]:
        """The sealed secret, if there is a new one."""
        field = SECRETS.get(kind, "")
        text = getattr(entry, field, UNSET)
        if text is UNSET:
            return {}
        kept = getattr(before, field, None)
        if kept is not None and self.vault.holds(kept, text, kind=kind, field=field, id=id):
            return {}
        return {field: self.vault.seal(text, kind=kind, field=field, id=id)}

    def _in_order(self, kind: EntityKind, puts: Sequence[Put]) -> Sequence[Put]:
        """Puts in such an order that each name is free when it is taken."""
        if ("name",) not in UNIQUE.get(kind, ()):
            return puts
        holders = {str(getattr(e, "name", "")): id for id, e in self.before.by_kind[kind].items()}
        ordered: list[Put] = []
        waiting: dict[str, list[Put]] = {}
        """By the name that they wait for."""
        ready = deque(puts)
        while ready:
            put = ready.popleft()
            name = _name(put.entity)
            if holders.get(name, put.entity.id) != put.entity.id:
                waiting.setdefault(name, []).append(put)
                continue
            if put.before is not None:
                del holders[_name(put.before)]
                ready.extend(waiting.pop(_name(put.before), ()))
            holders[name] = put.entity.id
            ordered.append(put)
        for name in islice(waiting, 1):
            self.faults.add(
                SECTIONS[kind],
                f"{name!r} is still the name of another one, and cannot be given away and taken in"
                " one step",
            )
        return ordered

    def _memberships(self, matching: Matching) -> tuple[list[Put], list[Membership]]:
        """Memberships that are missing, and those that nobody wants."""
        puts: list[Put] = []
        left: list[Membership] = []
        for pair in matching.pairs:
            assert isinstance(pair.entry, GroupEntry)
            if pair.entry.members is UNSET:
                continue
            group_id = pair.entity.id if pair.entity else self.new_ids[pair.path]
            present = dict(self.before.members.get(group_id, {}))
            for i, reference in enumerate(dict.fromkeys(pair.entry.members)):
                principal_id = self._resolve("principal", reference, f"{pair.path}.members[{i}]")
                if present.pop(principal_id, None) is None:
                    membership = Membership(
                        id=self.new_id(),
                        account_id=self.contents.account.id,
                        group_id=group_id,
                        principal_id=principal_id,
                        created_at=self.at,
                    )
                    puts.append(Put(membership))
            left += present.values()
        return puts, left

    def _policies(self) -> tuple[list[Put], list[Policy]]:
        entries = self.declaration.policies
        if entries is UNSET:
            return [], []
        nobody = UUID(int=0)
        drafts = [
            (path, self._put("policy", nobody, self._fields("policy", entry, path), None, path))
            for path, entry in with_paths("policies", entries)
        ]
        wanted = [
            (path, put.entity)
            for path, put in drafts
            if put is not None and isinstance(put.entity, Policy)
        ]
        existing = [p for p in self.before.by_kind["policy"].values() if isinstance(p, Policy)]
        pairs, surplus = pair_policies(wanted, existing)
        puts: list[Put] = []
        for _, draft, replaced in pairs:
            if replaced is None:
                puts.append(Put(attrs.evolve(draft, id=self.new_id())))
            else:
                policy = in_place_of(draft, replaced)
                if policy != replaced:
                    puts.append(Put(policy, replaced))
        return puts, surplus

    # --- what comes of it ---

    def _carried_out(self, puts: Sequence[Put], unwanted: Sequence[Entity]) -> Plan:
        future = Future(self.contents)
        for put in puts:
            future.put(put.entity)
        removals: list[Remove] = []
        order = list(ENTITIES)
        for entity in sorted(unwanted, key=lambda each: order.index(KIND_OF[type(each)])):
            if entity.id in future.entities:
                removals.append(Remove(KIND_OF[type(entity)], entity.id))
                future.remove(entity.id)
        return Plan(
            mutations=(*puts, *removals),
            steps=tuple(_steps(self.contents, future, {each.id for each in unwanted})),
            number=self.contents.number,
        )


def _steps(contents: Contents, future: Future, unwanted: set[UUID]) -> Iterator[Step]:
    """The differences between an account and its future, in the order of the sections, then what
    else goes along (tokens, devices, identities)."""
    if future.account != contents.account:
        changes = _changes(
            plain(account_section(contents.account)), plain(account_section(future.account))
        )
        yield Step(
            action="update",
            kind="account",
            id=future.account.id,
            name=future.account.name,
            fields=changes,
        )
    present = {entity.id: entity for entity in contents.entities}
    before, after = Names(contents.entities), Names(future.entities.values())
    for kind in SECTIONS:
        for id in before.by_kind[kind] | after.by_kind[kind]:
            old, new = present.get(id), future.entities.get(id)
            if old == new and before.members.get(id, ()) == after.members.get(id, ()):
                continue
            changes = _changes(_described(old, before), _described(new, after))
            if old is not None and new is not None:
                changes += _secret_changes(kind, old, new)
                if not changes:
                    continue  # a synced group that lost a member
            yield Step(
                action="create" if old is None else "update" if new is not None else "delete",
                kind=kind,
                id=id,
                name=_label(new or old, after if new else before),
                fields=changes,
                because=_because(id, before, present, future, unwanted),
            )
    for id, entity in present.items():
        kind = KIND_OF[type(entity)]
        if kind not in SECTIONS and kind != "membership" and id not in future.entities:
            because = _because(id, before, present, future, unwanted)
            yield Step(action="delete", kind=kind, id=id, name=_name(entity), because=because)


def _described(entity: Entity | None, names: Names) -> dict[str, object]:
    if entity is None:
        return {}
    if not is_declared(entity):
        return {"name": _name(entity)}
    described = plain(entry_of(entity, names))
    described.pop("id", None)
    return described


def _changes(before: dict[str, object], after: dict[str, object]) -> tuple[FieldChange, ...]:
    return tuple(
        FieldChange(field=field, before=before.get(field), after=after.get(field))
        for field in before | after
        if before.get(field) != after.get(field)
    )


def _secret_changes(kind: EntityKind, old: Entity, new: Entity) -> tuple[FieldChange, ...]:
    field = SECRETS.get(kind, "")
    kept, new_one = getattr(old, field, None), getattr(new, field, None)
    if kept == new_one:
        return ()
    return (FieldChange(field=field, before=kept and HIDDEN, after=new_one and HIDDEN),)


def _because(
    id: UUID, before: Names, present: dict[UUID, Entity], future: Future, unwanted: set[UUID]
) -> str:
    cause = future.causes.get(id)
    if cause is None or id in unwanted:
        return ""
    return f"{KIND_OF[type(present[cause])].replace('_', ' ')} {_label(present[cause], before)}"


def _label(entity: Entity | None, names: Names) -> str:
    """By what a person knows the thing."""
    assert entity is not None
    if isinstance(entity, Policy):
        group = names.reference("group", entity.group_id)
        return f"{group} -> {names.reference('resource', entity.resource_id)}"
    kind = KIND_OF[type(entity)]
    return names.reference(kind, entity.id) if kind in SECTIONS else _name(entity)


def _name(entity: Entity) -> str:
    return str(getattr(entity, "name", "") or entity.id)
