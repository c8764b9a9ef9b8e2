"""`Secret`: a value that does not find its way into a log, an error, a trace or a file."""

from __future__ import annotations

import hmac
from typing import NoReturn

_HIDDEN = "Secret(…)"


class Secret:
    """Bytes (or text, kept as UTF-8) that must not be seen.

    It prints as `Secret(…)`, cannot be pickled, and is compared in constant time. Only `reveal`
    and `reveal_text` give the content away, so a search for them finds every use. Python cannot
    wipe it from memory when it is dropped.
    """

    __slots__ = ("_content",)

    def __init__(self, content: bytes | str) -> None:
        self._content = content.encode() if isinstance(content, str) else bytes(content)

    def reveal(self) -> bytes:
        """The content itself."""
        return self._content

    def reveal_text(self) -> str:
        """The content as text. Raises ValueError, without the content, if it is not UTF-8."""
        try:
            return self._content.decode()
        except UnicodeDecodeError:
            pass
        raise ValueError("the secret is not UTF-8 text")

    def matches(self, other: Secret | bytes | str) -> bool:
        """Equality in a time that depends only on the lengths."""
        if isinstance(other, str):
            other = other.encode()
        content = other._content if isinstance(other, Secret) else other
        return hmac.compare_digest(self._content, content)

    def __eq__(self, other: object) -> bool:
        return self.matches(other) if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        return _HIDDEN

    def __str__(self) -> str:
        return _HIDDEN

    def __format__(self, specification: str) -> str:
        return _HIDDEN

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a Secret has no state to give away")
