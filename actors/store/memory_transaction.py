"""How the memory store changes an account: its tables, and a transaction that can be undone. A part
of `actors.store.memory`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from datetime import datetime
from typing import Any
from uuid import UUID

import attrs

from actors.logs import Seen
from actors.model import (
    ENTITIES,
    KIND_OF,
    MEMBERS,
    REFERENCES,
    Account,
    Authorization,
    Change,
    Client,
    Entity,
    EntityKind,
    Gateway,
    Policy,
    Resource,
    Site,
    Token,
)
from actors.store.interface import (
    ANSWER_KEPT,
    Answer,
    Conflict,
    Invalid,
    InvalidReference,
    Mutation,
    NotFound,
    Outdated,
    Put,
    Remove,
    Repeated,
)
from actors.store.rules import (
    HOLDERS,
    REFERRERS,
    REMOVAL_ORDER,
    SINGLE,
    UNIQUE,
    check_policies,
    gains_policy,
    without_member,
    without_secrets,
)
from actors.store.validity import validate


@attrs.define
class Book:
    """One account. It outlives the account's removal: numbers and epochs never start again."""

    entities: dict[EntityKind, dict[UUID, Entity]] = attrs.field(
        factory=lambda: {kind: {} for kind in ENTITIES}
    )
    number: int = 0
    pruned: int = 0
    """The number of the last change that is not kept any more."""
    changes: list[Change] = attrs.Factory(list)
    epoch: int = 0
    owner: str = ""
    incarnation: int = 0
    authorizations: dict[UUID, Authorization] = attrs.Factory(dict)
    seen: dict[UUID, Seen] = attrs.Factory(dict)


@attrs.define
class Tables:
    """What accounts share."""

    unique: dict[Hashable, UUID] = attrs.Factory(dict)
    token_accounts: dict[UUID, UUID] = attrs.Factory(dict)
    token_uses: dict[UUID, int] = attrs.Factory(dict)
    token_used_at: dict[UUID, datetime] = attrs.Factory(dict)
    installation_tokens: dict[UUID, Token] = attrs.Factory(dict)
    answers: dict[tuple[UUID, str], Answer] = attrs.Factory(dict)

    def has_token(self, id: UUID) -> bool:
        """Whether any account or the installation has this token."""
        return id in self.token_accounts or id in self.installation_tokens


def check_answer(tables: Tables, answer: Answer) -> None:
    """Raises Repeated if the key is taken, InvalidReference for an unknown token."""
    known = tables.answers.get((answer.token_id, answer.key))
    if known is not None and known.at > answer.at - ANSWER_KEPT:
        raise Repeated(known)
    if not tables.has_token(answer.token_id):
        raise InvalidReference("answer", "token_id")


