"""The compiled program as a file: what is read of it, and that a damaged one is refused."""

from __future__ import annotations

from random import Random

import pytest

from relays.fastpath.elf import InvalidObject, parse_object
from relays.fastpath.xdp import NAMES, OBJECT

DATA = OBJECT.read_bytes()


def test_the_object_has_its_program_its_maps_and_its_license() -> None:
    program = parse_object(DATA)
    maps = {one.name: (one.kind, one.key_bytes, one.value_bytes) for one in program.maps}
    assert maps == {"flows": (1, 40, 56), "devices": (1, 4, 4), "counts": (6, 4, 16)}
    [counts] = [one for one in program.maps if one.name == "counts"]
    assert counts.max_entries == len(NAMES)
    assert program.license == b"GPL"
    assert set(program.map_by_offset.values()) == maps.keys()
    assert len(DATA) < 20_000


def test_the_descriptors_of_maps_are_put_where_they_are_loaded() -> None:
    program = parse_object(DATA)
    linked = program.linked({"flows": 0x1234, "devices": 5, "counts": 6})
    assert len(linked) == len(program.instructions)
    for offset, name in program.map_by_offset.items():
        assert linked[offset + 1] >> 4 == 1
        if name == "flows":
            assert linked[offset + 4 : offset + 8] == b"\x34\x12\0\0"


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (b"", "cut short"),
        (DATA[:40], "cut short"),
        (b"\x7fELF\x01" + DATA[5:], "64 bits"),
        (DATA[:18] + b"\x3e\0" + DATA[20:], "64 bits"),
        (DATA[:-40], "cut short"),
        (DATA.replace(b"maps\0", b"mops\0"), "no section maps"),
        (DATA.replace(b"license\0", b"licence\0"), "no section license"),
        (DATA + bytes(1 << 20), "too large"),
    ],
)
def test_what_is_no_such_object_is_refused_with_the_reason(damaged: bytes, said: str) -> None:
    with pytest.raises(InvalidObject, match=said):
        parse_object(damaged)


def test_an_object_without_the_wanted_program_is_refused() -> None:
    with pytest.raises(InvalidObject, match="no section elsewhere"):
        parse_object(DATA, "elsewhere")


def test_damage_of_any_kind_is_refused_or_makes_another_program_but_nothing_else() -> None:
    luck = Random(6)
    refused = 0
    for _ in range(5_000):
        damaged = bytearray(DATA)
        for _ in range(luck.randint(1, 8)):
            damaged[luck.choice((luck.randrange(64), luck.randrange(6800, len(DATA))))] = (
                luck.randrange(256)
            )
        if luck.random() < 0.2:
            del damaged[luck.randrange(len(damaged)) :]
        try:
            program = parse_object(bytes(damaged))
        except InvalidObject:
            refused += 1
            continue
        names = {one.name for one in program.maps}
        assert set(program.map_by_offset.values()) <= names
        program.linked(dict.fromkeys(names, 1))
    assert refused > 1_000
