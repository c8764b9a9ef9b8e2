from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from actors.policy.conditions import Regions
from portal.node import open_regions
from portal.regions import CHECK_S, RETRY_S, RegionDatabase, RegionsUnreadable, follow
from portal.settings import SettingsError

from .mmdb import database

EUROPE = {
    "203.0.113.0/24": "DE",
    "198.51.100.0/25": "FR",
    "2001:db8::/32": "AT",
    "192.0.2.0/24": {"country": {"iso_code": "de"}},
    "192.0.3.0/24": {"continent": {"code": "EU"}},
    "192.0.4.0/24": {"country": "DE"},
}


def opened(path: Path, content: bytes) -> RegionDatabase:
    path.write_bytes(content)
    return RegionDatabase(path)


@pytest.mark.parametrize(
    ("address", "country"),
    [
        ("203.0.113.7", "DE"),
        ("::ffff:203.0.113.7", "DE"),
        ("198.51.100.127", "FR"),
        ("198.51.100.128", None),
        ("2001:db8:1::1", "AT"),
        ("2001:db9::1", None),
        ("192.0.2.1", None),  # no code of ISO 3166-1
        ("192.0.3.1", None),
        ("192.0.4.1", None),
        ("no address", None),
        ("", None),
    ],
)
def test_an_address_is_in_the_country_of_its_network(
    tmp_path: Path, address: str, country: str | None
) -> None:
    found: Regions = opened(tmp_path / "regions.mmdb", database(EUROPE))
    assert found.country(address) == country
    assert found.country(address) == country  # as it was kept


def test_a_database_of_ipv4_knows_no_country_of_other_addresses(tmp_path: Path) -> None:
    content = database({"203.0.113.0/24": "DE"}, ip_version=4)
    found = opened(tmp_path / "regions.mmdb", content)
    assert found.country("203.0.113.7") == "DE"
    assert found.country("2001:db8::1") is None
    assert found.country("::ffff:203.0.113.7") == "DE"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no readable region database"),
        (b"not a database", "no readable region database"),
        (database(EUROPE)[:-40], "no readable region database"),
        (database({"203.0.113.0/24": {"isp": "Example"}}, kind="Test-ISP"), "Test-ISP"),
        (database({}), "names no countries"),
    ],
)
def test_a_file_that_is_no_region_database_is_refused_with_its_name(
    tmp_path: Path, content: bytes, told: str
) -> None:
    path = tmp_path / "regions.mmdb"
    with pytest.raises(RegionsUnreadable, match=told) as caught:
        opened(path, content)
    assert str(path) in str(caught.value)


def test_a_file_that_is_missing_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(RegionsUnreadable, match="No such file"):
        RegionDatabase(tmp_path / "regions.mmdb")
    with pytest.raises(RegionsUnreadable, match="directory"):
        RegionDatabase(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "regions.mmdb"
    path.write_bytes(database(EUROPE))
    with pytest.raises(RegionsUnreadable, match="more than"):
        RegionDatabase(path, max_bytes=100)


def test_a_newer_file_is_taken_in_and_a_bad_one_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "regions.mmdb"
    found = opened(path, database({"203.0.113.0/24": "DE"}))
    assert found.country("203.0.113.7") == "DE"
    assert found.newer() is None
    replace(path, database({"203.0.113.0/24": "FR"}, built_at=1_800_000_000))
    newer = found.newer()
    assert newer is not None
    assert found.country("203.0.113.7") == "DE"
    found.take(newer)
    assert found.country("203.0.113.7") == "FR"
    assert found.statistics().built_at_s == 1_800_000_000
    replace(path, b"damaged")
    with pytest.raises(RegionsUnreadable):
        found.newer()
    assert found.newer() is None  # told once
    assert found.country("203.0.113.7") == "FR"
    path.unlink()
    with pytest.raises(RegionsUnreadable):
        found.newer()
    assert found.country("203.0.113.7") == "FR"


async def test_a_newer_file_is_taken_in_and_told_until_all_have_heard_of_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "regions.mmdb"
    found = opened(path, database({"203.0.113.0/24": "DE"}))
    told: list[tuple[float, str | None]] = []
    everybody = trio.Event()

    def changed() -> bool:
        told.append((trio.current_time(), found.country("203.0.113.7")))
        if len(told) == 3:
            everybody.set()
        return len(told) >= 3  # an account was too busy twice

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, found, changed)
        await trio.sleep(5 * CHECK_S)
        assert not told  # nothing new, nothing told
        replace(path, b"damaged")
        await trio.sleep(2 * CHECK_S)
        assert not told
        assert found.country("203.0.113.7") == "DE"
        replace(path, database({"203.0.113.0/24": "FR"}, built_at=1_800_000_000))
        came = trio.current_time()
        await everybody.wait()
        assert came - start >= 7 * CHECK_S
        assert told[0][0] - came <= CHECK_S
        assert [country for _, country in told] == ["FR"] * 3
        assert told[2][0] - told[0][0] == pytest.approx(2 * RETRY_S)
        await trio.sleep(3 * CHECK_S)
        assert len(told) == 3  # it is not told again
        nursery.cancel_scope.cancel()


def replace(path: Path, content: bytes) -> None:
    """Another file in its place, as those who fetch databases do."""
    other = path.with_suffix(".new")
    other.write_bytes(content)
    os.replace(other, path)


def test_a_place_where_the_file_is_damaged_is_unknown_and_counted(tmp_path: Path) -> None:
    content = database({"198.51.100.0/24": "DE", "203.0.113.0/24": "XK"})
    place = content.rindex(b"XK") - 1  # the kind and length of the code
    damaged = content[:place] + b"\x5f" + content[place + 1 :]
    found = opened(tmp_path / "regions.mmdb", damaged)
    assert found.country("203.0.113.7") is None
    assert found.country("198.51.100.1") == "DE"
    assert found.statistics().damaged == 1


def test_no_more_answers_are_kept_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "regions.mmdb"
    path.write_bytes(database(EUROPE))
    found = RegionDatabase(path, max_kept=3)
    for host in range(10):
        assert found.country(f"203.0.113.{host}") == "DE"
    assert found.statistics().kept == 3


def test_a_portal_does_not_start_without_the_database_that_is_named(tmp_path: Path) -> None:
    assert open_regions(None) is None
    with pytest.raises(SettingsError, match=r"region_database: .*regions\.mmdb"):
        open_regions(tmp_path / "regions.mmdb")
