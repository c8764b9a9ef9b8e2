"""TOML (version 1.0) as a person would write it, made from what JSON can say.

For declarations: tables and arrays of tables at the top; further down a table has a header of its
own only if there are tables in it. Null has no place in TOML: such keys are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

WIDTH: Final = 100
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES: Final = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"} | {
    '"': '\\"',
    "\\": "\\\\",
}
_ESCAPED: Final = re.compile('[\x00-\x1f\x7f-\x9f"\\\\\u2028-\u202e\u2066-\u2069\ud800-\udfff]')


def to_toml(document: Mapping[str, Any]) -> str:
    """The document as text. Raises TypeError for what has no form in TOML."""
    return "\n".join(_table(document, "")).lstrip("\n") + "\n"


def _table(table: Mapping[str, Any], path: str) -> Iterator[str]:
    """Values first, then tables, as TOML wants it."""
    tables = {name: each for name, each in table.items() if _has_header(each, is_top=not path)}
    for name, value in table.items():
        if name not in tables and value is not None:
            yield f"{_key(name)} = {_wrapped(value, len(name) + 3)}"
    for name, value in tables.items():
        inner = f"{path}.{_key(name)}" if path else _key(name)
        if isinstance(value, Mapping):
            yield from ("", f"[{inner}]", *_table(value, inner))
        else:
            for each in value:
                yield from ("", f"[[{inner}]]", *_table(each, inner))


def _has_header(value: object, *, is_top: bool) -> bool:
    if isinstance(value, Mapping):
        return is_top or any(isinstance(v, Mapping) or _are_tables(v) for v in value.values())
    return is_top and _are_tables(value)


def _are_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _wrapped(value: Any, indent: int) -> str:
    """A value on one line, or a list with a line for each of its own."""
    line = _inline(value)
    if isinstance(value, list) and len(line) + indent > WIDTH:
        return "[\n" + "".join(f"  {_inline(each)},\n" for each in value) + "]"
    return line


def _inline(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return '"' + _ESCAPED.sub(_escape, value) + '"'
        case list():
            return "[" + ", ".join(map(_inline, value)) + "]"
        case Mapping():
            pairs = (f"{_key(k)} = {_inline(v)}" for k, v in value.items() if v is not None)
            inside = ", ".join(pairs)
            return f"{{ {inside} }}" if inside else "{}"
    raise TypeError(f"{type(value).__name__} has no form in TOML")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _inline(name)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    return _ESCAPES.get(character, f"\\u{ord(character):04x}")
