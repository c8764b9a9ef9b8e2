"""What can be seen of a scheduler from outside: statistics, the tree as text, crash reports.

Nothing here carries the content of a message, of an actor's state or of an exception's text.
"""

from __future__ import annotations

from traceback import walk_tb
from typing import TYPE_CHECKING, Final

import attrs

from runtime.context import RECENT_MESSAGES, STATE_NAMES, Context
from runtime.refs import ActorRef

if TYPE_CHECKING:
    from runtime.scheduler import Scheduler

MAX_FRAMES: Final = 20
MAX_TREE_LINES: Final = 10_000


@attrs.frozen(kw_only=True)
class CrashReport:
    """An actor failed. `frames` are file:line:function, the innermost last (MAX_FRAMES of them);
    `last_messages` are types with the names of their fields, without those that attrs is told to
    keep out of reprs, the one in hand last (RECENT_MESSAGES of them); `restarts` is
    how often its supervisor had restarted it before. `detail` is the text of the exception, only
    if the scheduler was made with `crash_details=True` (tests and simulations)."""

    ref: ActorRef
    label: str
    actor: str
    reason: str
    frames: tuple[str, ...]
    last_messages: tuple[str, ...]
    restarts: int
    age_ns: int
    mailbox_depth: int
    detail: str | None = None


@attrs.frozen(kw_only=True)
class UnhandledReport:
    """A message was cast to an actor that has no handler for its type; it was dropped."""

    ref: ActorRef
    label: str
    actor: str
    message: str


Report = CrashReport | UnhandledReport


@attrs.frozen(kw_only=True)
class SchedulerStatistics:
    """Present sizes (the first four) and counts since the start."""

    actors: int
    queued: int
    timers: int
    effects_in_flight: int
    spawned: int
    ended: int
    crashed: int
    restarted: int
    """Actors that a supervisor started anew."""
    messages_handled: int
    calls_in_caller: int
    calls_by_mailbox: int
    calls_elsewhere: int
    calls_timed_out: int
    call_cycles: int
    refused: int
    """Messages refused because a mailbox was full."""
    dropped: int
    """Messages that gave way to newer ones, in full mailboxes that drop the oldest."""
    coalesced: int
    """Messages whose place was taken by a newer one of the same key."""
    dead_letters: int
    """Casts to actors that were not there, or that ended before they took them up."""
    unhandled: int
    late_replies: int
    late_effects: int


@attrs.frozen(kw_only=True)
class ActorStatistics:
    """One actor. `state` is one of idle, queued, running, waiting, dead; `mailbox_limit` does not
    count for system messages."""

    ref: ActorRef
    label: str
    actor: str
    state: str
    mailbox_depth: int
    mailbox_limit: int
    handled: int
    refused: int
    dropped: int
    coalesced: int
    restarts: int
    children: int
    timers: int
    age_ns: int


def actor_statistics(context: Context) -> ActorStatistics:
    """What is to be said of one actor now."""
    return ActorStatistics(
        ref=context.ref,
        label=context.label,
        actor=type(context._actor).__name__,
        state=STATE_NAMES[context._state],
        mailbox_depth=context.mailbox_depth,
        mailbox_limit=context.mailbox_limit,
        handled=context.handled,
        refused=context.refused,
        dropped=context._extras.dropped,
        coalesced=context._extras.coalesced,
        restarts=context.restarts,
        children=len(context._extras.children or ()),
        timers=len(context._extras.timers or ()),
        age_ns=context.now() - context.spawned_ns,
    )


def crash_report(context: Context, reason: str, error: BaseException, details: bool) -> CrashReport:
    """The report on an actor that has just failed with `error`."""
    frames = [
        f"{frame.f_code.co_filename}:{line}:{frame.f_code.co_name}"
        for frame, line in walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") not in ("runtime.scheduler", "runtime.mailroom")
    ]
    return CrashReport(
        ref=context.ref,
        label=context.label,
        actor=type(context._actor).__name__,
        reason=reason,
        frames=tuple(frames[-MAX_FRAMES:]),
        last_messages=_last_messages(context),
        restarts=context.restarts,
        age_ns=context.now() - context.spawned_ns,
        mailbox_depth=context.mailbox_depth,
        detail=str(error) if details else None,
    )


def _last_messages(context: Context) -> tuple[str, ...]:
    recent = context._recent
    if recent is None:
        return ()
    newest = context.handled % RECENT_MESSAGES
    ordered = recent[newest + 1 :] + recent[: newest + 1]
    return tuple(_outline(kind) for kind in ordered if kind is not None)


def _outline(kind: type) -> str:
    """A message's type and the names of its fields; never a value."""
    if not attrs.has(kind):
        return kind.__name__
    shown = ", ".join(field.name for field in attrs.fields(kind) if field.repr is not False)
    return f"{kind.__name__}({shown})"


def tree(scheduler: Scheduler) -> str:
    """Every actor on a line, below the one that spawned it: its name, state, mailbox depth and
    limit, messages handled, restarts, age. At most MAX_TREE_LINES."""
    lines: list[str] = []
    pending = [(context, 0) for context in reversed(scheduler.roots())]
    while pending and len(lines) < MAX_TREE_LINES:
        context, depth = pending.pop()
        lines.append(_line(context, depth))
        children = list(context._extras.children or ())
        pending.extend((child, depth + 1) for child in reversed(children))
    if pending:
        lines.append("...")
    return "\n".join(lines)


def _line(context: Context, depth: int) -> str:
    seen = actor_statistics(context)
    name = "  " * depth + seen.label
    mail = f"mail {seen.mailbox_depth}/{seen.mailbox_limit}"
    age = f"age {seen.age_ns / 1e9:.1f} s"
    return (
        f"{name:<40} {seen.actor:<20} {seen.state:<8} {mail:<12} "
        f"handled {seen.handled:<8} restarts {seen.restarts:<3} {age}"
    )
