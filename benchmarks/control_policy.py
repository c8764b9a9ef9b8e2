"""The policy engine on a large account (`benchmarks.control_account`); a part of
`benchmarks.control`.

    decisions_per_s     requests decided in one thread, half of them for what the client may see
    snapshot_build_s    from the entities in memory to a snapshot that decides
    account_bytes       resident memory of the account: entities, tables and indices
    change_us           one change carried out on the snapshot, by kind; the mean of 500
    propose_ms          a copy of the account with one policy more
    diff_ms             who gains what by that: a group of some 250 members, and Everyone's 10,000

Rates and times are of CPU time (user and system), so that others on the machine disturb little; on
one core. `python -m benchmarks.control_policy [--quick]` measures once and prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import attrs

from actors.model import KIND_OF, Change, Client, Entity, Group, Membership, Policy
from actors.policy.diff import diff
from actors.policy.engine import Snapshot, decide
from actors.policy.proposals import propose
from actors.store.interface import Contents, Put
from benchmarks import control_account as account

DECISIONS: Final = 200_000
DECISIONS_QUICK: Final = 50_000
CHANGES: Final = 500
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def measure(*, quick: bool) -> dict[str, float]:
    """All figures of one round."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = resident_bytes()
    contents = account.contents()
    snapshot, build_s = timed(partial(Snapshot.of, contents))
    figures = {"snapshot_build_s": build_s, "account_bytes": resident_bytes() - before}
    figures["decisions_per_s"] = decisions_per_s(
        snapshot, contents, DECISIONS_QUICK if quick else DECISIONS
    )
    figures |= change_times(snapshot, contents)
    figures |= proposal_times(snapshot)
    return figures


def decisions_per_s(snapshot: Snapshot, contents: Contents, count: int) -> float:
    """Decisions in a second of CPU time. Requests are new objects, as those off the wire."""
    requests = account.requests(contents, count, seed=1)

    def decide_all() -> None:
        for request in requests:
            decide(snapshot, request, account.NOW)

    return count / timed(decide_all)[1]


def change_times(snapshot: Snapshot, contents: Contents) -> dict[str, float]:
    """Microseconds for one change of an entity that is there: taken out, and put in anew."""
    figures = {}
    for kind in (Policy, Membership, Client):
        entities = [entity for entity in contents.entities if isinstance(entity, kind)]
        some = entities[:: len(entities) // CHANGES]
        changes = [change_of(row, snapshot.number + 1 + place) for place, row in enumerate(some)]
        figures[f"change_us_{KIND_OF[kind]}"] = apply_us(snapshot, changes)
    return figures


def apply_us(snapshot: Snapshot, changes: list[Change]) -> float:
    """Microseconds for each of the changes."""

    def apply_all() -> None:
        for change in changes:
            snapshot.apply(change)

    return timed(apply_all)[1] / len(changes) * 1e6


def change_of(row: Entity, number: int) -> Change:
    """A change that replaces an entity by an equal one."""
    return Change(
        account_id=account.ACCOUNT_ID,
        number=number,
        at=account.NOW,
        who="benchmark",
        kind=KIND_OF[type(row)],
        entity_id=row.id,
        before=row,
        after=attrs.evolve(row),
    )


def proposal_times(snapshot: Snapshot) -> dict[str, float]:
    """Milliseconds to try one more policy, and to say who gains by it."""
    figures = {}
    template = next(iter(snapshot.policies.values()))
    for name, group in (("group", 0), ("everyone", account.GROUPS)):
        policy = attrs.evolve(
            template,
            id=account.id_of(Policy, account.POLICIES),
            group_id=account.id_of(Group, group),
        )
        proposal, propose_s = timed(partial(propose, snapshot, [Put(policy)]))
        compare = partial(diff, proposal.before, proposal.after, edits=proposal.edits)
        _, diff_s = timed(partial(compare, account.NOW))
        figures["propose_ms"] = propose_s * 1e3
        figures[f"diff_ms_{name}"] = diff_s * 1e3
    return figures


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the CPU seconds that it took."""
    gc.collect()
    start = time.process_time()
    result = action()
    return result, time.process_time() - start


def resident_bytes() -> int:
    """Resident memory of this process."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE


def rows() -> Iterator[tuple[str, str]]:
    """Figures and their units, as a table shows them."""
    yield "decisions_per_s", "1/s"
    yield "snapshot_build_s", "s"
    yield "account_bytes", "B"
    for kind in ("policy", "membership", "client"):
        yield f"change_us_{kind}", "us"
    yield "propose_ms", "ms"
    yield "diff_ms_group", "ms"
    yield "diff_ms_everyone", "ms"


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv)))
