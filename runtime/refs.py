"""Addresses of actors."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from runtime.context import Context


@final
class ActorRef:
    """The address of one incarnation of an actor: a node and a number, never reused.

    Equal and hashable by these two; the rest is a shortcut to the actor on its own node."""

    __slots__ = ("_context", "node", "number")

    def __init__(self, node: str, number: int) -> None:
        self.node = node
        self.number = number
        self._context: Context | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActorRef):
            return NotImplemented
        return self.number == other.number and self.node == other.node

    def __hash__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"<{self.node}.{self.number}>"

    def __reduce__(self) -> tuple[type[ActorRef], tuple[str, int]]:
        return ActorRef, (self.node, self.number)