class Transaction:
    """The mutations of one `apply`, and how to undo each step."""

    def __init__(
        self, tables: Tables, account_id: UUID, book: Book, who: str, at: datetime
    ) -> None:
        self.changes: list[Change] = []
        self._tables = tables
        self._account_id = account_id
        self._book = book
        self._who = who
        self._at = at
        self._undo: list[Callable[[], None]] = []
        self._with_more_policies: set[UUID] = set()

    def keep(self, answer: Answer) -> None:
        """Keep what is about to be answered. Raises Repeated, InvalidReference."""
        check_answer(self._tables, answer)
        self._set(self._tables.answers, (answer.token_id, answer.key), answer)

    def retell(self, answer: Answer, body: bytes) -> None:
        """Keep this body in place of that of an answer which is kept. Raises Invalid."""
        told = attrs.evolve(answer, body=body)
        validate(told)
        self._set(self._tables.answers, (answer.token_id, answer.key), told)

    def carry_out(self, mutation: Mutation) -> None:
        match mutation:
            case Put(entity=entity, before=before):
                self._put(entity, before)
            case Remove(kind=kind, id=id):
                if id not in self._book.entities[kind]:
                    raise NotFound(f"{kind} {id}")
                self._remove(kind, id)

    def finish(self) -> None:
        """What is judged by the state that all mutations together leave. Raises TooMany."""
        account = self._book.entities["account"].get(self._account_id)
        if account is None:
            return
        assert isinstance(account, Account)
        for id in self._with_more_policies:
            policies = self._book.entities["policy"].values()
            check_policies(account, sum(_resource_of(each) == id for each in policies))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _put(self, entity: Entity, expected: Entity | None) -> None:
        owner = entity.id if isinstance(entity, Account) else entity.account_id
        if owner != self._account_id:
            raise ValueError("an entity belongs to the account that it is put into")
        accounts = self._book.entities["account"]
        if not accounts and not isinstance(entity, Account):
            raise NotFound(f"account {self._account_id}")
        kind = KIND_OF[type(entity)]
        before = self._book.entities[kind].get(entity.id)
        if before == entity:
            return
        if expected is not None and before != expected:
            raise Outdated(f"{kind} {entity.id}")
        unique = self._tables.unique
        for key in _unique_keys(before) if before else ():
            self._delete(unique, key)
        if isinstance(entity, Token) and entity.id in self._tables.installation_tokens:
            raise Conflict("token", "id")
        addresses = _address_keys(entity)
        for key, field in _unique_keys(entity).items():
            if key not in addresses:
                self._claim(kind, key, field, entity.id)
        self._check_references(kind, entity)
        self._check_ranges(entity)
        self._check_internet(entity)
        for key, field in addresses.items():
            self._claim(kind, key, field, entity.id)
        if isinstance(entity, Token):
            self._set(self._tables.token_accounts, entity.id, self._account_id)
        self._set(self._book.entities[kind], entity.id, entity)
        self._record(kind, entity.id, before, entity)
        resource_id = gains_policy(before, entity)
        if resource_id is not None:
            self._with_more_policies.add(resource_id)

    def _claim(self, kind: EntityKind, key: Hashable, field: str, id: UUID) -> None:
        if key in self._tables.unique:
            raise Conflict(kind, field)
        self._set(self._tables.unique, key, id)

    def _check_references(self, kind: EntityKind, entity: Entity) -> None:
        for field, target in REFERENCES.get(kind, {}).items():
            id = getattr(entity, field)
            if id is not None and id not in self._book.entities[target]:
                raise InvalidReference(kind, field)
        for field, target in MEMBERS.get(kind, {}).items():
            if not self._book.entities[target].keys() >= set(getattr(entity, field)):
                raise InvalidReference(kind, field)

    def _check_internet(self, entity: Entity) -> None:
        """The internet lies at the site of that kind, whichever of the two changes."""
        if isinstance(entity, Resource) and entity.kind == "internet":
            sites = [self._book.entities["site"][id] for id in entity.site_ids]
            if any(isinstance(each, Site) and each.kind != "internet" for each in sites):
                raise Invalid("resource", "site_ids")
        if isinstance(entity, Site) and entity.kind != "internet":
            for each in self._book.entities["resource"].values():
                assert isinstance(each, Resource)
                if each.kind == "internet" and entity.id in each.site_ids:
                    raise Invalid("resource", "site_ids")

    def _check_ranges(self, entity: Entity) -> None:
        """Every tunnel address lies in the account's ranges, whichever of the two changes."""
        if isinstance(entity, Account):
            for kind in ("client", "gateway"):
                for each in self._book.entities[kind].values():
                    for field in _fields_out_of_range(each, entity):
                        raise Invalid("account", f"range_{field}")
            return
        account = self._book.entities["account"][self._account_id]
        for field in _fields_out_of_range(entity, account):
            raise Invalid(KIND_OF[type(entity)], field)

    def _remove(self, kind: EntityKind, id: UUID) -> None:
        if kind == "account":
            for each in REMOVAL_ORDER[:-1]:
                for other in sorted(self._book.entities[each]):
                    self._remove(each, other)
        for holder, field in HOLDERS[kind]:
            table = self._book.entities[holder]
            for other in sorted(key for key, each in table.items() if id in getattr(each, field)):
                self._take_out(holder, other, field, id)
        for referrer, field in REFERRERS[kind]:
            table = self._book.entities[referrer]
            for other in sorted(key for key, each in table.items() if getattr(each, field) == id):
                if other in table:
                    self._remove(referrer, other)
        entity = self._book.entities[kind][id]
        for key in _unique_keys(entity):
            self._delete(self._tables.unique, key)
        if isinstance(entity, Token):
            self._delete(self._tables.token_accounts, id)
            self._forget_token(id)
        if isinstance(entity, Client | Gateway) and id in self._book.seen:
            self._delete(self._book.seen, id)
        self._delete(self._book.entities[kind], id)
        self._record(kind, id, entity, None)

    def _take_out(self, kind: EntityKind, id: UUID, field: str, member: UUID) -> None:
        before = self._book.entities[kind][id]
        after = without_member(before, field, member)
        if after is None:
            self._remove(kind, id)
            return
        self._set(self._book.entities[kind], id, after)
        self._record(kind, id, before, after)

    def _forget_token(self, id: UUID) -> None:
        for table in (self._tables.token_uses, self._tables.token_used_at):
            if id in table:
                self._delete(table, id)
        for key in [key for key in self._tables.answers if key[0] == id]:
            self._delete(self._tables.answers, key)

    def _record(
        self, kind: EntityKind, id: UUID, before: Entity | None, after: Entity | None
    ) -> None:
        number = self._book.number + len(self.changes) + 1
        self.changes.append(
            Change(
                account_id=self._account_id,
                number=number,
                at=self._at,
                who=self._who,
                kind=kind,
                entity_id=id,
                before=before and without_secrets(before),
                after=after and without_secrets(after),
            )
        )

    def _set(self, table: dict[Any, Any], key: Hashable, value: object) -> None:
        if key in table:
            old = table[key]
            self._undo.append(lambda: table.__setitem__(key, old))
        else:
            self._undo.append(lambda: table.__delitem__(key))
        table[key] = value

    def _delete(self, table: dict[Any, Any], key: Hashable) -> None:
        old = table.pop(key)
        self._undo.append(lambda: table.__setitem__(key, old))


