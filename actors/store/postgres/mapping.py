"""Entities to rows and back, derived from the attrs classes: a field is a column of its name.

What PostgreSQL has a type for is kept as such; tuples and nested classes are kept as jsonb. The
classes of addresses and networks travel by psycopg's own adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    LiteralString,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from uuid import UUID

import attrs
from psycopg.sql import SQL, Composable, Identifier

from actors.logs import LOG_KINDS, Log, LogKind
from actors.model import ENTITIES, Account, Authorization, Entity, EntityKind, Relay, Token
from actors.store.codec import from_json, to_json
from channel.messages import IpText

T = TypeVar("T")

_NATIVE = (
    UUID, str, bool, int, bytes, datetime, IPv4Address, IPv6Address, IPv4Network, IPv6Network,
    IpText,
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Column:
    """One field. `dump` makes the query's parameter, `load` the field's value of a row's value."""

    name: str
    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]


class Table(Generic[T]):
    """How one class is kept. `key` names the primary key's columns.

    All statements are rendered once, as bytes. `insert`, `append` (which leaves a row that is
    there as it is), `upsert` and `update` take the parameters that `row` and `changed_row` make;
    `delete` takes the account's and the row's id.
    """

    def __init__(self, name: str, as_type: type[T], key: Sequence[str]) -> None:
        hints = get_type_hints(as_type, include_extras=True)
        fields = [field.name for field in attrs.fields(as_type)]  # type: ignore[arg-type]  # T is an attrs class
        variable = [field for field in fields if field not in ("account_id", "id")]
        table, columns = Identifier(name), SQL(", ").join(map(Identifier, fields))
        self._type = as_type
        self._columns = [_column(field, hints[field]) for field in fields]
        self._several = {name for name in fields if _without_none(hints[name]) == tuple[UUID, ...]}
        self._columns_changed = [_column(field, hints[field]) for field in (*variable, *key)]
        self._select = SQL("SELECT {} FROM {}").format(columns, table)
        # The first parameter of every statement within one account.
        self._own = SQL("account_id = %s") if "account_id" in fields else SQL("id = %s")
        self.count = SQL("(SELECT count(*) FROM {} WHERE {})").format(table, self._own)
        self.count_own = SQL("SELECT {}").format(self.count).as_bytes()
        insert = SQL("INSERT INTO {} ({}) VALUES ({})").format(
            table, columns, SQL(", ").join(SQL("%s") for _ in fields)
        )
        self.insert = insert.as_bytes()
        self.append = SQL("{} ON CONFLICT DO NOTHING").format(insert).as_bytes()
        self.upsert = (
            SQL("{} ON CONFLICT ({}) DO UPDATE SET {}")
            .format(
                insert,
                SQL(", ").join(map(Identifier, key)),
                SQL(", ").join(SQL("{0} = excluded.{0}").format(Identifier(f)) for f in variable),
            )
            .as_bytes()
        )
        self.update = (
            SQL("UPDATE {} SET {} WHERE {}")
            .format(
                table,
                SQL(", ").join(SQL("{} = %s").format(Identifier(f)) for f in variable),
                SQL(" AND ").join(SQL("{} = %s").format(Identifier(f)) for f in key),
            )
            .as_bytes()
        )
        self.delete = SQL("DELETE FROM {} WHERE {} AND id = %s").format(table, self._own).as_bytes()

    def row(self, value: T) -> list[Any]:
        """The parameters of `insert` and `upsert`."""
        return [column.dump(getattr(value, column.name)) for column in self._columns]

    def changed_row(self, value: T) -> list[Any]:
        """The parameters of `update`."""
        return [column.dump(getattr(value, column.name)) for column in self._columns_changed]

    def value(self, row: Sequence[Any]) -> T:
        """What a row of `select` holds."""
        pairs = zip(self._columns, row, strict=True)
        return self._type(**{column.name: column.load(content) for column, content in pairs})

    @cache  # noqa: B019  # tables live as long as the module
    def select(self, condition: LiteralString) -> bytes:
        """A query by a condition, with an order or limit after it."""
        return SQL("{} WHERE {}").format(self._select, SQL(condition)).as_bytes()

    @cache  # noqa: B019
    def select_own(self, condition: LiteralString) -> bytes:
        """The same within one account, whose id is the first parameter."""
        return SQL("{} WHERE {} AND {}").format(self._select, self._own, SQL(condition)).as_bytes()

    @cache  # noqa: B019
    def select_own_by(self, field: str) -> bytes:
        """What of one account has a value in a field, by id. Parameters: account, value."""
        return self._select_own_where(SQL("{} = %s ORDER BY id").format(Identifier(field)))

    @cache  # noqa: B019
    def select_own_with(self, field: str) -> bytes:
        """What of one account has a value among others in a field, by id. Parameters: account,
        value."""
        return self._select_own_where(SQL("%s = ANY ({}) ORDER BY id").format(Identifier(field)))

    @cache  # noqa: B019
    def select_page(
        self, fields: tuple[str, ...], condition: LiteralString = "true", *, is_own: bool = True
    ) -> bytes:
        """A page, by id, of what has given values in these fields, or has them among others.

        Parameters: the account (unless not `is_own`), those of the condition, the values in the
        form of `parameters`, after, after, limit. Raises ValueError for a field that is none."""
        if unknown := set(fields) - {column.name for column in self._columns}:
            raise ValueError(f"no such fields: {sorted(unknown)}")
        has = [
            SQL("%s = ANY ({})" if field in self._several else "{} = %s").format(Identifier(field))
            for field in fields
        ]
        page = SQL("(%s::uuid IS NULL OR id > %s) ORDER BY id LIMIT %s")
        own = [self._own] if is_own else []
        wanted = SQL(" AND ").join([*own, SQL(condition), *has, page])
        return SQL("{} WHERE {}").format(self._select, wanted).as_bytes()

    def parameters(self, equals: Mapping[str, object]) -> list[Any]:
        """The values of `select_page`, in the order of the fields."""
        dump = {column.name: column.dump for column in self._columns}
        return [
            value if field in self._several else dump[field](value)
            for field, value in equals.items()
        ]

    @cache  # noqa: B019
    def select_log(self, fields: tuple[str, ...], bounds: tuple[LiteralString, ...]) -> bytes:
        """Rows of a log within one account that have given values in these fields and keep to the
        bounds, the newest first. Parameters: account, the values, those of the bounds, limit."""
        conditions = [SQL("{} = %s").format(Identifier(field)) for field in fields]
        conditions += [SQL("true").format(), *(SQL(bound).format() for bound in bounds)]
        order = SQL("{} ORDER BY id DESC, at DESC LIMIT %s")
        return self._select_own_where(order.format(SQL(" AND ").join(conditions)))

    def _select_own_where(self, condition: Composable) -> bytes:
        return SQL("{} WHERE {} AND {}").format(self._select, self._own, condition).as_bytes()


