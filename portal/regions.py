"""Countries by address, from a database in MaxMind's format that the operator names.

Any database with `country.iso_code` will do (GeoLite2 or GeoIP2 Country and City, DB-IP Lite and
others). It is read into memory as a whole, so that a file which is replaced, cut short or removed
meanwhile harms nobody; `newer` and `take` bring a newer one in. Format: MaxMind DB, version 2.0.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from itertools import islice
from pathlib import Path
from typing import Final

import attrs
import maxminddb
import trio

from runtime.service import get_logger

MAX_BYTES = 512 * 1024 * 1024
"""The largest database that is read; those of countries have some 10 MB, of cities 60 MB."""
MAX_KEPT = 65_536
"""How many answers are kept for the next question."""
RECORDS_LOOKED_AT = 1_000
"""Within how many of its records a database has to name a country."""

CHECK_S: Final = 30.0
RETRY_S: Final = 1.0

log = get_logger("portal.regions")

_COUNTRY = re.compile(r"[A-Z]{2}")


class RegionsUnreadable(Exception):
    """The file is missing, is no region database, or is damaged; the text says which."""


@attrs.frozen(kw_only=True)
class RegionStatistics:
    """Of the database: kind and seconds since 1970 when it was built. Of the lookups: how many
    answers are kept, and how many were unknown because the file is damaged there."""

    kind: str
    built_at_s: int
    kept: int
    damaged: int


class RegionDatabase:
    """The countries of addresses (see `actors.policy.conditions.Regions`), from one file.

    A lookup costs tens of microseconds the first time, and is kept until another database is
    taken in. Not for use by several threads, but for `newer`.
    """

    def __init__(self, path: Path, *, max_kept: int = MAX_KEPT, max_bytes: int = MAX_BYTES) -> None:
        """Raises RegionsUnreadable."""
        self._path = path
        self._max_kept = max_kept
        self._max_bytes = max_bytes
        self._seen = _mark(path)
        self._reader = _opened(path, max_bytes)
        self._kept: OrderedDict[str, str | None] = OrderedDict()
        self._damaged = 0

    def country(self, address: str) -> str | None:
        """The country of an address, by ISO 3166-1 alpha-2; None if the database gives none."""
        if address in self._kept:
            self._kept.move_to_end(address)
            return self._kept[address]
        found = self._kept[address] = self._looked_up(address)
        if len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
        return found

    def newer(self) -> RegionDatabase | None:
        """The file at the path, if it is another than was last looked at. May run in a thread.

        Raises RegionsUnreadable, once for each such file.
        """
        mark = _mark(self._path)
        if mark == self._seen:
            return None
        self._seen = mark
        return RegionDatabase(self._path, max_bytes=self._max_bytes)

    def take(self, newer: RegionDatabase) -> None:
        """Answer from another database from now on. What depends on the answers has to be decided
        anew."""
        self._reader = newer._reader
        self._kept.clear()

    def statistics(self) -> RegionStatistics:
        """Which database it is, and how it is used."""
        metadata = self._reader.metadata()
        return RegionStatistics(
            kind=metadata.database_type,
            built_at_s=metadata.build_epoch,
            kept=len(self._kept),
            damaged=self._damaged,
        )

    def _looked_up(self, address: str) -> str | None:
        try:
            parsed = ip_address(address)
        except ValueError:
            return None
        if isinstance(parsed, IPv6Address):
            parsed = parsed.ipv4_mapped or parsed
        try:
            return _country_in(self._reader.get(parsed))
        except maxminddb.InvalidDatabaseError:
            self._damaged += 1
            return None
        except ValueError:  # an IPv6 address, and a database of IPv4 alone
            return None


async def follow(database: RegionDatabase, changed: Callable[[], bool]) -> None:
    """Take in each newer file within CHECK_S of its coming, for ever, and have `changed` tell it to
    all whom it concerns: again and again until it says that all have heard of it. One that cannot
    be read is logged, and the one before stays in use."""
    while True:
        await trio.sleep(CHECK_S)
        try:
            newer = await trio.to_thread.run_sync(database.newer)
        except RegionsUnreadable as error:
            log.error("region_database_unreadable", error=str(error))
            continue
        if newer is not None:
            database.take(newer)
            log.info("region_database_read", built_at_s=newer.statistics().built_at_s)
            while not changed():
                await trio.sleep(RETRY_S)


# --- helpers ---

_Mark = tuple[int, int, int]


def _mark(path: Path) -> _Mark | None:
    """What tells one file at a path from the next: inode, size and time; None without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _opened(path: Path, max_bytes: int) -> maxminddb.Reader:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise RegionsUnreadable(f"{path}: {size} bytes are more than a region database has")
        reader = maxminddb.open_database(path, maxminddb.MODE_MEMORY)
        records = islice(reader, RECORDS_LOOKED_AT)
        if not any(_country_in(record) for _, record in records):
            kind = reader.metadata().database_type
            raise RegionsUnreadable(f"{path}: a database of {kind} names no countries")
    except OSError as error:
        raise RegionsUnreadable(f"{path}: {error.strerror or error}") from error
    except (maxminddb.InvalidDatabaseError, ValueError) as error:
        raise RegionsUnreadable(f"{path}: no readable region database") from error
    return reader


def _country_in(record: object) -> str | None:
    country = record.get("country") if isinstance(record, dict) else None
    code = country.get("iso_code") if isinstance(country, dict) else None
    return code if isinstance(code, str) and _COUNTRY.fullmatch(code) else None
