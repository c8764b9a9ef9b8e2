"""Which entry of a declaration means which entity of the account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar
from uuid import UUID

import attrs
from msgspec import UNSET

from actors.declaration.exporting import Names, is_declared, key_of
from actors.declaration.form import Entry
from actors.model import Entity, EntityKind, Policy

MAX_FAULTS = 100

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
            found = [id for id, each in self.entities.items() if is_internet(each)]
        return self.entities[found[0]] if found else None

    def _find_renamings(self) -> None:
        """Fill `renamed`: those that give their name away, each with the entry that says so.

        A new name has to be free, or be given away in the same way. If it is not, then the
        renaming took place before, and its `was` stayed in the document.
        """
        waiting = [entry for entry in self.entries if entry.was is not UNSET]
        while waiting:
            ready = [
                entry
                for entry in waiting
                if all(id in self.renamed for id in self.names.keyed(self.kind, key_of(entry)))
            ]
            if not ready:
                return
            for entry in ready:
                for id in self.names.named(self.kind, str(entry.was)):
                    self.renamed[id] = entry
            waiting = [entry for entry in waiting if entry not in ready]

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
    left: dict[tuple[UUID, UUID], list[Policy]] = {}
    for policy in sorted(existing, key=lambda each: each.id):
        left.setdefault((policy.group_id, policy.resource_id), []).append(policy)
    replaced: dict[int, Policy] = {}

    def take(alike: str) -> None:
        for i, (_, draft) in enumerate(wanted):
            if i in replaced:
                continue
            candidates = left.get((draft.group_id, draft.resource_id), [])
            for candidate in candidates:
                if _alike(draft, candidate, alike):
                    replaced[i] = candidate
                    candidates.remove(candidate)
                    break

    for alike in ("everything", "description", "nothing"):
        take(alike)
    pairs = [(path, draft, replaced.get(i)) for i, (path, draft) in enumerate(wanted)]
    return pairs, [policy for policies in left.values() for policy in policies]


def _alike(draft: Policy, policy: Policy, alike: str) -> bool:
    match alike:
        case "everything":
            return in_place_of(draft, policy) == policy
        case "description":
            return draft.description == policy.description
        case _:
            return True


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