def _unique_keys(entity: Entity) -> dict[Hashable, str]:
    """What no other entity may have, each with the field that a conflict names."""
    kind = KIND_OF[type(entity)]
    scope = None if isinstance(entity, Account) else entity.account_id
    keys: dict[Hashable, str] = {
        (scope, kind, *fields, *(getattr(entity, field) for field in fields)): fields[-1]
        for fields in UNIQUE.get(kind, ())
        if all(getattr(entity, field) is not None for field in fields)
    }
    if isinstance(entity, Token):
        keys["token", entity.id] = "id"
    if kind in SINGLE and getattr(entity, "kind", None) == SINGLE[kind]:
        keys[scope, kind, SINGLE[kind]] = "kind"
    return keys | _address_keys(entity)


def _resource_of(policy: Entity) -> UUID:
    assert isinstance(policy, Policy)
    return policy.resource_id


def _address_keys(entity: Entity) -> dict[Hashable, str]:
    if not isinstance(entity, (Client, Gateway)):
        return {}
    return {
        (entity.account_id, entity.ipv4): "ipv4",
        (entity.account_id, entity.ipv6): "ipv6",
    }


def _fields_out_of_range(entity: Entity, account: Entity) -> Iterator[str]:
    assert isinstance(account, Account)
    if isinstance(entity, (Client, Gateway)):
        if entity.ipv4 not in account.range_ipv4:
            yield "ipv4"
        if entity.ipv6 not in account.range_ipv6:
            yield "ipv6"
