"""A small model of a TURN server by RFC 8656, for a comparison with the real one. It imports
nothing of `relays`: its numbers are those of the RFC, written down again.

It knows no bytes and chooses no ports. `..._code` says with which error code a request has to be
answered (0: success), and the method of the same name without it what a success changes.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

S = 10**9
ALLOCATION = 600 * S
PERMISSION = 300 * S
CHANNEL = 600 * S
RESERVATION = 30 * S

Client = tuple[int, tuple[str, int]]
"""The listener and the address of the client: the 5-tuple but for what is the same for all."""
Peer = tuple[str, int]


def family_of(host: str) -> int:
    return 2 if ":" in host else 1


@attrs.define
class Leg:
    """A relayed transport address, by its family."""

    port: int
    ends: int


@attrs.define
class Held:
    user: str
    transaction: bytes
    legs: dict[int, Leg]
    permissions: dict[str, int] = attrs.Factory(dict)
    channels: dict[int, tuple[Peer, int]] = attrs.Factory(dict)


@attrs.define
class Reference:
    """`now` is set by `pass_to`. Families are 1 (IPv4) and 2 (IPv6)."""

    per_user: int
    in_all: int
    is_forbidden: Callable[[str], bool]
    now: int
    is_draining: bool = False
    held: dict[Client, Held] = attrs.Factory(dict)
    reserved: dict[bytes, tuple[int, Leg]] = attrs.Factory(dict)

    def pass_to(self, now: int) -> None:
        self.now = now
        for client, held in list(self.held.items()):
            for family in [family for family, leg in held.legs.items() if leg.ends <= now]:
                self._drop(client, family)
        for token in [token for token, (_, leg) in self.reserved.items() if leg.ends <= now]:
            del self.reserved[token]

    # --- section 7 ---

    def allocate_code(
        self,
        client: Client,
        user: str,
        transaction: bytes,
        token: bytes | None,
        *,
        is_sane: bool,
        reserves: bool = False,
    ) -> int:
        """`reserves`: another port is to be kept as well, of which there are as few as of
        allocations."""
        held = self.held.get(client)
        if held is not None:
            return 0 if held.transaction == transaction else 437
        if not is_sane:
            return 400
        if self.is_draining:
            return 508
        if sum(one.user == user for one in self.held.values()) >= self.per_user:
            return 486
        if len(self.held) >= self.in_all:
            return 508
        if reserves and len(self.reserved) >= self.in_all:
            return 508
        return 508 if token is not None and token not in self.reserved else 0

    def allocate(
        self,
        client: Client,
        user: str,
        transaction: bytes,
        ports: dict[int, int],
        lifetime: int = ALLOCATION,
    ) -> None:
        """`ports` are those of the answer, by family."""
        if client not in self.held:
            legs = {family: Leg(port, self.now + lifetime) for family, port in ports.items()}
            self.held[client] = Held(user, transaction, legs)

    def reserve(self, token: bytes, family: int, port: int) -> None:
        self.reserved[token] = (family, Leg(port, self.now + RESERVATION))

    # --- sections 8 to 10 and 12 ---

    def _code(self, client: Client, user: str) -> int:
        held = self.held.get(client)
        if held is None:
            return 437
        return 0 if held.user == user else 441

    def refresh_code(self, client: Client, user: str, family: int | None, lifetime: int) -> int:
        code = self._code(client, user)
        if code == 441 and lifetime == 0:
            code = 0  # whoever is at that address now may end what is in the way (docs/relay.md)
        if code == 0 and family is not None and family not in self.held[client].legs:
            return 443
        return code

    def refresh(self, client: Client, family: int | None, lifetime: int) -> None:
        concerned = list(self.held[client].legs) if family is None else [family]
        for one in concerned:
            if lifetime:
                self.held[client].legs[one].ends = self.now + lifetime
            else:
                self._drop(client, one)

    def permit_code(self, client: Client, user: str, hosts: list[str]) -> int:
        code = self._code(client, user)
        return code or next((bad for host in hosts if (bad := self._peer_code(client, host))), 0)

    def permit(self, client: Client, hosts: list[str]) -> None:
        for host in hosts:
            self.held[client].permissions[host] = self.now + PERMISSION

    def bind_code(self, client: Client, user: str, number: int, peer: Peer) -> int:
        code = self._code(client, user)
        if code:
            return code
        for bound, (other, ends) in self.held[client].channels.items():
            if ends > self.now and (bound == number) != (other == peer):
                return 400
        return self._peer_code(client, peer[0]) or (403 if peer[1] < 1024 else 0)

    def bind(self, client: Client, number: int, peer: Peer) -> None:
        self.permit(client, [peer[0]])
        channels = self.held[client].channels
        for bound in [bound for bound, (other, _) in channels.items() if other == peer]:
            del channels[bound]
        channels[number] = (peer, self.now + CHANNEL)

    def _peer_code(self, client: Client, host: str) -> int:
        if family_of(host) not in self.held[client].legs:
            return 443
        return 403 if self.is_forbidden(host) else 0

    # --- what ends otherwise ---

    def revoke(self, user: str) -> None:
        self.held = {client: one for client, one in self.held.items() if one.user != user}

    def connection_ended(self, client: Client) -> None:
        self.held.pop(client, None)

    def _drop(self, client: Client, family: int) -> None:
        held = self.held[client]
        del held.legs[family]
        if not held.legs:
            del self.held[client]
        for host in [host for host in held.permissions if family_of(host) == family]:
            del held.permissions[host]
        for number in [n for n, (peer, _) in held.channels.items() if family_of(peer[0]) == family]:
            del held.channels[number]

    # --- section 11: what passes ---

    def goes_out(self, client: Client, peer: Peer) -> Leg | None:
        """From which relayed address data to this peer leaves; None: it is dropped."""
        held = self.held.get(client)
        if held is None or held.permissions.get(peer[0], 0) <= self.now or peer[1] < 1024:
            return None
        return held.legs.get(family_of(peer[0]))

    def peer_of(self, client: Client, number: int) -> Peer | None:
        held = self.held.get(client)
        peer, ends = held.channels.get(number, (None, 0)) if held else (None, 0)
        return peer if ends > self.now else None

    def comes_in(self, client: Client, peer: Peer) -> tuple[bool, int | None]:
        """Whether a peer's data reaches the client, and by which channel."""
        held = self.held.get(client)
        if held is None or held.permissions.get(peer[0], 0) <= self.now:
            return False, None
        for number, (bound, ends) in held.channels.items():
            if bound == peer and ends > self.now:
                return True, number
        return True, None
