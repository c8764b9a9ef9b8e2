"""The two ends that the tests of the channel put their hands to."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from uuid import UUID

import attrs

from channel.frames import Frame
from channel.listener import Channel
from channel.messages import (
    Challenge,
    ClientInit,
    Disconnect,
    Interface,
    IpText,
    Join,
    RelayJoin,
)

TOKEN = "hlw_client_a-token-that-nobody-may-see"
JOIN = Join(
    kind="client",
    token=TOKEN,
    device_key=b"d" * 32,
    signature=b"s" * 64,
    tunnel_key=b"t" * 32,
    name="laptop",
    incarnation=0,
)
INIT = ClientInit(
    account_id=UUID(int=1),
    client_id=UUID(int=2),
    interface=Interface(
        ipv4=IPv4Address("100.64.0.1"),
        ipv6=IPv6Address("fd48::1"),
        range_ipv4=IPv4Network("100.64.0.0/11"),
        range_ipv6=IPv6Network("fd48::/64"),
    ),
    resources=(),
    relays=(),
    authorizations=(),
)


class Agent:
    """A `ChannelAgent` that notes what it is told."""

    def __init__(self, join: Join | RelayJoin = JOIN) -> None:
        self.template = join
        self.challenges: list[Challenge] = []
        self.frames: list[Frame] = []
        self.losses = 0

    def join(self, challenge: Challenge, now: int) -> Join | RelayJoin:
        self.challenges.append(challenge)
        return attrs.evolve(self.template, incarnation=len(self.challenges))

    def receive(self, frame: Frame, now: int) -> None:
        self.frames.append(frame)

    def channel_lost(self, now: int) -> None:
        self.losses += 1

    @property
    def messages(self) -> list[object]:
        return [frame.message for frame in self.frames]


class Desk:
    """An `Attachment` that takes everybody in (or not), and notes what it is told."""

    def __init__(
        self,
        channel: Channel,
        *,
        answer: Callable[[Desk], None] | None = None,
    ) -> None:
        self.channel = channel
        self.frames: list[Frame] = []
        self.remotes: list[IpText] = [channel.remote]
        self.ends: list[str] = []
        self.signs_of_life = 0
        self._answer = answer or Desk.accept

    def accept(self) -> None:
        self.channel.joined("client")
        self.channel.send(INIT, epoch=1)

    def refuse(self) -> None:
        self.channel.close(Disconnect(reason="invalid_token", detail="unknown", retry=False))

    def received(self, frame: Frame) -> None:
        self.frames.append(frame)
        if frame.event in ("join", "relay_join"):
            self._answer(self)

    def heard(self) -> None:
        self.signs_of_life += 1

    def migrated(self, remote: IpText) -> None:
        self.remotes.append(remote)

    def closed(self, reason: str) -> None:
        self.ends.append(reason)

    @property
    def messages(self) -> list[object]:
        return [frame.message for frame in self.frames]
