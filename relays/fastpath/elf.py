"""Reads the compiled program: just as much of ELF as `clang -target bpf` writes (elf(5)).

An object has one section of instructions, one named `maps` with a definition of 20 bytes for each
map (type, size of keys and values, entries, flags), one named `license`, and relocations that say
which instruction means which map. Nothing in it is trusted: every offset is checked.
"""

from __future__ import annotations

from struct import Struct, error
from typing import Final

import attrs

MAX_OBJECT_BYTES: Final = 1 << 20
MAX_SECTIONS: Final = 64
MAX_INSTRUCTIONS: Final = 100_000
INSTRUCTION_BYTES: Final = 8

_HEADER: Final = Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = Struct("<IIQQQQIIQQ")
_SYMBOL: Final = Struct("<IBBHQQ")
_RELOCATION: Final = Struct("<QQ")
_MAP: Final = Struct("<5I")
_MAGIC: Final = b"\x7fELF\x02\x01\x01"
_RELOCATABLE: Final = 1
_MACHINE_BPF: Final = 247
_SYMBOL_TABLE: Final = 2
_RELOCATIONS: Final = 9
_R_BPF_64_64: Final = 1
_LOAD_64: Final = 0x18


class InvalidObject(ValueError):
    """This is not an object that this module reads; the message says what is wrong."""


@attrs.frozen(kw_only=True)
class MapDefinition:
    """What BPF_MAP_CREATE is told of a map."""

    name: str
    kind: int
    key_bytes: int
    value_bytes: int
    max_entries: int
    flags: int


@attrs.frozen(kw_only=True)
class ProgramObject:
    """`map_by_offset` maps the offset of an instruction (bytes) to the map that it loads."""

    instructions: bytes
    license: bytes
    maps: tuple[MapDefinition, ...]
    map_by_offset: dict[int, str]

    def linked(self, descriptor_by_map: dict[str, int]) -> bytes:
        """The instructions with the descriptors of the maps put in. Raises KeyError."""
        code = bytearray(self.instructions)
        for offset, name in self.map_by_offset.items():
            # the source register says what the number is: BPF_PSEUDO_MAP_FD
            code[offset + 1] = code[offset + 1] & 0x0F | 1 << 4
            code[offset + 4 : offset + 8] = descriptor_by_map[name].to_bytes(4, "little")
        return bytes(code)


@attrs.frozen
class _Section:
    name: str
    kind: int
    info: int
    link: int
    content: bytes


def parse_object(data: bytes, section: str = "xdp") -> ProgramObject:
    """The program in `section`, with its maps. Raises InvalidObject."""
    try:
        return _parse(data, section)
    except (error, IndexError, OverflowError, UnicodeDecodeError) as reason:
        raise InvalidObject(f"cut short or damaged: {reason}") from None


def _parse(data: bytes, wanted: str) -> ProgramObject:
    sections = _sections(data)
    index_by_name = {section.name: index for index, section in enumerate(sections)}
    for name in (wanted, "maps", "license"):
        if name not in index_by_name:
            raise InvalidObject(f"there is no section {name}")
    program = index_by_name[wanted]
    instructions = sections[program].content
    if not instructions or len(instructions) % INSTRUCTION_BYTES:
        raise InvalidObject("no whole number of instructions")
    if len(instructions) > MAX_INSTRUCTIONS * INSTRUCTION_BYTES:
        raise InvalidObject("too many instructions")
    symbols = next((one for one in sections if one.kind == _SYMBOL_TABLE), None)
    if symbols is None:
        raise InvalidObject("there is no symbol table")
    names = sections[symbols.link].content
    map_by_symbol = _maps(symbols, names, sections[index_by_name["maps"]], index_by_name["maps"])
    map_by_offset: dict[int, str] = {}
    for section in sections:
        if section.kind == _RELOCATIONS and section.info == program:
            _relocate(section.content, instructions, map_by_symbol, map_by_offset)
    return ProgramObject(
        instructions=instructions,
        license=sections[index_by_name["license"]].content.rstrip(b"\0"),
        maps=tuple(map_by_symbol.values()),
        map_by_offset=map_by_offset,
    )


def _sections(data: bytes) -> list[_Section]:
    if len(data) > MAX_OBJECT_BYTES:
        raise InvalidObject("too large")
    header = _HEADER.unpack_from(data)
    ident, kind, machine = header[:3]
    if not ident.startswith(_MAGIC) or kind != _RELOCATABLE or machine != _MACHINE_BPF:
        raise InvalidObject("no relocatable ELF object of 64 bits for BPF, little-endian")
    table, size, count, names_index = header[6], header[11], header[12], header[13]
    if size != _SECTION.size or not 0 < count <= MAX_SECTIONS:
        raise InvalidObject("no section table that is understood")
    raw = [_SECTION.unpack_from(data, table + index * size) for index in range(count)]
    contents = []
    for one in raw:
        start, length = (0, 0) if one[1] == 0 else (one[4], one[5])
        if start + length > len(data):
            raise InvalidObject("a section reaches beyond the end")
        contents.append(data[start : start + length])
    names = contents[names_index]
    return [
        _Section(_string(names, one[0]), one[1], one[7], one[6], content)
        for one, content in zip(raw, contents, strict=True)
    ]


def _maps(
    symbols: _Section, names: bytes, section: _Section, section_index: int
) -> dict[int, MapDefinition]:
    """By the number of their symbol."""
    found = {}
    for number in range(len(symbols.content) // _SYMBOL.size):
        name, _, _, index, value, size = _SYMBOL.unpack_from(symbols.content, number * _SYMBOL.size)
        if index != section_index or size != _MAP.size:
            continue
        kind, key_bytes, value_bytes, max_entries, flags = _MAP.unpack_from(section.content, value)
        found[number] = MapDefinition(
            name=_string(names, name),
            kind=kind,
            key_bytes=key_bytes,
            value_bytes=value_bytes,
            max_entries=max_entries,
            flags=flags,
        )
    return found


def _relocate(
    content: bytes,
    instructions: bytes,
    map_by_symbol: dict[int, MapDefinition],
    map_by_offset: dict[int, str],
) -> None:
    for start in range(0, len(content), _RELOCATION.size):
        offset, info = _RELOCATION.unpack_from(content, start)
        definition = map_by_symbol.get(info >> 32)
        if info & 0xFFFFFFFF != _R_BPF_64_64 or definition is None:
            raise InvalidObject("a relocation that is not of a map")
        is_aligned = offset % INSTRUCTION_BYTES == 0
        if not is_aligned or offset + 2 * INSTRUCTION_BYTES > len(instructions):
            raise InvalidObject("a relocation outside of the instructions")
        if instructions[offset] != _LOAD_64:
            raise InvalidObject("a relocation of something else than a 64-bit load")
        map_by_offset[offset] = definition.name


def _string(table: bytes, offset: int) -> str:
    end = table.index(b"\0", offset) if b"\0" in table[offset:] else -1
    if end < 0:
        raise InvalidObject("a name without an end")
    return table[offset:end].decode("ascii")
