"""Listening sockets that cannot be opened, told so that an operator knows what to change."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_ADVICE: Final = {
    errno.EADDRINUSE: "another process has that port: end it, or set another",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "ports below 1024 need root or CAP_NET_BIND_SERVICE",
}


class CannotListen(OSError):
    """An address could not be bound. The text names the setting, the address and the reason."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def binding(setting: str, address: object) -> Iterator[None]:
    """Raise any OSError (or, for an address that is none, ValueError) of the block as a
    CannotListen that names the setting and the address."""
    try:
        yield
    except ValueError as error:
        raise CannotListen(errno.EINVAL, f"{setting}: {error}") from None
    except OSError as error:
        code = error.errno or 0
        reason = error.strerror or os.strerror(code)
        advice = f" ({_ADVICE[code]})" if code in _ADVICE else ""
        text = f"{setting}: cannot listen on {address}: {reason}{advice}"
        raise CannotListen(code, text) from None
