"""What the parent of a relay's processes and its workers say to each other, as lines of JSON over a
socket that only they have. The stamp secret, passwords and the key of the certificate travel there
too, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec

from relays.settings import RelaySettings

MAX_LINE_BYTES: Final = 16 * 1024 * 1024
"""The longest is a `Setup` with all users that are revoked (relays.authentication.MAX_REVOKED)."""


class Inherited(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors of sockets that the parent opened and keeps: a listener as (host, port,
    descriptor), and what leads to siblings; `posts` has -1 for the worker itself."""

    listeners: list[tuple[str, int, int]]
    inbox: int
    posts: list[int]
    flows: int = -1
    """The map of the kernel's fast path; -1 without one."""


class ShownCertificate(msgspec.Struct, frozen=True, kw_only=True, tag="certificate"):
    """What TLS and QUIC show from now on: a chain and its key, in PEM."""

    chain: bytes
    key: bytes


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag="setup"):
    """The first thing a worker hears. `settings` are those of its share."""

    index: int
    slices: list[tuple[int, int]]
    settings: RelaySettings
    inherited: Inherited
    users: dict[str, str] | None
    stamp_secret: bytes
    relay_id: UUID | None
    revoked_until: dict[str, int]
    draining: bool
    certificate: ShownCertificate | None


class RelayKnown(msgspec.Struct, frozen=True, kw_only=True, tag="relay_known"):
    """The portal took the relay in under this id."""

    relay_id: UUID


class Revoke(msgspec.Struct, frozen=True, kw_only=True, tag="revoke"):
    """End what this user has; its names are void until then (Unix time)."""

    user: str
    until_unix_s: int


class DrainNow(msgspec.Struct, frozen=True, tag="drain"):
    """No new allocations."""


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """How it stands with a worker, twice a second."""

    allocations: int
    statistics: dict[str, int]
    transports: dict[str, dict[str, int | dict[str, int]]]
    """`relays.transports.statistics.TransportStatistics`, as dictionaries."""


ToWorker = Setup | RelayKnown | Revoke | DrainNow | ShownCertificate


def _encodable(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def _decoded(kind: type, value: Any) -> Path:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind.__name__)


_encoder = msgspec.json.Encoder(enc_hook=_encodable)
_to_worker = msgspec.json.Decoder(ToWorker, dec_hook=_decoded)
_from_worker = msgspec.json.Decoder(Report)


def encode(message: ToWorker | Report) -> bytes:
    return _encoder.encode(message) + b"\n"


def decode_to_worker(line: bytes) -> ToWorker:
    """Raises msgspec.MsgspecError."""
    message: ToWorker = _to_worker.decode(line)
    return message


def decode_from_worker(line: bytes) -> Report:
    """Raises msgspec.MsgspecError."""
    return _from_worker.decode(line)
