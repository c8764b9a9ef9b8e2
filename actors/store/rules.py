"""What every store refuses beyond single values (see `actors.store.validity`): what must be unique,
and what the callers of its methods must heed.

The database states the same rules once more as constraints, so that no other door to it (a
restore, a hand at the console) lets a bad state in. Python comes first because its errors can name
the field.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import attrs

from actors.limits import policies_per_resource
from actors.logs import Log, Seen
from actors.model import (
    ENTITIES,
    KIND_OF,
    MEMBERS,
    REFERENCES,
    Account,
    Entity,
    EntityKind,
    Policy,
    SealedSecret,
)
from actors.store.interface import (
    MAX_IDS,
    MAX_LOGS,
    MAX_MUTATIONS,
    MAX_PAGE,
    Answer,
    Mutation,
    Put,
    TooMany,
)
from actors.store.validity import SECRETS, UNPRINTABLE, validate
from runtime.cluster.leases import MAX_NODE_LEASE_NS
from runtime.cluster.membership import check_node_name
from runtime.net.address import split_host_port

E = TypeVar("E", bound=Entity)

MAX_WHO = 255

UNIQUE: dict[EntityKind, tuple[tuple[str, ...], ...]] = {
    "account": (("slug",),),
    "auth_provider": (("name",),),
    "directory": (("name",),),
    "identity": (("auth_provider_id", "issuer", "subject"),),
    "group": (("name",), ("directory_id", "external_id")),
    "membership": (("group_id", "principal_id"),),
    "site": (("name",),),
    "resource": (("name",),),
    "policy_test": (("name",),),
    "client": (("device_key",),),
    "gateway": (("device_key",),),
}
"""The fields that are unique together: within the installation for accounts, else within the
account; where one of them is None nothing is unique. The last field of each names the conflict.
Beside these: SINGLE, and a tunnel address belongs to one client or gateway of an account."""

SINGLE: dict[EntityKind, str] = {
    "group": "everyone",
    "site": "internet",
    "resource": "internet",
}
"""For each of these, the value of the field `kind` that at most one of an account has."""

REMOVAL_ORDER: tuple[EntityKind, ...] = (
    "policy_test",
    "policy",
    "resource",
    *(kind for kind in reversed(ENTITIES) if kind not in ("policy_test", "policy", "resource")),
)
"""Every kind before the kinds that it refers to or has as members: the order in which an account
is emptied."""

REFERRERS: dict[EntityKind, tuple[tuple[EntityKind, str], ...]] = {
    kind: tuple(
        (referrer, field)
        for referrer, fields in REFERENCES.items()
        for field, target in fields.items()
        if target == kind
    )
    for kind in ENTITIES
}
"""For each kind, the (kind, field) pairs that refer to it: `REFERENCES` read backwards."""

HOLDERS: dict[EntityKind, tuple[tuple[EntityKind, str], ...]] = {
    kind: tuple(
        (holder, field)
        for holder, fields in MEMBERS.items()
        for field, target in fields.items()
        if target == kind
    )
    for kind in ENTITIES
}
"""For each kind, the (kind, field) pairs that have it among others: `MEMBERS` read backwards."""


def check_mutations(
    mutations: Iterable[Mutation], *, who: str, at: datetime, answer: Answer | None = None
) -> None:
    """Checks what `apply` is given, as far as that needs no database.

    Raises Invalid for a bad entity, ValueError for a mistake of the caller.
    """
    mutations = tuple(mutations)
    if len(mutations) > MAX_MUTATIONS:
        raise ValueError(f"at most {MAX_MUTATIONS} mutations in one transaction")
    check_name(who)
    check_instant(at)
    if answer is not None:
        if not mutations:
            raise ValueError("an answer is kept with the mutations that it tells of")
        validate(answer)
    for mutation in mutations:
        if isinstance(mutation, Put):
            validate(mutation.entity)


def check_logs(rows: Sequence[Log]) -> None:
    """Checks what `write_logs` is given. Raises Invalid, ValueError."""
    if len(rows) > MAX_LOGS:
        raise ValueError(f"at most {MAX_LOGS} rows at once")
    for row in rows:
        validate(row)


def check_seen(seen: Sequence[Seen]) -> None:
    """Checks what `note_seen` is given. Raises Invalid, ValueError."""
    check_ids(seen)
    if len({each.device_id for each in seen}) < len(seen):
        raise ValueError("a device is named twice")
    for each in seen:
        validate(each)


def check_instant(at: datetime) -> None:
    """Raises ValueError for a naive one."""
    if at.tzinfo is None:
        raise ValueError("`at` must be aware")


def check_ids(ids: Collection[object]) -> None:
    """Raises ValueError for more than MAX_IDS."""
    if len(ids) > MAX_IDS:
        raise ValueError(f"at most {MAX_IDS} ids at once")


def check_name(who: str) -> None:
    """Raises ValueError unless `who` (a writer, an owner) has 1 to MAX_WHO printable characters."""
    if not 0 < len(who) <= MAX_WHO or UNPRINTABLE.search(who):
        raise ValueError(f"1 to {MAX_WHO} printable characters are needed")


def check_limit(limit: int) -> None:
    """Raises ValueError unless the page's size lies within 1 and MAX_PAGE."""
    if not 1 <= limit <= MAX_PAGE:
        raise ValueError(f"a page has 1 to {MAX_PAGE} entries")


def check_node(name: str, *, link_address: str, door_address: str, version: str) -> None:
    """Raises ValueError unless a node may say this of itself."""
    check_node_name(name)
    for address in (link_address, door_address):
        check_name(address)
        split_host_port(address)
    check_name(version)


def check_ttl(ttl_ns: int) -> None:
    """Raises ValueError unless a node's lease may be that long."""
    if not 0 <= ttl_ns <= MAX_NODE_LEASE_NS:
        raise ValueError(f"a lease has 0 to {MAX_NODE_LEASE_NS} ns")


def gains_policy(before: Entity | None, after: Entity) -> UUID | None:
    """The resource that has one more policy when `after` stands in the place of `before`."""
    if not isinstance(after, Policy):
        return None
    if isinstance(before, Policy) and before.resource_id == after.resource_id:
        return None
    return after.resource_id


def check_policies(account: Account, count: int) -> None:
    """Raises TooMany for a resource that gained a policy, and now has so many."""
    limit = policies_per_resource(account)
    if count > limit:
        raise TooMany("policy", "resource_id", limit)


def without_member(entity: E, field: str, id: object) -> E | None:
    """A holder after one of its members has gone; None if it goes too, with its last site."""
    left = {field: tuple(each for each in getattr(entity, field) if each != id)}
    return None if field == "site_ids" and not left[field] else _evolved(entity, left)


def without_secrets(entity: E) -> E:
    """What changes and contents tell of an entity: that there is a sealed secret, not which."""
    some: Entity = entity
    field = SECRETS.get(KIND_OF[type(some)])
    secret: SealedSecret | None = None if field is None else getattr(entity, field)
    if field is None or secret is None:
        return entity
    return _evolved(entity, {field: attrs.evolve(secret, box=b"")})


def _evolved(entity: E, fields: dict[str, Any]) -> E:
    evolve: Callable[..., E] = attrs.evolve
    return evolve(entity, **fields)
