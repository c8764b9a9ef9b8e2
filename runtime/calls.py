"""Under the scheduler, third floor: calls that are waited for. Through the mailbox, from outside of
the actors, and to other nodes; a call that runs on the spot in its caller is the scheduler's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.actor import DEFAULT_DEADLINE_NS
from runtime.context import DEAD, Abroad, Caller, Context
from runtime.errors import CallError, Overloaded
from runtime.lifetimes import Lifetimes
from runtime.refs import ActorRef, AnyRef


class Calls(Lifetimes):
    """The part of a scheduler that carries calls to those who have to answer them."""

    _calls_by_mailbox = 0
    _calls_elsewhere = 0

    # --- from outside of the actors ---------------------------------------------------------------

    def call_soon(
        self,
        ref: AnyRef,
        message: object,
        answered: Callable[[Any, Exception | None], None],
        *,
        deadline_ns: int = DEFAULT_DEADLINE_NS,
        sender: ActorRef | None = None,
    ) -> Caller:
        """A call from outside: `answered(value, None)` or `answered(None, error)` is called once,
        from within `run`, or at once when the call is refused (Dead, Overloaded). It must not
        raise. Give the result to `forget` to lose interest. `sender` is an actor of another node
        that calls."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD:
            return self._call_soon_elsewhere(ref, message, answered, deadline_ns)
        caller = Caller(context, message, None, answered, sender)
        if not self._has_room(context):
            caller._callee = None
            answered(None, Overloaded(context.label, context.mailbox_limit))
            return caller
        self._calls_by_mailbox += 1
        self._timers.arm(caller, self.clock.monotonic_ns() + deadline_ns)
        self._deliver(context, caller)
        if self._waker is not None:  # the deadline may be earlier than what the shell waits for
            self._wake()
        return caller

    def _call_soon_elsewhere(
        self,
        ref: AnyRef,
        message: object,
        answered: Callable[[Any, Exception | None], None],
        deadline_ns: int,
    ) -> Caller:
        elsewhere = self._elsewhere(ref)
        if elsewhere is None:
            answered(None, self._why_not(ref))
            return Caller(None, None, None)
        caller = Caller(Abroad(repr(ref)), None, None, answered)
        self._timers.arm(caller, self.clock.monotonic_ns() + deadline_ns)
        try:
            elsewhere.call(ref, message, caller, None, deadline_ns)
        except CallError as error:
            self.forget(caller)
            answered(None, error)
            return caller
        self._calls_elsewhere += 1
        self._wake()
        return caller

    def answer_from(self, caller: Caller, value: Any, error: Exception | None) -> bool:
        """The answer of another node to a call of ours. False, and counted, if it is late."""
        return self._answer(caller, value, error)

    def forget(self, caller: Caller) -> None:
        """Nobody waits for this call from outside any more: `answered` will not be called."""
        if caller.waiting:
            self._timers.cancel(caller)
            self._close(caller)

    # --- of actors --------------------------------------------------------------------------------

    def _call_elsewhere(
        self, context: Context, ref: AnyRef, message: object, deadline_ns: int
    ) -> Caller:
        """Send a call to another node. Raises Unreachable, Overloaded, or Dead: it is of ours."""
        elsewhere = self._elsewhere(ref)
        if elsewhere is None:
            raise self._why_not(ref)
        caller = Caller(Abroad(repr(ref)), None, context)
        elsewhere.call(ref, message, caller, context.ref, deadline_ns)
        self._calls_elsewhere += 1
        return caller

    def _post(self, context: Context, callee: Context, message: object) -> Caller:
        """Put a call into the callee's mailbox. Raises CallCycle or Overloaded."""
        if callee._wait is not None or callee is context:
            self._refuse_cycle(context, callee)
        if not self._has_room(callee):
            raise Overloaded(callee.label, callee.mailbox_limit)
        self._calls_by_mailbox += 1
        caller = Caller(callee, message, context)
        self._deliver(callee, caller)
        return caller
