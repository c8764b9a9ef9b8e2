"""Which transport an agent tries, and when: cores.

QUIC is the better one and is tried first; WebSocket begins when QUIC has had its head start, and
the first whose handshake is complete is taken (`Race`). How long the head start is depends on what
worked on this network before (`TransportMemory`). Whoever is on WebSocket looks from time to time
whether QUIC works again, and goes on over it (`Return`).

`channel.dialer` drives them with sockets, the simulator with streams in virtual time. Times are
monotonic nanoseconds.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, Literal

import attrs

from channel.frames import PORTAL_FRAME_LIMIT, FrameDecoder, RemoteProtocolError
from channel.messages import Challenge
from runtime.clock import NS_PER_S
from runtime.randomness import Randomness

TransportName = Literal["quic", "websocket"]

ALPN: Final = "holloway/1"
PATH: Final = "/channel"
SUBPROTOCOL: Final = "holloway.1"
MAX_NETWORKS: Final = 32
GOING_ON: Final = "going on over QUIC"
"""Why an agent ends the connection that it leaves for QUIC."""


@attrs.frozen(kw_only=True)
class TransportOptions:
    """`websocket_after_ns` is QUIC's head start on a network that is not known;
    `websocket_after_known_quic_ns` where QUIC worked before: there the portal is more likely busy
    than UDP blocked. Where WebSocket worked last there is none. The first look for QUIC comes
    after `return_interval_ns`, each further one after twice as long up to `return_interval_cap_ns`,
    all of them jittered by half.
    """

    websocket_after_ns: int = NS_PER_S * 3 // 2
    websocket_after_known_quic_ns: int = 3 * NS_PER_S
    return_interval_ns: int = 30 * NS_PER_S
    return_interval_cap_ns: int = 600 * NS_PER_S


class TransportMemory:
    """What worked last on each network, of which the last MAX_NETWORKS are remembered. A network
    is known by the address that this machine has there: two that are taken for one cost a head
    start, no more."""

    def __init__(self, options: TransportOptions) -> None:
        self._options = options
        self._last_by_network: dict[str, TransportName] = {}

    def websocket_after_ns(self, network: str) -> int:
        """How long QUIC is to be alone in the race."""
        last = self._last_by_network.get(network)
        if last == "websocket":
            return 0
        if last == "quic":
            return self._options.websocket_after_known_quic_ns
        return self._options.websocket_after_ns

    def worked(self, network: str, transport: TransportName) -> None:
        self._last_by_network.pop(network, None)
        self._last_by_network[network] = transport
        while len(self._last_by_network) > MAX_NETWORKS:
            del self._last_by_network[next(iter(self._last_by_network))]


class Race:
    """Between the two transports to one address. QUIC begins at once, WebSocket after its head
    start of `websocket_after_ns`, or as soon as QUIC has failed; the first to be `opened` is taken.
    Whoever drives it starts what `begin` names, and calls off who has lost once there is a
    `winner`. (RFC 8305, Happy Eyeballs, has it so for address families.)"""

    def __init__(self, websocket_after_ns: int, now: int) -> None:
        self._begins_at: dict[TransportName, int] = {
            "quic": now,
            "websocket": now + websocket_after_ns,
        }
        self._running: list[TransportName] = []
        self.winner: TransportName | None = None
        self.problems: list[str] = []

    @property
    def is_over(self) -> bool:
        """Somebody has won, or nobody is left."""
        return self.winner is not None or not (self._begins_at or self._running)

    def poll_timeout(self) -> int | None:
        """When `begin` has one to name; None when both have begun, or it is over."""
        if self.winner is not None:
            return None
        return min(self._begins_at.values(), default=None)

    def begin(self, now: int) -> tuple[TransportName, ...]:
        """Those that are to begin now."""
        if self.winner is not None:
            return ()
        due = tuple(name for name, at in self._begins_at.items() if at <= now)
        for name in due:
            del self._begins_at[name]
            self._running.append(name)
        return due

    def opened(self, name: TransportName) -> bool:
        """Its handshake is complete. Whether it is the first."""
        if self.winner is not None or name not in self._running:
            return False
        self.winner = name
        return True

    def failed(self, name: TransportName, why: str, now: int) -> None:
        """It came to nothing: the other one waits no longer."""
        if self.winner is None and name in self._running:
            self._running.remove(name)
            self.problems.append(f"{name}: {why}")
            self._begins_at = dict.fromkeys(self._begins_at, now)


class ReturnTimes:
    """When to look for QUIC, from the beginning of a stay on WebSocket on."""

    def __init__(self, options: TransportOptions, randomness: Randomness) -> None:
        self._options = options
        self._randomness = randomness
        self._interval_ns = options.return_interval_ns

    def next_ns(self) -> int:
        """How long to wait before the next look."""
        interval_ns = self._interval_ns
        self._interval_ns = min(2 * interval_ns, self._options.return_interval_cap_ns)
        return interval_ns // 2 + self._randomness.integer(max(1, interval_ns))


class _Step(Enum):
    WAITING = auto()
    ASKING = auto()
    DIALLING = auto()
    LEAVING = auto()


class Return:
    """From WebSocket back to QUIC, beside a connection that stands:

        WAITING --begin--> ASKING --answered--> DIALLING --challenged--> LEAVING
           ^                  |                     |
           +---- no answer ---+------- failed ------+

    ASKING costs a datagram (`runtime.net.quic_probe`), DIALLING a handshake. In LEAVING, which has
    no way back, the older connection is ended in good order, and when the portal has answered to
    that, the agent joins over the new one, whose challenge has come. So the portal never sees two
    of one agent, and an attempt that comes to nothing costs nothing. What the step does not wait
    for is ignored.
    """

    def __init__(self, options: TransportOptions, randomness: Randomness, now: int) -> None:
        self._times = ReturnTimes(options, randomness)
        self._step = _Step.WAITING
        self._look_at = now + self._times.next_ns()

    @property
    def began(self) -> bool:
        """The older connection is left for the new one."""
        return self._step is _Step.LEAVING

    def poll_timeout(self) -> int | None:
        """When `begin` is due; None while one is under way."""
        return self._look_at if self._step is _Step.WAITING else None

    def hurry(self, now: int) -> None:
        """The network changed: look now, if no look is under way."""
        if self._step is _Step.WAITING:
            self._look_at = min(self._look_at, now)

    def begin(self, now: int) -> bool:
        """Whether to ask now."""
        if self._step is not _Step.WAITING or now < self._look_at:
            return False
        self._step = _Step.ASKING
        return True

    def answered(self, answers: bool, now: int) -> bool:
        """Whether QUIC answered the question, and so, whether to dial."""
        if self._step is _Step.ASKING:
            if answers:
                self._step = _Step.DIALLING
                return True
            self._wait(now)
        return False

    def challenged(self, data: bytes, now: int, *, older_stands: bool) -> bool:
        """The first bytes came over QUIC. Whether to leave the older connection now; not if it has
        ended by itself, nor if the portal begins otherwise than one that would take us in."""
        if self._step is not _Step.DIALLING:
            return False
        if older_stands and _is_challenge(data):
            self._step = _Step.LEAVING
            return True
        self._wait(now)
        return False

    def failed(self, now: int) -> None:
        """The connection over QUIC came to nothing."""
        if self._step is _Step.DIALLING:
            self._wait(now)

    def _wait(self, now: int) -> None:
        self._step = _Step.WAITING
        self._look_at = now + self._times.next_ns()


def is_left_behind(transport: TransportName, bound_to: str, network: str) -> bool:
    """Whether a connection from the address `bound_to` cannot follow this machine to `network`, the
    address that it has towards the portal now. QUIC can (RFC 9000, section 9)."""
    return transport == "websocket" and bound_to != network


def _is_challenge(data: bytes) -> bool:
    """Whether the portal begins like one that would take us in."""
    try:
        frame = FrameDecoder({"challenge": Challenge}, PORTAL_FRAME_LIMIT).feed(data)[0]
    except (RemoteProtocolError, IndexError):
        return False
    return isinstance(frame.message, Challenge)
