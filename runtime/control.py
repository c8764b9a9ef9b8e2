"""The local control socket of a daemon: one JSON object a line, a question and an answer.

Whoever may ask is decided by the kernel: the socket is 0600, and SO_PEERCRED names the user at
the far end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from runtime.service import get_logger, make_private_directory

MAX_REQUEST_BYTES: Final = 65_536
MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
MAX_CONNECTIONS: Final = 32
REQUEST_TIMEOUT_NS: Final = 60 * 10**9

_NS_PER_S: Final = 10**9
_RECEIVE_BYTES: Final = 65_536
_PEER_CREDENTIALS: Final = struct.Struct("3i")

log = get_logger("control")

Handler = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]


class ControlUnavailable(Exception):
    """Nobody answers at the socket, or not in the agreed form: is the daemon running?"""


async def serve_control(
    path: str | os.PathLike[str],
    handler: Handler,
    *,
    allowed_uids: Collection[int],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests at a Unix socket, for ever.

    The socket (0600) replaces one that a dead process left behind; its directory is made, 0700,
    where it does not exist. A peer whose user is not among `allowed_uids` is sent away unheard.
    Each line is given to `handler` as a dictionary, and what it returns is the answer; a handler
    that raises answers `{"error": ...}` and is logged. Raises OSError, in particular when
    another process answers at the path.
    """
    path = Path(path)
    make_private_directory(path.parent)
    listener = _bind(path)
    slots = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            if _peer_uid(stream) not in allowed_uids:
                log.warning("control_refused", uid=_peer_uid(stream))
                return
            try:
                slots.acquire_nowait()
            except trio.WouldBlock:
                return
            try:
                await _answer_lines(stream, handler)
            finally:
                slots.release()

    try:
        async with trio.SocketListener(trio.socket.from_stdlib_socket(listener)) as accepting:
            task_status.started()
            await trio.serve_listeners(handle, [accepting])
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


async def ask_control_async(
    path: str | os.PathLike[str], request: Mapping[str, Any]
) -> dict[str, Any]:
    """As `ask_control`, within trio."""
    return await trio.to_thread.run_sync(ask_control, path, request, abandon_on_cancel=True)


def ask_control(
    path: str | os.PathLike[str],
    request: Mapping[str, Any],
    *,
    timeout_ns: int = REQUEST_TIMEOUT_NS,
) -> dict[str, Any]:
    """Send one request and return its answer. Waits for `timeout_ns` at most.

    Raises ControlUnavailable, PermissionError when the socket may not be opened.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(timeout_ns / _NS_PER_S)
            asking.connect(os.fspath(path))
            asking.sendall(msgspec.json.encode(request) + b"\n")
            answer = bytearray()
            while not answer.endswith(b"\n"):
                piece = asking.recv(_RECEIVE_BYTES)
                if not piece or len(answer) > MAX_ANSWER_BYTES:
                    raise ControlUnavailable(f"{path}: no answer")
                answer += piece
        return msgspec.json.decode(answer, type=dict[str, Any])
    except PermissionError:
        raise
    except (OSError, msgspec.MsgspecError) as error:
        raise ControlUnavailable(f"{path}: {error}") from None


# --- helpers -----------------------------------------------------------------------------------


def _bind(path: Path) -> socket.socket:
    """A listening socket at `path`, 0600 from its first moment."""
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path)
        old_mask = os.umask(0o177)
        try:
            raw.bind(os.fspath(path))
        finally:
            os.umask(old_mask)
        raw.listen(MAX_CONNECTIONS)
        raw.setblocking(False)
        return raw
    except BaseException:
        raw.close()
        raise


def _remove_stale(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.EADDRINUSE, "something that is not a socket is there", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another process answers there", str(path))


def _peer_uid(stream: trio.SocketStream) -> int:
    credentials = stream.socket.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size
    )
    _pid, uid, _gid = _PEER_CREDENTIALS.unpack(credentials)
    return int(uid)


async def _answer_lines(stream: trio.SocketStream, handler: Handler) -> None:
    buffer = bytearray()
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            line, newline, rest = bytes(buffer).partition(b"\n")
            if newline:
                buffer = bytearray(rest)
                await stream.send_all(await _answer(line, handler))
                continue
            if len(buffer) > MAX_REQUEST_BYTES:
                await stream.send_all(_encode({"error": "the request is too large"}))
                return
            with trio.move_on_after(REQUEST_TIMEOUT_NS / _NS_PER_S) as waiting:
                data = await stream.receive_some(_RECEIVE_BYTES)
            if waiting.cancelled_caught or not data:
                return
            buffer += data


async def _answer(line: bytes, handler: Handler) -> bytes:
    try:
        request = msgspec.json.decode(line, type=dict[str, Any])
    except (ValueError, RecursionError):
        return _encode({"error": "the request is not a JSON object"})
    try:
        return _encode(await handler(request))
    except Exception as error:
        log.error("control_request_failed", exc_info=True)
        return _encode({"error": f"internal error: {type(error).__name__}"})


def _encode(answer: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(answer, enc_hook=str) + b"\n"
