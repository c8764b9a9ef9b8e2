"""What every Holloway process needs around its work: logs, health, secrets from outside.

Metrics and the HTTP endpoints that show health are in `runtime.observe`, the local control socket
in `runtime.control`.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog

from runtime.observe import Health, make_registry, serve_observability
from runtime.secret import Secret

__all__ = [
    "Health",
    "SecretUnavailable",
    "configure_logging",
    "get_logger",
    "make_private_directory",
    "make_registry",
    "read_secret",
    "serve_observability",
]

MAX_SECRET_BYTES: Final = 16_384

_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_ESCAPES: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


class SecretUnavailable(Exception):
    """A secret could not be read. Says where it was looked for, never what was found."""


# --- logs --------------------------------------------------------------------------------------


def configure_logging(
    format: Literal["text", "json"] = "text",
    level: Literal["debug", "info", "warning", "error"] = "info",
) -> None:
    """Log to stderr from now on: lines of text for people, or one JSON object a line.

    A `Secret` prints as one in both, wherever it stands in a value. Control characters never
    reach the terminal. Libraries that use Python's own logging are heard from `warning` on, in
    the same form (aioquic from `error` on, since strangers can make it warn; psycopg too, which
    raises what it warns of).
    """
    _configure(format, level)
    logging.basicConfig(level=logging.WARNING, handlers=[_Libraries()], force=True)
    for library in ("quic", "psycopg"):
        logging.getLogger(library).setLevel(logging.ERROR)


class _Libraries(logging.Handler):
    """Has what libraries log by Python's own logging go the way of our lines."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(component=record.name).log(
            record.levelno, "library_message", text=record.getMessage(), exc_info=record.exc_info
        )


def get_logger(name: str, **values: object) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `component=name` and `values`. Call it as
    `log.info("what_happened", key=value)`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(component=name, **values)
    return logger


def _configure(format: str, level: str) -> None:
    renderer: structlog.typing.Processor
    if format == "json":
        renderer = structlog.processors.JSONRenderer(serializer=_to_json)
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=28)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _make_plain,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        # The stream is looked up for each line, since it may be replaced.
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _make_plain(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Reduce every value to what both renderers show the same way."""
    for key, value in event.items():
        event[key] = _plain(value)
    return event


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if value.isprintable() else _escape(value)
    if isinstance(value, Secret):
        return repr(value)
    if isinstance(value, Mapping):
        return {_escape(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return _escape(str(value))


def _escape(text: str) -> str:
    """Newlines stay (tracebacks have them), other control characters become visible."""
    return "\n".join(line.translate(_ESCAPES) for line in text.split("\n"))


def _to_json(event: object, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


# --- secrets from outside ----------------------------------------------------------------------


def read_secret(
    *,
    file: str | os.PathLike[str] | None = None,
    value: str | None = None,
    credential: str | None = None,
) -> Secret:
    """A secret from the first of these that is given: a file, a value (of an environment
    variable), a systemd credential (a file of that name in $CREDENTIALS_DIRECTORY).

    White space at both ends is dropped. A file must be a regular one that neither group nor
    others of the machine may read or write, and of this user or root: 0600 or stricter (a
    credential's mode is systemd's own affair). At most 16 KiB. Raises SecretUnavailable.
    """
    if file is not None:
        return _read_file(Path(file), private=True)
    if value:
        return Secret(value.strip())
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if credential is not None and directory is not None:
        if "/" in credential or credential in ("", ".", ".."):
            raise SecretUnavailable("a credential's name has no slash")
        return _read_file(Path(directory) / credential, private=False)
    raise SecretUnavailable("neither a file, nor a value, nor a systemd credential is given")


def has_credential(name: str) -> bool:
    """Whether systemd gave this process a credential of this name."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    return directory is not None and os.path.exists(os.path.join(directory, name))


def make_private_directory(path: Path) -> None:
    """Make a directory for files that decide what this process does, and those above it.

    One that is there already has to be of this user (or root), and nobody else may write to it:
    whoever may could put files of his own in the place of ours. Raises OSError.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, "the directory belongs to another user", str(path))
    if status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "others may write to the directory", str(path))


def _read_file(path: Path, *, private: bool) -> Secret:
    try:
        with open(path, "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SecretUnavailable(f"{path} is not a regular file")
            if private and status.st_uid not in (0, os.geteuid()):
                raise SecretUnavailable(f"{path} belongs to another user")
            if private and status.st_mode & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise SecretUnavailable(f"{path} is open to others ({mode:04o}): chmod 0600")
            content = opened.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise SecretUnavailable(f"{path}: {error.strerror}") from None
    if len(content) > MAX_SECRET_BYTES:
        raise SecretUnavailable(f"{path} is larger than {MAX_SECRET_BYTES} B")
    if not content.strip():
        raise SecretUnavailable(f"{path} is empty")
    return Secret(content.strip())


# structlog's own default writes to stdout and shows the local variables of a failure, secrets
# included: no process shall meet it, not even before it has configured its logs.
if not structlog.is_configured():
    _configure("text", "info")
