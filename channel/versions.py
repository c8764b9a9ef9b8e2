"""Versions of the protocol: which a portal speaks, and what each of them carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from channel.messages import OLDEST_VERSION, PROTOCOL_VERSION


@attrs.frozen(kw_only=True)
class Spoken:
    """Every version from `oldest` to `newest`. `kinds` are those of resources, by version."""

    oldest: int
    newest: int
    kinds: Mapping[int, frozenset[str]]

    def agreed(self, versions: tuple[int, int]) -> int | None:
        """The highest version that an agent which speaks these (inclusive) has in common."""
        first, last = versions
        version = min(last, self.newest)
        return version if version >= max(first, self.oldest) else None

    def carried(self, version: int) -> frozenset[str]:
        """The kinds of resources that agents of a version carry; they are told of no others. A
        version that is newer (agreed by a newer node) counts as the newest that is known here."""
        return self.kinds[min(version, self.newest)]


SPOKEN: Final = Spoken(
    oldest=OLDEST_VERSION, newest=PROTOCOL_VERSION, kinds={1: frozenset({"cidr", "ip"})}
)
"""What this release speaks."""
