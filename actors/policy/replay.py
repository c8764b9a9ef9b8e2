"""What a proposal would have done to accesses that were given: recorded authorisations, decided
under another state of the account.

An authorisation records who reached what, from where, and from when until when. An access that
goes on is renewed as long as a policy allows it, so what is found is the first instant of its life
at which none would have. What was not recorded (the country, the provider, what was known of the
device) is taken from the account as it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Literal

import attrs

from actors.model import Authorization
from actors.policy.effort import OF_A_POLICY, Effort
from actors.policy.engine import (
    Decision,
    Denied,
    Request,
    Snapshot,
    allowed_until,
    decide,
)

MAX_STEPS = 10_000
"""How often one access may go over from one policy to another, or into the next week, before the
rest of its life is taken to be as it was."""


@attrs.frozen(kw_only=True)
class Replayed:
    """What would have become of an authorisation.

    `stands`: allowed all its life. `shortened`: cut at `cut_at`, within its life. `denied`: not
    given at all. `unknown`: its client or token is not known any more. `violated` says why.
    """

    authorization: Authorization
    outcome: Literal["stands", "shortened", "denied", "unknown"]
    cut_at: datetime | None = None
    violated: tuple[str, ...] = ()


def replay(
    snapshot: Snapshot, authorizations: Iterable[Authorization], effort: Effort | None = None
) -> Iterator[Replayed]:
    """What would have become of each under this state of the account, in the order given. Raises
    Exhausted.

    To see what a proposal alone would have done, compare with the replay under the present state.
    """
    effort = effort or Effort()
    for row in authorizations:
        if row.client_id not in snapshot.clients or row.token_id not in snapshot.tokens:
            yield Replayed(authorization=row, outcome="unknown")
        else:
            yield _replay(snapshot, row, effort)


# --- helpers ---


def _replay(snapshot: Snapshot, row: Authorization, effort: Effort) -> Replayed:
    request = Request(
        client_id=row.client_id,
        resource_id=row.resource_id,
        remote_ip=row.remote_ip,
        token_id=row.token_id,
    )
    end = row.expires_at if row.ended_at is None else min(row.ended_at, row.expires_at)
    instant = row.created_at
    step = OF_A_POLICY * (1 + snapshot.count_policies_on(row.resource_id))
    effort.spend(step)
    decision: Decision = decide(snapshot, request, instant)
    if isinstance(decision, Denied):
        return Replayed(authorization=row, outcome="denied", violated=_why(decision))
    for _ in range(MAX_STEPS):
        effort.spend(step)
        until = allowed_until(snapshot, request, instant, end)
        if until is None:
            decision = decide(snapshot, request, instant)
            assert isinstance(decision, Denied)
            return Replayed(
                authorization=row, outcome="shortened", cut_at=instant, violated=_why(decision)
            )
        if until >= end:
            break
        instant = until
    return Replayed(authorization=row, outcome="stands")


def _why(decision: Denied) -> tuple[str, ...]:
    return decision.violated or (decision.reason,)
