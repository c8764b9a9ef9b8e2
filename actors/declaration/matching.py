"""Which entry of a declaration means which entity of the account."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Final, TypeVar
from uuid import UUID

import attrs
from msgspec import UNSET

from actors.declaration.exporting import Names, is_declared, key_of
from actors.declaration.form import Entry
from actors.model import Entity, EntityKind, Policy

MAX_FAULTS = 100
_NOBODY: Final = UUID(int=0)
_EVER: Final = datetime(1, 1, 1, tzinfo=UTC)

T = TypeVar("T")


@attrs.frozen
class Fault:
    """What is wrong with a declaration; `field` is a path such as `policies[2].group`."""

    field: str
    message: str


class Undeclarable(ValueError):
    """A declaration that cannot be carried out, with (the first MAX_FAULTS of) its faults."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{fault.field}: {fault.message}" for fault in faults[:3]))
        self.faults = tuple(faults[:MAX_FAULTS])


class Faults:
    """Collects what is wrong, so that somebody learns it all at once."""

    def __init__(self) -> None:
        self._found: list[Fault] = []

    def add(self, field: str, message: str) -> None:
        self._found.append(Fault(field, message))

    def finish(self) -> None:
        """Raises Undeclarable if there is anything."""
        if self._found:
            raise Undeclarable(self._found)


@attrs.frozen
class Pair:
    """An entry at its path, and the entity that it means; None if it is to be made."""

    path: str
    entry: Entry
    entity: Entity | None


@attrs.frozen
class Matching:
    """What one section means: its pairs, and the entities that it leaves out."""

    pairs: tuple[Pair, ...]
    unmatched: tuple[Entity, ...]


def match(
    kind: EntityKind, section: str, entries: Sequence[Entry], names: Names, faults: Faults
) -> Matching:
    """Match the entries of a section with the entities of a kind.

    An entry means the entity that its `id` names; else the one that has its key, unless another
    entry renames that one away; else the one that `was` names. An internet resource needs no name
    for it, since there is one in an account.
    """
    return _Matcher(kind, section, entries, names, faults).match()


class _Matcher:
    def __init__(
        self,
        kind: EntityKind,
        section: str,
        entries: Sequence[Entry],
        names: Names,
        faults: Faults,
    ) -> None:
        self.kind = kind
        self.section = section
        self.entries = entries
        self.names = names
        self.faults = faults
        self.entities = names.by_kind[kind]
        self.entries_by_key = Counter(map(key_of, entries))
        self.internet = [id for id, each in self.entities.items() if is_internet(each)]
        self.renamed: dict[UUID, Entry] = {}
        self._find_renamings()

    def match(self) -> Matching:
        pairs = [
            Pair(path, entry, self._entity_of(path, entry))
            for path, entry in with_paths(self.section, self.entries)
        ]
        matched: dict[UUID, Pair] = {}
        for pair in pairs:
            if pair.entity is None:
                if not self._is_new(pair.entry):
                    self.faults.add(pair.path, f"{key_of(pair.entry)!r} stands here twice")
            elif pair.entity.id in matched:
                first = matched[pair.entity.id].path
                self.faults.add(pair.path, f"means the same {self._noun} as {first}")
            elif not is_declared(pair.entity):
                self.faults.add(
                    pair.path,
                    f"{key_of(pair.entity)!r} is kept by Holloway or a directory: other entries may"
                    " name it, but it is not declared",
                )
            else:
                matched[pair.entity.id] = pair
        unmatched = (
            entity
            for id, entity in self.entities.items()
            if id not in matched and is_declared(entity)
        )
        return Matching(tuple(pairs), tuple(unmatched))

    @property
    def _noun(self) -> str:
        return self.kind.replace("_", " ")

    def _entity_of(self, path: str, entry: Entry) -> Entity | None:
        if entry.id is not UNSET:
            if entry.id not in self.entities:
                self.faults.add(f"{path}.id", f"no such {self._noun}; leave it out to make one")
            return self.entities.get(entry.id)
        key = key_of(entry)
        found = [id for id in self.names.keyed(self.kind, key) if id not in self.renamed]
        if len(found) > 1:
            self.faults.add(
                path, f"{len(found)} of these are called {key!r}: say by `id` which is meant"
            )
        if entry.was is not UNSET:
            old = self.names.named(self.kind, entry.was)
            if len(old) > 1:
                self.faults.add(f"{path}.was", f"{len(old)} of these are called {entry.was!r}")
            elif old and found and not self.entries_by_key[entry.was]:
                self.faults.add(
                    f"{path}.was",
                    f"{entry.was!r} and {key!r} both exist: remove one, or leave `was` out",
                )
            found = [id for id in old if self.renamed.get(id) is entry] or found
        if not found and is_internet(entry):
            found = self.internet
        return self.entities[found[0]] if found else None

    def _find_renamings(self) -> None:
        """Fill `renamed`: those that give their name away, each with the entry that says so.

        A new name has to be free, or be given away in the same way. If it is not, then the
        renaming took place before, and its `was` stayed in the document.
        """
        waiting: dict[UUID, list[Entry]] = {}
        """By one of those whose name they wait for."""
        ready = deque(entry for entry in self.entries if entry.was is not UNSET)
        while ready:
            entry = ready.popleft()
            taken = (
                id for id in self.names.keyed(self.kind, key_of(entry)) if id not in self.renamed
            )
            if (id := next(taken, None)) is not None:
                waiting.setdefault(id, []).append(entry)
                continue
            for id in self.names.named(self.kind, str(entry.was)):
                self.renamed[id] = entry
                ready.extend(waiting.pop(id, ()))

    def _is_new(self, entry: Entry) -> bool:
        """Whether an entry that matches nothing is the only one of its key."""
        return self.entries_by_key[key_of(entry)] == 1


