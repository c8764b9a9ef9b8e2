"""The check list of one connection (RFC 8445, section 6.1.2): candidates of both ends, paired.

Bases and remote candidates come and go; every base is paired with every remote address that it
can reach. A remote candidate that its owner withdrew is kept for as long as a pair with it works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from channel.messages import MAX_CANDIDATES, Candidate, Candidates
from runtime.net.address import Address
from tunnel.ice.candidates import (
    Base,
    address_of,
    pair_priority,
    reachable,
    reflexive_kind,
    refusal,
)
from tunnel.ice.checks import Role
from tunnel.ice.pair import TWICE_RELAYED_AFTER_NS, Pair, PairState, Remote

MAX_REMOTES: Final = MAX_CANDIDATES
MAX_PAIRS: Final = 100


class CheckList:
    """All pairs of one connection, at most `MAX_PAIRS`, of at most `MAX_REMOTES` candidates."""

    def __init__(self, role: Role, now: int) -> None:
        self.searching_since = now
        """Since when there is no path."""
        self.stale_generations = 0
        self.refused = 0
        self._role = role
        self._bases: dict[Address, Base] = {}
        self._remotes: dict[Address, Remote] = {}
        self._leaving: frozenset[Address] = frozenset()
        self._generation = -1
        self.by_ends: dict[tuple[Address, Address], Pair] = {}
        """The pairs by the addresses of base and remote candidate, for others to read."""

    def __iter__(self) -> Iterator[Pair]:
        """The pairs, as they are now: the list may change while the iteration goes on."""
        return iter(list(self.by_ends.values()))

    def __len__(self) -> int:
        return len(self.by_ends)

    def get(self, base: Address, remote: Address) -> Pair | None:
        """The pair of the base of this address and a remote address."""
        return self.by_ends.get((base, remote))

    @property
    def remote_addresses(self) -> list[Address]:
        return list(self._remotes)

    # --- our side ------------------------------------------------------------------------------

    def set_bases(
        self, bases: Iterable[Base], now: int, *, leaving: frozenset[Address] = frozenset()
    ) -> bool:
        """All the places to send from; those of the addresses `leaving` will soon be gone. Pairs of
        a base that is gone are removed, even if they worked. True: there is a new base."""
        self._leaving = leaving
        wanted = {base.address: base for base in bases}
        gone = [base for base in self._bases.values() if wanted.get(base.address) != base]
        for base in gone:
            del self._bases[base.address]
        self._remove(lambda pair: pair.base in gone)
        new = [base for base in wanted.values() if base.address not in self._bases]
        for base in new:
            self._bases[base.address] = base
            for remote in self._remotes.values():
                self._form(base, remote, now)
        return bool(new)

    def will_end(self, pair: Pair) -> bool:
        """Whether one of the two sides said that it will soon use this pair no more."""
        return pair.remote.gone or self.is_leaving(pair)

    def is_leaving(self, pair: Pair) -> bool:
        """Whether our own end of it will soon be gone."""
        return pair.base.address in self._leaving

    def take_role(self, role: Role) -> None:
        """The role decides how the priorities of the two ends are combined."""
        self._role = role
        for pair in self.by_ends.values():
            pair.priority = self._priority(pair.base, pair.remote)

    # --- the peer's side -------------------------------------------------------------------------

    def signal(self, message: Candidates, now: int) -> list[Pair]:
        """Trickled candidates of the peer. An older generation is dropped; a newer one replaces
        what was signalled before, except pairs that still work.

        The pairs whose candidate is new or was named again.
        """
        if message.generation < self._generation:
            self.stale_generations += 1
            return []
        if message.generation > self._generation:
            self._generation = message.generation
            named = {address_of(candidate) for candidate in message.add}
            for remote in list(self._remotes.values()):
                if remote.signalled and remote.address not in named:
                    self._withdraw(remote)
        for candidate in message.remove:
            gone = self._remotes.get(address_of(candidate))
            if gone is not None:
                self._withdraw(gone)
        named_again = [self._name(candidate, now) for candidate in message.add]
        return [pair for pair in self.by_ends.values() if pair.remote in named_again]

    def learn(self, base: Base, source: Address, priority: int, now: int) -> Pair | None:
        """The pair on which a check of the peer arrived: if its source was unknown, it is a
        peer-reflexive candidate from now on (section 7.3.1.3). None: there are too many."""
        if source not in self._remotes:
            kind = reflexive_kind(priority)
            remote = Remote(address=source, kind=kind, priority=priority, signalled=False)
            self._add(remote, now)
        return self.by_ends.get((base.address, source))

    def drop_if_gone(self, remote: Remote) -> None:
        """Forget a candidate that was withdrawn, once nothing works with it any more."""
        if remote.gone and not self._works(remote):
            self._forget(remote)

    # --- helpers ---------------------------------------------------------------------------------

    def _name(self, candidate: Candidate, now: int) -> Remote | None:
        address = address_of(candidate)
        if refusal(address) is not None:
            self.refused += 1
            return None
        known = self._remotes.get(address)
        if known is None:
            remote = Remote(
                address=address, kind=candidate.kind, priority=candidate.priority, signalled=True
            )
            return self._add(remote, now)
        known.kind, known.priority = candidate.kind, candidate.priority
        known.signalled, known.gone = True, False
        for pair in self.by_ends.values():
            if pair.remote is known:
                pair.priority = self._priority(pair.base, known)
        return known

    def _add(self, remote: Remote, now: int) -> Remote | None:
        if len(self._remotes) >= MAX_REMOTES and not self._make_room():
            self.refused += 1
            return None
        self._remotes[remote.address] = remote
        for base in self._bases.values():
            self._form(base, remote, now)
        return remote

    def _make_room(self) -> bool:
        """Forget the oldest peer-reflexive candidate that carries nothing."""
        for remote in self._remotes.values():
            if not remote.signalled and not self._works(remote):
                self._forget(remote)
                return True
        return False

    def _form(self, base: Base, remote: Remote, now: int) -> None:
        """A new pair, in the place of the worst one that carries nothing if the list is full."""
        if not reachable(base, remote.address):
            return
        priority = self._priority(base, remote)
        if len(self.by_ends) >= MAX_PAIRS:
            idle = [pair for pair in self.by_ends.values() if not pair.usable]
            worst = min(idle, key=lambda pair: pair.priority, default=None)
            if worst is None or worst.priority >= priority:
                return
            del self.by_ends[worst.base.address, worst.remote.address]
        pair = Pair(base=base, remote=remote, priority=priority, due=now, state=PairState.PROBING)
        if pair.twice_relayed:
            pair.due = max(now, self.searching_since + TWICE_RELAYED_AFTER_NS)
        self.by_ends[base.address, remote.address] = pair

    def _priority(self, base: Base, remote: Remote) -> int:
        if self._role == "controlling":
            return pair_priority(base.priority, remote.priority)
        return pair_priority(remote.priority, base.priority)

    def _withdraw(self, remote: Remote) -> None:
        remote.gone = True
        self.drop_if_gone(remote)

    def _works(self, remote: Remote) -> bool:
        return any(pair.usable for pair in self.by_ends.values() if pair.remote is remote)

    def _forget(self, remote: Remote) -> None:
        self._remotes.pop(remote.address, None)
        self._remove(lambda pair: pair.remote is remote)

    def _remove(self, doomed: Callable[[Pair], bool]) -> None:
        self.by_ends = {key: pair for key, pair in self.by_ends.items() if not doomed(pair)}
