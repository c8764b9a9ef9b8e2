"""Under the scheduler: links and exit signals, after Erlang's.

A link holds between two actors, both ways, at most once. When one ends, the other gets an exit
signal with the same reason:

- "normal" is ignored;
- any other reason ends the one that gets it, with the same reason, so a signal runs on from link
  to link;
- an actor that traps exits (`Actor.traps_exits`) lives on and gets an `Exit` message instead,
  whatever the reason.

`exit` sends such a signal to any actor. The reason "kill" then ends it, trapping or not, with the
reason "killed". One actor's end may run through thousands of links: signals are kept in a queue, so
that they take no stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Final

from runtime.context import DEAD, Context, Exit, SystemMail
from runtime.errors import Dead
from runtime.mailroom import Mailroom
from runtime.refs import ActorRef

KILL: Final = "kill"
KILLED: Final = "killed"
NO_CONNECTION: Final = "noconnection"
"""The end of an actor of another node, as it looks when that node is lost."""


class Links(Mailroom, ABC):
    """The part of a scheduler that passes exit signals on."""

    _signals: deque[tuple[Context, Exit]]  # of links, still to be passed on
    _endings: int  # ends under way, one within the other

    def exit(self, ref: ActorRef, reason: str, *, sender: ActorRef | None = None) -> bool:
        """Send an exit signal, as from `sender` (None: from outside). False if nobody is there."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD:
            elsewhere = self._elsewhere(ref)
            return elsewhere is not None and elsewhere.exit(ref, reason, sender)
        if reason == KILL:
            self._stop(context, KILLED)
        else:
            self._signal(context, Exit(sender, reason))
        return True

    def _signal(self, context: Context, signal: Exit) -> None:
        """An exit signal has reached an actor. One that has not come up yet cannot trap it."""
        if context._actor.traps_exits and not context._unstarted:
            self._deliver(context, SystemMail(signal))
        elif signal.reason != "normal" or signal.ref == context.ref:
            self._stop(context, signal.reason)

    def _link(self, context: Context, ref: ActorRef) -> None:
        if context._state == DEAD:
            raise Dead(context.label)
        other = self.resolve(ref)
        if other is context:
            return
        if other is None or other._state == DEAD:
            elsewhere = self._elsewhere(ref)
            if elsewhere is None:
                self._signal(context, Exit(ref, "dead"))
            elif elsewhere.link(context.ref, ref):
                self._note_link(context, ref)
            else:
                self._signal(context, Exit(ref, NO_CONNECTION))
            return
        self._note_link(context, other)
        self._note_link(other, context)

    def _note_link(self, context: Context, peer: Context | ActorRef) -> None:
        extras = context._own()
        if extras.links is None:
            extras.links = {}
        extras.links[peer] = None

    # --- with actors of other nodes, for `Elsewhere` ---------------------------------------------

    def linked_from(self, ref: ActorRef, peer: ActorRef) -> bool:
        """`peer`, of another node, links to our actor `ref`. False if that has ended."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD:
            return False
        self._note_link(context, peer)
        return True

    def unlinked_from(self, ref: ActorRef, peer: ActorRef) -> None:
        """The link with `peer`, of another node, is off."""
        context = self.resolve(ref)
        if context is not None and context._extras.links is not None:
            context._extras.links.pop(peer, None)

    def signal_from(self, ref: ActorRef, peer: ActorRef, reason: str) -> None:
        """`peer`, of another node and linked to our actor `ref`, has ended, or is out of reach."""
        context = self.resolve(ref)
        if context is None or context._state == DEAD or context._extras.links is None:
            return
        if context._extras.links.pop(peer, self) is None:
            self._signals.append((context, Exit(peer, reason)))
            if not self._endings:
                self._pass_signals_on()

    def _unlink(self, context: Context, ref: ActorRef) -> None:
        other = self.resolve(ref)
        elsewhere = self._elsewhere(ref) if other is None else None
        if elsewhere is not None and context._extras.links is not None:
            if context._extras.links.pop(ref, self) is None:
                elsewhere.unlink(context.ref, ref)
            return
        for one, its_peer in ((context, other), (other, context)):
            if one is not None and one._extras.links is not None and its_peer is not None:
                one._extras.links.pop(its_peer, None)

    def _break_links(self, context: Context, reason: str) -> None:
        """An actor has ended: queue the signals for those it was linked to, in order of linking."""
        for peer in context._extras.links or ():
            if isinstance(peer, ActorRef):
                if self.elsewhere is not None:
                    self.elsewhere.broken(context.ref, peer, reason)
                continue
            if peer._extras.links is not None:
                peer._extras.links.pop(context, None)
            self._signals.append((peer, Exit(context.ref, reason)))

    def _pass_signals_on(self) -> None:
        while self._signals:
            peer, signal = self._signals.popleft()
            if peer._state != DEAD:
                self._signal(peer, signal)

    @abstractmethod
    def _stop(self, context: Context, reason: str) -> None:
        """End an actor; see `Lifetimes`."""
