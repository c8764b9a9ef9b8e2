"""An account as it will be: what goes with what, as a store does it (`model.REFERENCES`)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from uuid import UUID

import attrs

from actors.model import KIND_OF, MEMBERS, REFERENCES, Account, Entity
from actors.store.interface import Contents


class Future:
    """Entities by id, changed by puts and removals. `causes` tells what took a removed one along
    (or out of a field of it)."""

    def __init__(self, contents: Contents) -> None:
        self.account: Account = contents.account
        self.entities = {entity.id: entity for entity in contents.entities}
        self.causes: dict[UUID, UUID] = {}
        self._referrers: dict[UUID, set[UUID]] = defaultdict(set)
        for entity in contents.entities:
            self._note(entity)

    def put(self, entity: Entity) -> None:
        """Add an entity, or replace the one that has its id."""
        if isinstance(entity, Account):
            self.account = entity
            return
        self.entities[entity.id] = entity
        self._note(entity)

    def remove(self, id: UUID) -> None:
        """Remove an entity and all that goes with it."""
        going = [id]
        while going:
            gone = going.pop()
            del self.entities[gone]
            for referrer in self._referrers.pop(gone, ()):
                entity = self.entities.get(referrer)
                if entity is None or referrer in going:
                    continue
                kind = KIND_OF[type(entity)]
                if any(getattr(entity, field) == gone for field in REFERENCES.get(kind, {})):
                    self.causes[referrer] = id
                    going.append(referrer)
                    continue
                for field in MEMBERS.get(kind, {}):
                    left = tuple(each for each in getattr(entity, field) if each != gone)
                    if left == getattr(entity, field):
                        continue
                    self.causes[referrer] = id
                    if field == "site_ids" and not left:
                        going.append(referrer)
                        break
                    changes: dict[str, Any] = {field: left}
                    entity = self.entities[referrer] = attrs.evolve(entity, **changes)

    def _note(self, entity: Entity) -> None:
        kind = KIND_OF[type(entity)]
        for field in REFERENCES.get(kind, {}):
            if (id := getattr(entity, field)) is not None:
                self._referrers[id].add(entity.id)
        for field in MEMBERS.get(kind, {}):
            for id in getattr(entity, field):
                self._referrers[id].add(entity.id)
