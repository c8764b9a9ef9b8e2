"""What a full mailbox does with the next message: an actor's class states it.

    class Gauge(Actor):
        overload = Overload.COALESCE
        coalesces = {Reading: "sensor"}     # of each sensor only the newest reading waits

Whatever the policy, what the runtime owes an actor (`Down`, `Exit`, `IdleTimeout`, its own timers)
is never refused, dropped or coalesced, and every message that is lost is counted.
"""

from __future__ import annotations

from enum import Enum


class Overload(Enum):
    """The policy of a mailbox that holds `mailbox_limit` messages when another one comes."""

    REFUSE = "refuse"
    """A cast is refused (False), a call raises Overloaded. For whatever must not be lost unseen."""
    DROP_OLDEST = "drop_oldest"
    """The oldest message gives way (a waiting call raises Overloaded), and the new one is taken.
    For streams in which the newest counts. If system messages alone fill the mailbox: as REFUSE."""
    COALESCE = "coalesce"
    """At all times, not only when it is full: a cast of a type named in `Actor.coalesces` takes the
    place of the one with the same key that waits, which is lost. All else as REFUSE. For states
    that replace one another."""
