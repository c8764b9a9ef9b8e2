"""The lives of nodes, on every store and on a naive reference: one half of the store machine.

The reference keeps every life that ever began, and what became of it; who owns an account is the
life itself. It has no clock: a lease is long, or it is 0 and has expired by the next look.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any
from uuid import UUID

import attrs
import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from actors.store.interface import Fenced, Held, Store, StoreError

LONG_NS = 3_600 * 10**9
"""No example takes an hour."""

Refusal = tuple[type[StoreError], str, str]
Outcome = tuple[str, Any]
choices = st.sampled_from([0, 0, 1, 1, 2, 3])
lease_steps = st.sampled_from(
    [*["acquire"] * 5, *["write"] * 3, "renew", "renew", "release", "join", "expel", "leave"]
)
ttls = st.sampled_from([LONG_NS, LONG_NS, 0])


class State(Enum):
    """What became of a life."""

    STANDS = "its lease has not expired"
    EXPIRED = "its lease has expired, and may be renewed"
    EXPELLED = "given up for dead"
    OVER = "it left, or another has taken its name"


@attrs.define(eq=False)
class Life:
    """One incarnation of a node, from its join on."""

    name: str
    incarnation: int
    state: State
    draining: bool = False


@attrs.define
class Leases:
    """Every life that ever began, oldest first, and which of them owns an account."""

    lives: list[Life] = attrs.Factory(list)
    owners: dict[UUID, Life] = attrs.Factory(dict)

    def choose(self, number: int) -> Life:
        """The last, the last but one, ...; one that never began if there is none."""
        if number < len(self.lives):
            return self.lives[-1 - number]
        return Life("nobody", 1_000, State.OVER)

    def present(self) -> list[Life]:
        """Those that have a row."""
        rows = [life for life in self.lives if life.state is not State.OVER]
        return sorted(rows, key=lambda life: life.name)

    def fenced(self, life: Life) -> Refusal:
        """How a life is refused whose time is over."""
        later = [
            each
            for each in self.present()
            if each.name == life.name and each.incarnation > life.incarnation
        ]
        return Fenced, "", "superseded" if later else ""

    def refusal(self, account_id: UUID, life: Life) -> Refusal | None:
        """Why the life may not become the owner of an account that exists."""
        if life.state is not State.STANDS:
            return self.fenced(life)
        owner = self.owners.get(account_id)
        if owner is not None and owner.state is State.STANDS and owner is not life:
            return Held, "", owner.name
        return None

    def take_over(self, account_id: UUID, life: Life) -> None:
        """The life becomes the owner. An expired one that was so before is given up with that."""
        before = self.owners.get(account_id)
        if before is not None and before.name != life.name and before.state is State.EXPIRED:
            before.state = State.EXPELLED
        self.owners[account_id] = life


class LeaseMachine(RuleBasedStateMachine):
    """The rules of nodes. `stores` are empty at the start of each example."""

    stores: list[Store]

    def __init__(self) -> None:
        super().__init__()
        self.leases = Leases()

    def ask_each(self, question: Callable[[Store], Awaitable[Any]]) -> list[Outcome]:
        async def outcome(store: Store) -> Outcome:
            try:
                return "done", await question(store)
            except Held as error:
                return "refused", (Held, "", error.owner)
            except Fenced as error:
                return "refused", (Fenced, "", "superseded" if error.superseded else "")
            except StoreError as error:
                named = getattr(error, "kind", ""), getattr(error, "field", "")
                return "refused", (type(error), *named)

        return [trio.from_thread.run(outcome, store) for store in self.stores]

    def ask(self, question: Callable[[Store], Awaitable[Any]]) -> Outcome:
        """The one answer that all stores give."""
        first, *others = self.ask_each(question)
        for other in others:
            assert other == first
        return first

    @rule(name=st.sampled_from(["north", "south"]), ttl_ns=ttls)
    def join(self, name: str, ttl_ns: int) -> None:
        kind, incarnation = self.ask(
            lambda store: store.join_node(
                name, link_address="127.0.0.1:1", door_address="[::1]:2", version="1",
                ttl_ns=ttl_ns,
            )
        )  # fmt: skip
        assert kind == "done"
        assert all(incarnation > life.incarnation for life in self.leases.lives), "it only grows"
        for life in self.leases.lives:
            if life.name == name:
                life.state = State.OVER
        self.leases.lives.append(Life(name, incarnation, state_after(ttl_ns)))
        self.look()

    @rule(number=choices, draining=st.booleans(), ttl_ns=ttls)
    def renew(self, number: int, draining: bool, ttl_ns: int) -> None:
        life = self.leases.choose(number)
        answers = self.ask_each(
            lambda store: store.renew_node(
                life.name, life.incarnation, draining=draining, ttl_ns=ttl_ns
            )
        )
        if life.state in (State.EXPELLED, State.OVER):
            assert answers == [("refused", self.leases.fenced(life))] * len(self.stores)
            return
        life.state, life.draining = state_after(ttl_ns), draining
        self.check_rows(answers)

    @rule(number=choices)
    def expel(self, number: int) -> None:
        life = self.leases.choose(number)
        assert self.ask(lambda store: store.expel_node(life.name, life.incarnation)) == (
            "done",
            None,
        )
        if life.state is not State.OVER:
            life.state = State.EXPELLED
        self.look()

    @rule(number=choices)
    def leave(self, number: int) -> None:
        life = self.leases.choose(number)
        assert self.ask(lambda store: store.leave_node(life.name, life.incarnation)) == (
            "done",
            None,
        )
        life.state = State.OVER
        self.look()

    def look(self) -> None:
        self.check_rows(self.ask_each(lambda store: store.nodes()))

    def check_rows(self, answers: list[Outcome]) -> None:
        """What is left of a lease differs between stores, all else does not."""
        expected = [
            (life.name, life.incarnation, life.draining, life.state is State.STANDS)
            for life in self.leases.present()
        ]
        for kind, rows in answers:
            assert kind == "done"
            assert expected == [
                (row.name, row.incarnation, row.draining, row.remaining_ns > 0) for row in rows
            ]
            assert all(0 <= row.remaining_ns <= LONG_NS for row in rows)
            assert all(
                (row.link_address, row.door_address, row.version) == ("127.0.0.1:1", "[::1]:2", "1")
                for row in rows
            )


def state_after(ttl_ns: int) -> State:
    return State.STANDS if ttl_ns else State.EXPIRED
