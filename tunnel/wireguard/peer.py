"""One WireGuard peer: its key pairs, its timers, and the packets that wait for a session.

Three key pairs live side by side (whitepaper, section 6.3, and the kernel's noise.c). `current`
is the one to send on. `next` is what this device derived as responder; it becomes `current` with
the first packet that authenticates under it, since only then has the initiator confirmed it.
`previous` still receives what was under way when the keys changed.

The timers (section 6) are a dictionary of instants. Each timer is set by something that happened
and cleared by what it waited for:

    retransmit      an initiation went out          -> a response came: handshake complete
    new_handshake   data went out                   -> anything authentic came back
    keepalive       data came in                    -> anything authentic went out
    persistent      anything authentic, both ways   -> always set again
    wipe            a session was derived           -> a newer session was derived

A peer decides nothing about addresses: `PeerHost.transmit` takes what is to be sent to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, Protocol

import attrs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from runtime.randomness import Randomness
from tunnel.packet import packet_length
from tunnel.wireguard.cookies import CookieJar
from tunnel.wireguard.noise import (
    MESSAGE_TRANSPORT,
    TAG_BYTES,
    TIMESTAMP_BYTES,
    TRANSPORT_HEADER_BYTES,
    HandshakeError,
    Initiation,
    ReceivedInitiation,
    SessionKeys,
    StaticKey,
    exchange,
    initiate,
    tai64n,
)
from tunnel.wireguard.replay import WINDOW_BITS, ReplayWindow

SECOND_NS = 10**9
REKEY_AFTER_MESSAGES = 2**60
REJECT_AFTER_MESSAGES = 2**64 - WINDOW_BITS - 1
REKEY_AFTER_TIME_NS = 120 * SECOND_NS
REJECT_AFTER_TIME_NS = 180 * SECOND_NS
REKEY_ATTEMPT_TIME_NS = 90 * SECOND_NS
REKEY_TIMEOUT_NS = 5 * SECOND_NS
REKEY_JITTER_NS = SECOND_NS // 3
KEEPALIVE_TIMEOUT_NS = 10 * SECOND_NS
MAX_ATTEMPTS = REKEY_ATTEMPT_TIME_NS // REKEY_TIMEOUT_NS
# A flood of valid initiations of one peer is answered at most this often (kernel: 50/s).
INITIATION_INTERVAL_NS = SECOND_NS // 50
# Timestamps are rounded down to this, so that they tell little about the sender's clock.
TIMESTAMP_GRAIN_NS = 2**24
MAX_STAGED_PACKETS = 128
PADDING_BYTES = 16
NEVER_NS = 2**63

Timer = Literal["retransmit", "new_handshake", "keepalive", "persistent", "wipe"]
_HEADER = MESSAGE_TRANSPORT.to_bytes(4, "little")
_NONCE_PREFIX = bytes(4)


@attrs.frozen(kw_only=True)
class SessionEstablished:
    """Packets can now be sent to this peer; also reported for each renewal of the keys."""

    peer_key: Hashable


@attrs.frozen(kw_only=True)
class SessionExpired:
    """The last keys were wiped, 540 s after they were made; the next packet starts anew."""

    peer_key: Hashable


@attrs.frozen(kw_only=True)
class HandshakeFailed:
    """No answer in 90 s of attempts; the packets that waited were dropped."""

    peer_key: Hashable


Event = SessionEstablished | SessionExpired | HandshakeFailed


@attrs.frozen(kw_only=True)
class PeerStatistics:
    """Bytes are those of inner packets; `established_ns` is when the current keys were made."""

    sent_packets: int
    sent_bytes: int
    received_packets: int
    received_bytes: int
    staged_packets: int
    dropped_packets: int
    established_ns: int | None


class PeerHost(Protocol):
    """What a peer needs of its device."""

    def allocate_index(self, peer: Peer, holder: KeyPair | None) -> int: ...
    def assign_index(self, index: int, peer: Peer, holder: KeyPair | None) -> None: ...
    def release_index(self, index: int) -> None: ...
    def transmit(self, peer: Peer, datagram: bytes) -> None: ...
    def report(self, event: Event) -> None: ...
    def wake(self, peer: Peer) -> None: ...


class KeyPair:
    """The two keys of one session. `counter` has this one owner, and rises before sealing."""

    __slots__ = (
        "_receiving",
        "_sending",
        "_window",
        "born_ns",
        "counter",
        "is_initiator",
        "local_index",
        "remote_index",
    )

    def __init__(
        self,
        keys: SessionKeys,
        *,
        local_index: int,
        remote_index: int,
        is_initiator: bool,
        now: int,
    ) -> None:
        self._sending: ChaCha20Poly1305 | None = keys.sending
        self._receiving: ChaCha20Poly1305 | None = keys.receiving
        self._window = ReplayWindow()
        self.counter = 0
        self.local_index = local_index
        self.remote_index = remote_index.to_bytes(4, "little")
        self.is_initiator = is_initiator
        self.born_ns = now

    def usable(self, now: int, messages: int = 1) -> bool:
        """Whether the limits of REJECT_AFTER_TIME and REJECT_AFTER_MESSAGES allow sending."""
        return (
            self._sending is not None
            and now - self.born_ns < REJECT_AFTER_TIME_NS
            and self.counter + messages <= REJECT_AFTER_MESSAGES
        )

    def seal_all(self, padded: Sequence[bytes]) -> list[bytes]:
        """A transport message for each packet. The caller asked `usable` for as many first."""
        assert self._sending is not None
        encrypt, head = self._sending.encrypt, _HEADER + self.remote_index
        first = self.counter
        self.counter += len(padded)  # before anything can fail: no counter is ever used twice
        messages = []
        for number, packet in enumerate(padded, first):
            counter = number.to_bytes(8, "little")
            messages.append(head + counter + encrypt(_NONCE_PREFIX + counter, packet, None))
        return messages

    def open_all(self, messages: Iterable[bytes], now: int) -> list[bytes]:
        """The padded packets of those transport messages that are not forged, too old or seen
        before, in order."""
        if self._receiving is None or now - self.born_ns >= REJECT_AFTER_TIME_NS:
            return []
        decrypt, accept = self._receiving.decrypt, self._window.accept
        opened = []
        for message in messages:
            counter_bytes = message[8:TRANSPORT_HEADER_BYTES]
            counter = int.from_bytes(counter_bytes, "little")
            if counter >= REJECT_AFTER_MESSAGES:
                continue
            try:
                padded = decrypt(
                    _NONCE_PREFIX + counter_bytes, message[TRANSPORT_HEADER_BYTES:], None
                )
            except InvalidTag:
                continue
            if accept(counter):
                opened.append(padded)
        return opened

    def forget(self) -> None:
        """Let go of the keys (their bytes are the library's to free)."""
        self._sending = self._receiving = None


class Peer:
    """The state towards one remote public key. All methods are of the owning device."""

    def __init__(
        self,
        *,
        key: Hashable,
        host: PeerHost,
        static: StaticKey,
        public_key: bytes,
        preshared_key: bytes,
        keepalive_ns: int | None,
        mtu: int,
        timestamp_offset_ns: int,
        randomness: Randomness,
    ) -> None:
        self.key = key
        self.public_key = public_key
        self.wake_ns = NEVER_NS
        self.cookies = CookieJar(public_key)
        self.static_static = exchange(static.private, public_key)
        self._host = host
        self._static = static
        self._preshared_key = preshared_key
        self._keepalive_ns = keepalive_ns
        self._mtu = mtu
        self._timestamp_offset_ns = timestamp_offset_ns
        self._randomness = randomness
        self._timers: dict[Timer, int] = {}
        self._staged: deque[bytes] = deque()
        self._current: KeyPair | None = None
        self._previous: KeyPair | None = None
        self._next: KeyPair | None = None
        self._initiation: Initiation | None = None
        self._initiated_ns: int | None = None
        self._attempts = 0
        self._sent_timestamp_ns = 0
        self._received_timestamp = bytes(TIMESTAMP_BYTES)
        self._received_initiation_ns: int | None = None
        self._another_keepalive = False
        self._last_minute_handshake = False
        self._counts = [0, 0, 0, 0, 0]

    # --- sending -------------------------------------------------------------------------------

    def send(self, packets: Sequence[bytes], now: int) -> None:
        """Seal inner packets, or stage them and ask for a session. Empty ones: keepalives."""
        pair = self._current
        if pair is None or not pair.usable(now, len(packets)):
            for packet in packets:
                self._stage(packet)
            self.initiate(now)
            return
        self._transmit(pair, packets, now)
        if pair.counter >= REKEY_AFTER_MESSAGES or (
            pair.is_initiator and now - pair.born_ns >= REKEY_AFTER_TIME_NS
        ):
            self.initiate(now)

    def initiate(self, now: int) -> None:
        """Start a handshake, unless one was started within REKEY_TIMEOUT."""
        if self._initiated_ns is not None and now - self._initiated_ns < REKEY_TIMEOUT_NS:
            return
        self._attempts = 0
        self._send_initiation(now)

    # --- receiving -----------------------------------------------------------------------------

    def receive_initiation(self, received: ReceivedInitiation, now: int) -> bool:
        """Answer an initiation that names this peer; False if it proves nothing or is a replay."""
        timestamp = received.timestamp(self.static_static)
        if timestamp <= self._received_timestamp:
            return False
        last_ns = self._received_initiation_ns
        if last_ns is not None and now - last_ns < INITIATION_INTERVAL_NS:
            return False
        self._received_timestamp = timestamp
        self._received_initiation_ns = now
        local_index = self._host.allocate_index(self, None)
        message, keys = received.respond(
            preshared_key=self._preshared_key,
            ephemeral=self._randomness.bytes(32),
            sender_index=local_index,
        )
        pair = KeyPair(
            keys,
            local_index=local_index,
            remote_index=received.remote_index,
            is_initiator=False,
            now=now,
        )
        self._host.assign_index(local_index, self, pair)
        self._drop(self._next)
        self._drop(self._previous)
        self._next, self._previous = pair, None
        self._authentic_received(now)
        self._initiated_ns = now
        self._host.transmit(self, self.cookies.stamp(message, now))
        self._session_derived(now)
        self._authentic_sent(now)
        return True

    def receive_response(self, message: bytes, now: int) -> bool:
        """Complete the handshake in progress; raises HandshakeError for a forged response."""
        initiation = self._initiation
        if initiation is None:
            return False
        remote_index, keys = initiation.finish(message)
        self._initiation = None
        pair = KeyPair(
            keys,
            local_index=initiation.sender_index,
            remote_index=remote_index,
            is_initiator=True,
            now=now,
        )
        self._host.assign_index(initiation.sender_index, self, pair)
        self._drop(self._previous)
        if self._next is not None:
            self._drop(self._current)
            self._previous, self._next = self._next, None
        else:
            self._previous = self._current
        self._current = pair
        self._authentic_received(now)
        self._session_derived(now)
        self._handshake_complete()
        if not self._staged:
            self._staged.append(b"")  # the responder waits for a packet that confirms the keys
        self._flush(now)
        return True

    def receive_transports(
        self, pair: KeyPair, messages: Iterable[bytes], now: int
    ) -> tuple[int, list[bytes]]:
        """How many of these transport messages, all for `pair`, were accepted, and their inner
        packets in order (none for a keepalive)."""
        opened = pair.open_all(messages, now)
        if not opened:
            return 0, []
        if pair is self._next:
            self._drop(self._previous)
            self._previous, self._current, self._next = self._current, pair, None
            self._handshake_complete()
            self._flush(now)
        self._authentic_received(now)
        self._renew_before_rejection(now)
        packets = []
        carrying = 0
        for padded in opened:
            if not padded:
                continue
            carrying += 1
            length = packet_length(padded)
            if length is None:
                self._counts[4] += 1
                continue
            self._counts[3] += length
            packets.append(padded if length == len(padded) else padded[:length])
        self._counts[2] += len(packets)
        for _ in range(min(carrying, 2)):  # the first sets a timer, any further one is noted
            self._data_received(now)
        return len(opened), packets

    def owns_initiation(self, index: int) -> bool:
        """Whether `index` names the handshake that this peer waits on."""
        return self._initiation is not None and self._initiation.sender_index == index

    # --- timers --------------------------------------------------------------------------------

    def handle_timeout(self, now: int) -> None:
        """Act on every timer that is due, then ask to be woken for the next."""
        for timer in sorted(self._timers, key=lambda timer: self._timers[timer]):
            # One that fires may clear another, or set it for later.
            if self._timers.get(timer, NEVER_NS) <= now:
                del self._timers[timer]
                self._fire(timer, now)
        self.wake_ns = min(self._timers.values(), default=NEVER_NS)
        if self.wake_ns < NEVER_NS:
            self._host.wake(self)

    def close(self) -> None:
        """Give every index back and forget every key."""
        self._forget_initiation()
        self._forget_pairs()
        self._staged.clear()
        self._timers.clear()
        self.wake_ns = NEVER_NS
        self._preshared_key = self.static_static = b""

    def statistics(self) -> PeerStatistics:
        sent, sent_bytes, received, received_bytes, dropped = self._counts
        return PeerStatistics(
            sent_packets=sent,
            sent_bytes=sent_bytes,
            received_packets=received,
            received_bytes=received_bytes,
            staged_packets=len(self._staged),
            dropped_packets=dropped,
            established_ns=None if self._current is None else self._current.born_ns,
        )

    def _fire(self, timer: Timer, now: int) -> None:
        if timer == "retransmit":
            self._retransmit(now)
        elif timer == "new_handshake":
            self.initiate(now)
        elif timer == "keepalive":
            self._send_keepalive(now)
            if self._another_keepalive:
                self._another_keepalive = False
                self._set("keepalive", now + KEEPALIVE_TIMEOUT_NS)
        elif timer == "persistent":
            self._send_keepalive(now)
        else:
            self._wipe()

    def _retransmit(self, now: int) -> None:
        if self._attempts < MAX_ATTEMPTS:
            self._attempts += 1
            self._send_initiation(now)
            return
        self._forget_initiation()
        self._counts[4] += len(self._staged)
        self._staged.clear()
        if "wipe" not in self._timers:
            self._set("wipe", now + 3 * REJECT_AFTER_TIME_NS)
        self._host.report(HandshakeFailed(peer_key=self.key))

    def _wipe(self) -> None:
        had_keys = self._current is not None or self._next is not None
        self._forget_initiation()
        self._forget_pairs()
        self._timers.pop("retransmit", None)
        if had_keys:
            self._host.report(SessionExpired(peer_key=self.key))

    def _set(self, timer: Timer, at: int) -> None:
        self._timers[timer] = at
        if at < self.wake_ns:
            self.wake_ns = at
            self._host.wake(self)

    def _jitter(self) -> int:
        return self._randomness.integer(REKEY_JITTER_NS)

    def _authentic_sent(self, now: int) -> None:
        self._timers.pop("keepalive", None)
        self._traversal(now)

    def _authentic_received(self, now: int) -> None:
        self._timers.pop("new_handshake", None)
        self._traversal(now)

    def _traversal(self, now: int) -> None:
        if self._keepalive_ns:
            self._set("persistent", now + self._keepalive_ns)

    def _data_sent(self, now: int) -> None:
        if "new_handshake" not in self._timers:
            wait_ns = KEEPALIVE_TIMEOUT_NS + REKEY_TIMEOUT_NS + self._jitter()
            self._set("new_handshake", now + wait_ns)

    def _data_received(self, now: int) -> None:
        if "keepalive" in self._timers:
            self._another_keepalive = True
        else:
            self._set("keepalive", now + KEEPALIVE_TIMEOUT_NS)

    def _session_derived(self, now: int) -> None:
        self._set("wipe", now + 3 * REJECT_AFTER_TIME_NS)

    def _handshake_complete(self) -> None:
        self._timers.pop("retransmit", None)
        self._attempts = 0
        self._last_minute_handshake = False
        self._host.report(SessionEstablished(peer_key=self.key))

    def _renew_before_rejection(self, now: int) -> None:
        """An initiator that only receives renews its keys shortly before they expire."""
        pair = self._current
        margin_ns = KEEPALIVE_TIMEOUT_NS + REKEY_TIMEOUT_NS
        if (
            pair is None
            or self._last_minute_handshake
            or not pair.is_initiator
            or now - pair.born_ns < REJECT_AFTER_TIME_NS - margin_ns
        ):
            return
        self._last_minute_handshake = True
        self.initiate(now)

    # --- helpers -------------------------------------------------------------------------------

    def _send_initiation(self, now: int) -> None:
        self._forget_initiation()
        index = self._host.allocate_index(self, None)
        try:
            self._initiation, message = initiate(
                static=self._static,
                remote_public=self.public_key,
                static_static=self.static_static,
                preshared_key=self._preshared_key,
                ephemeral=self._randomness.bytes(32),
                timestamp=self._timestamp(now),
                sender_index=index,
            )
        except HandshakeError:
            self._host.release_index(index)
            return
        self._initiated_ns = now
        self._host.transmit(self, self.cookies.stamp(message, now))
        self._authentic_sent(now)
        self._set("retransmit", now + REKEY_TIMEOUT_NS + self._jitter())

    def _timestamp(self, now: int) -> bytes:
        rounded = (now + self._timestamp_offset_ns) // TIMESTAMP_GRAIN_NS * TIMESTAMP_GRAIN_NS
        self._sent_timestamp_ns = max(rounded, self._sent_timestamp_ns + 1)
        return tai64n(self._sent_timestamp_ns)

    def _transmit(self, pair: KeyPair, packets: Sequence[bytes], now: int) -> None:
        mtu = self._mtu
        padded = [
            packet if not len(packet) % PADDING_BYTES else _padded(packet, mtu)
            for packet in packets
        ]
        for message in pair.seal_all(padded):
            self._host.transmit(self, message)
        self._authentic_sent(now)
        carrying = sum(1 for packet in packets if packet)
        if carrying:
            self._counts[0] += carrying
            self._counts[1] += sum(map(len, packets))
            self._data_sent(now)

    def _send_keepalive(self, now: int) -> None:
        if self._staged:
            self.initiate(now)
        else:
            self.send((b"",), now)

    def _stage(self, packet: bytes) -> None:
        if not packet and self._staged:
            return
        if len(self._staged) >= MAX_STAGED_PACKETS:
            self._staged.popleft()
            self._counts[4] += 1
        self._staged.append(packet)

    def _flush(self, now: int) -> None:
        staged, self._staged = self._staged, deque()
        if staged:
            self.send(tuple(staged), now)

    def _drop(self, pair: KeyPair | None) -> None:
        if pair is not None:
            self._host.release_index(pair.local_index)
            pair.forget()

    def _forget_initiation(self) -> None:
        if self._initiation is not None:
            self._host.release_index(self._initiation.sender_index)
            self._initiation.forget()
            self._initiation = None

    def _forget_pairs(self) -> None:
        for pair in (self._current, self._previous, self._next):
            self._drop(pair)
        self._current = self._previous = self._next = None


def _padded(packet: bytes, mtu: int) -> bytes:
    length = len(packet)
    wanted = min((length + PADDING_BYTES - 1) & -PADDING_BYTES, mtu)
    return packet if wanted <= length else packet + bytes(wanted - length)


def sealed_length(packet_bytes: int, mtu: int) -> int:
    """The bytes of the UDP payload that carries an inner packet of `packet_bytes`."""
    padded = max(packet_bytes, min((packet_bytes + PADDING_BYTES - 1) & -PADDING_BYTES, mtu))
    return TRANSPORT_HEADER_BYTES + padded + TAG_BYTES
