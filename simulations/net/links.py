"""Links: what a packet meets between two places.

A link has two directions, each a `Pipe` with its own quality, queue and stream of randomness. A
packet that enters a pipe is, in this order: refused if it is larger than the MTU (its sender is
told), lost, put into the queue (dropped at the tail if that is full), corrupted, held back so that
later ones overtake it, duplicated. Jitter alone never reorders. A perfect pipe costs no event.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush
from random import Random
from typing import TYPE_CHECKING, Any, Final

import attrs

from runtime.randomness import SeededRandomness
from simulations.net.packets import TCP, Packet

if TYPE_CHECKING:
    from simulations.net.world import World

NS: Final = 10**9
MS: Final = 10**6
DEFAULT_MTU: Final = 1_500
DEFAULT_QUEUE_BYTES: Final = 65_536


def _share(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{attribute.name} is a probability, not {value}")


def _at_least(least: int) -> Callable[[object, attrs.Attribute[int], int], None]:
    def check(_: object, attribute: attrs.Attribute[int], value: int) -> None:
        if value < least:
            raise ValueError(f"{attribute.name} is at least {least}, not {value}")

    return check


@attrs.frozen(kw_only=True)
class Bursts:
    """Loss in bursts: the model of Gilbert and Elliott. Before each packet the state changes with
    probability `begin` (good to bad) or `end` (bad to good); then it is lost with the state's."""

    begin: float = attrs.field(validator=_share)
    end: float = attrs.field(validator=_share)
    loss_in_bad: float = attrs.field(default=1.0, validator=_share)
    loss_in_good: float = attrs.field(default=0.0, validator=_share)


@attrs.frozen(kw_only=True)
class LinkQuality:
    """One direction of a link. Times in ns, sizes in bytes of IP packets.

    `jitter_ns`: up to so much is added to the latency, uniformly. `reorder`: the share of packets
    held back for `reorder_ns` more. `bandwidth_bps`: bits per second, 0 is no bound; with a bound,
    `queue_bytes` may wait, and what does not fit is dropped. `corrupt`: the share of packets in
    which one bit of the data is flipped, past every checksum.
    """

    latency_ns: int = attrs.field(default=0, validator=_at_least(0))
    jitter_ns: int = attrs.field(default=0, validator=_at_least(0))
    loss: float = attrs.field(default=0.0, validator=_share)
    bursts: Bursts | None = None
    duplicate: float = attrs.field(default=0.0, validator=_share)
    reorder: float = attrs.field(default=0.0, validator=_share)
    reorder_ns: int = attrs.field(default=20 * MS, validator=_at_least(0))
    corrupt: float = attrs.field(default=0.0, validator=_share)
    bandwidth_bps: int = attrs.field(default=0, validator=_at_least(0))
    queue_bytes: int = attrs.field(default=DEFAULT_QUEUE_BYTES, validator=_at_least(1))
    mtu: int = attrs.field(default=DEFAULT_MTU, validator=_at_least(68))


PERFECT: Final = LinkQuality()
UPLINK: Final = LinkQuality(latency_ns=5 * MS)


def _no_draw() -> float:
    raise AssertionError("a quiet pipe draws nothing")