def is_internet(thing: object) -> bool:
    """Whether this is the internet resource, or its entry."""
    return getattr(thing, "kind", "") == "internet" and hasattr(thing, "ip_stack")


def pair_policies(
    wanted: Sequence[tuple[str, Policy]], existing: Iterable[Policy]
) -> tuple[list[tuple[str, Policy, Policy | None]], list[Policy]]:
    """Policies have no names. Of those that let one group to one resource, equal ones belong
    together, then those of one description, then one after the other by id.

    Takes drafts with their paths. Returns each with what it replaces, and what is left over.
    """
    left = {policy.id: policy for policy in sorted(existing, key=lambda each: each.id)}
    replaced: dict[int, Policy] = {}
    for likeness in (_everything, _description, _pair):
        alike: dict[Hashable, deque[Policy]] = {}
        for policy in left.values():
            alike.setdefault(likeness(policy), deque()).append(policy)
        for i, (_, draft) in enumerate(wanted):
            found = None if i in replaced else alike.get(likeness(draft))
            if found:
                replaced[i] = found.popleft()
                del left[replaced[i].id]
    pairs = [(path, draft, replaced.get(i)) for i, (path, draft) in enumerate(wanted)]
    return pairs, list(left.values())


def _everything(policy: Policy) -> Hashable:
    """All that is declared of a policy: equal for those of which one can stand for the other."""
    conditions = policy.conditions
    if conditions.auth_provider is not None:
        values = tuple(sorted(conditions.auth_provider.values))
        providers = attrs.evolve(conditions.auth_provider, values=values)
        conditions = attrs.evolve(conditions, auth_provider=providers)
    return attrs.evolve(policy, id=_NOBODY, created_at=_EVER, conditions=conditions)


def _description(policy: Policy) -> Hashable:
    return policy.group_id, policy.resource_id, policy.description


def _pair(policy: Policy) -> Hashable:
    return policy.group_id, policy.resource_id


def in_place_of(draft: Policy, policy: Policy) -> Policy:
    """A draft as the successor of a policy. Providers in a condition are a set, whose order is
    left as it was."""
    conditions, old = draft.conditions, policy.conditions
    wanted, present = conditions.auth_provider, old.auth_provider
    if wanted and present and set(wanted.values) == set(present.values):
        wanted = attrs.evolve(wanted, values=present.values)
        conditions = attrs.evolve(conditions, auth_provider=wanted)
    return attrs.evolve(draft, id=policy.id, created_at=policy.created_at, conditions=conditions)


def with_paths(section: str, entries: Sequence[T]) -> Iterator[tuple[str, T]]:
    """Entries, each with its path."""
    return ((f"{section}[{i}]", entry) for i, entry in enumerate(entries))