def _table(name: str, as_type: type[T]) -> Table[T]:
    names = {field.name for field in attrs.fields(as_type)}  # type: ignore[arg-type]  # T is an attrs class
    return Table(name, as_type, [key for key in ("account_id", "id") if key in names])


def _column(name: str, hint: Any) -> Column:
    plain = _without_none(hint)
    if plain is datetime:
        return Column(name=name, dump=_same, load=_optional(_in_utc))
    if plain is IpText:
        return Column(name=name, dump=_optional(str), load=_optional(_ip_text))
    if plain in _NATIVE or get_origin(plain) is Literal:
        return Column(name=name, dump=_same, load=_same)
    if plain == tuple[UUID, ...]:
        return Column(name=name, dump=list, load=tuple)
    return Column(
        name=name,
        dump=_optional(lambda value: to_json(value).decode()),
        load=_optional(lambda text: from_json(text, hint)),
    )


def _without_none(hint: Any) -> Any:
    """The type beneath Annotated, aliases and `| None`."""
    if get_origin(hint) is Annotated:
        return _without_none(get_args(hint)[0])
    if get_origin(hint) in (UnionType, Union):
        (member,) = (each for each in get_args(hint) if each is not NoneType)
        return _without_none(member)
    return hint


def _optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _same(value: Any) -> Any:
    return value


def _in_utc(instant: datetime) -> datetime:
    return instant.astimezone(UTC)


def _ip_text(address: IPv4Address | IPv6Address) -> IpText:
    return IpText(str(address))


TABLES: dict[EntityKind, Table[Entity]] = {
    kind: _table(kind, as_type) for kind, as_type in ENTITIES.items()
}
ACCOUNTS: Table[Account] = _table("account", Account)
TOKENS: Table[Token] = _table("token", Token)
AUTHORIZATIONS: Table[Authorization] = _table("authorization", Authorization)
RELAYS: Table[Relay] = _table("relay", Relay)
LOGS: dict[LogKind, Table[Log]] = {
    kind: _table(f"{kind}_log", as_type) for kind, as_type in LOG_KINDS.items()
}
COUNTS = (
    SQL("SELECT {}").format(SQL(", ").join(table.count for table in TABLES.values())).as_bytes()
)
"""How many rows each of TABLES has in one account, whose id is every parameter."""
