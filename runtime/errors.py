"""What a call, a start or a spawn can raise on purpose. None of them carries message content."""

from __future__ import annotations

from collections.abc import Sequence


class ActorError(Exception):
    """Base of what the actor runtime raises on purpose."""


class CallError(ActorError):
    """A call did not get its answer. `callee` is the printable name of who was asked."""

    def __init__(self, callee: str, text: str) -> None:
        super().__init__(f"{callee}: {text}")
        self.callee = callee


class Dead(CallError):
    """There is no such actor, or it stopped before it took up the message."""

    def __init__(self, callee: str, reason: str = "no such actor") -> None:
        super().__init__(callee, f"is dead ({reason})")
        self.reason = reason


class Unreachable(CallError):
    """The actor is of another node, and no way leads there now: nothing was sent."""

    def __init__(self, callee: str, node: str) -> None:
        super().__init__(callee, f"no way leads to node {node}")
        self.node = node


class NodeLost(CallError):
    """The callee's node was lost during the call: whether it was handled is unknown."""

    def __init__(self, callee: str, node: str) -> None:
        super().__init__(callee, f"node {node} was lost before the answer")
        self.node = node


class Refused(CallError):
    """An actor of another node refused with `Raise`, with an error that does not travel: its text
    is what is left of it."""

    def __init__(self, callee: str, text: str) -> None:
        super().__init__(callee, text)
        self.text = text


class Crashed(CallError):
    """The callee failed while it handled the message; what it did of it is unknown."""

    def __init__(self, callee: str, reason: str) -> None:
        super().__init__(callee, reason)
        self.reason = reason


class Overloaded(CallError):
    """The callee's mailbox is full (or a limit of the runtime is reached): nothing was sent."""

    def __init__(self, callee: str, limit: int) -> None:
        super().__init__(callee, f"the limit of {limit} is reached")
        self.limit = limit


class TimedOut(CallError):
    """The deadline came before the answer. The callee goes on; its late answer is dropped."""

    def __init__(self, callee: str) -> None:
        super().__init__(callee, "no answer before the deadline")


class NoHandler(CallError):
    """The callee has no handler for a message of this type; it was not disturbed."""

    def __init__(self, callee: str, message_type: str) -> None:
        super().__init__(callee, f"does not handle {message_type}")
        self.message_type = message_type


class CallCycle(CallError):
    """The call would close a circle of actors that wait for each other; nothing was sent.

    `names` lists them in the order of waiting, the caller first and last."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names[0], "would wait for itself: " + " -> ".join(names))
        self.names = tuple(names)


class StartFailed(ActorError):
    """An actor did not come up: `started` failed, or it was stopped before it had ended."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} did not start: {reason}")
        self.name = name
        self.reason = reason


class NameTaken(ActorError):
    """Another living actor is registered under this name."""


class LimitReached(ActorError):
    """A named limit of the runtime stands in the way (actors, timers, children)."""