class Pipe:
    """One direction of a link. `quality` may be set at any time, for packets sent from then on."""

    __slots__ = (
        "_bad",
        "_draw",
        "_free_at",
        "_last",
        "_noisy",
        "_quality",
        "_world",
        "free",
        "latency_ns",
        "mtu",
        "name",
    )

    def __init__(self, world: World, name: str, quality: LinkQuality) -> None:
        self.name = name
        self._world = world
        self._draw: Callable[[], float] = _no_draw
        self._free_at = 0  # when the last byte of the queue has left
        self._last = 0  # when the last packet arrives: jitter does not reorder
        self._bad = False
        self.quality = quality

    @property
    def quality(self) -> LinkQuality:
        return self._quality

    @quality.setter
    def quality(self, quality: LinkQuality) -> None:
        self._quality = quality
        self.latency_ns = quality.latency_ns
        self.mtu = quality.mtu
        self._noisy = bool(
            quality.jitter_ns
            or quality.loss
            or quality.bursts
            or quality.duplicate
            or quality.reorder
            or quality.corrupt
            or quality.bandwidth_bps
        )
        self.free = not self._noisy and not quality.latency_ns
        """Whether it takes no time and no harm comes to a packet (but for the MTU)."""
        if self._noisy and self._draw is _no_draw:
            seed = SeededRandomness(self._world.seed, f"link {self.name}").bytes(32)
            self._draw = Random(seed).random

    def carry(self, packet: Packet, act: Callable[..., object], *args: Any) -> None:
        """Take a packet, and call `act(packet, *args)` when it arrives, if it does; at once if the
        pipe is free."""
        world = self._world
        if packet.size > self.mtu and packet.protocol != TCP:
            world.drop(packet, "too big", self.name)
            world.tell(packet, "too_big", mtu=self.mtu)
        elif self._noisy:
            self._carry_noisily(packet, act, args)
        elif self.free:
            act(packet, *args)
        else:
            arrives = world.now + self.latency_ns
            if arrives < self._last:
                arrives = self._last
            self._last = arrives
            world.serial += 1
            heappush(world.heap, (arrives, world.serial, act, (packet, *args)))

    def _carry_noisily(
        self, packet: Packet, act: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        world = self._world
        quality = self._quality
        draw = self._draw
        if (quality.loss and draw() < quality.loss) or (
            quality.bursts is not None and self._is_lost_in_a_burst(quality.bursts)
        ):
            world.drop(packet, "loss", self.name)
            return
        leaves = world.now
        if quality.bandwidth_bps:
            done = self._queue(packet.size)
            if done is None:
                world.drop(packet, "queue full", self.name)
                return
            leaves = done
        if quality.corrupt and draw() < quality.corrupt:
            self._flip(packet)
        arrives = leaves + quality.latency_ns
        if quality.jitter_ns:
            arrives += int(draw() * quality.jitter_ns)
        if arrives < self._last:
            arrives = self._last
        held_back = quality.reorder and draw() < quality.reorder
        if held_back:
            arrives += quality.reorder_ns
        else:
            self._last = arrives
        world.serial += 1
        heappush(world.heap, (arrives, world.serial, act, (packet, *args)))
        if quality.duplicate and draw() < quality.duplicate:
            twin = packet.copy()
            world.copied(twin, self.name)
            world.serial += 1
            heappush(world.heap, (arrives, world.serial, act, (twin, *args)))

    def _is_lost_in_a_burst(self, bursts: Bursts) -> bool:
        if self._draw() < (bursts.end if self._bad else bursts.begin):
            self._bad = not self._bad
        share = bursts.loss_in_bad if self._bad else bursts.loss_in_good
        return bool(share) and self._draw() < share

    def _queue(self, size: int) -> int | None:
        """When the packet has left, or None if the queue is full."""
        now = self._world.now
        bandwidth = self._quality.bandwidth_bps
        free_at = max(self._free_at, now)
        waiting = (free_at - now) * bandwidth // (8 * NS)
        if waiting + size > self._quality.queue_bytes:
            return None
        self._free_at = free_at + size * 8 * NS // bandwidth
        return self._free_at

    def _flip(self, packet: Packet) -> None:
        packet.corrupted = True
        if packet.data:
            bit = int(self._draw() * 8 * len(packet.data))
            data = bytearray(packet.data)
            data[bit >> 3] ^= 1 << (bit & 7)
            packet.data = bytes(data)


class Link:
    """Both directions between two places: `there` and `back` (of an uplink: up and down; of a LAN:
    from the hosts and to the hosts)."""

    __slots__ = ("back", "name", "there")

    def __init__(self, world: World, name: str, quality: LinkQuality) -> None:
        self.name = name
        self.there = Pipe(world, f"{name} there", quality)
        self.back = Pipe(world, f"{name} back", quality)

    def change(self, quality: LinkQuality) -> None:
        """Both directions from now on; `link.there.quality = ...` for one."""
        self.there.quality = quality
        self.back.quality = quality
