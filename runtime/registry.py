"""Names of actors on one node: a name means at most one living actor."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import attrs

from runtime.context import DEAD, Context
from runtime.errors import Dead, NameTaken
from runtime.refs import ActorRef

if TYPE_CHECKING:
    from runtime.mailroom import Mailroom


@attrs.frozen(kw_only=True)
class RegistryStatistics:
    """How many names there are now."""

    names: int


class Registry:
    """Names are any hashable value, such as `"directory"` or `("account", account_id)`. A name
    goes when its actor ends, before anybody learns that it ended."""

    def __init__(self, scheduler: Mailroom) -> None:
        self._scheduler = scheduler
        self._context_by_name: dict[Hashable, Context] = {}

    def register(self, name: Hashable, ref: ActorRef) -> None:
        """Give `ref` this name; again is harmless. Raises NameTaken, or Dead if it has ended."""
        context = self._scheduler.resolve(ref)
        if context is None or context._state == DEAD:
            raise Dead(repr(ref))
        holder = self._context_by_name.get(name)
        if holder is context:
            return
        if holder is not None:
            raise NameTaken(f"{name!r} is the name of {holder.label}")
        self._context_by_name[name] = context
        extras = context._own()
        if extras.names is None:
            extras.names = {}
        extras.names[name] = None

    def unregister(self, name: Hashable) -> None:
        """Take the name away; harmless if nobody has it."""
        context = self._context_by_name.pop(name, None)
        if context is not None and context._extras.names is not None:
            context._extras.names.pop(name, None)

    def whereis(self, name: Hashable) -> ActorRef | None:
        """The living actor of this name."""
        context = self._context_by_name.get(name)
        return None if context is None else context.ref

    def names(self) -> tuple[Hashable, ...]:
        """All names, the oldest first."""
        return tuple(self._context_by_name)

    def statistics(self) -> RegistryStatistics:
        return RegistryStatistics(names=len(self._context_by_name))

    def _forget(self, context: Context) -> None:
        for name in context._extras.names or ():
            del self._context_by_name[name]
