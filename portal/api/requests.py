"""What comes in: bodies decoded strictly, and checks that a type alone cannot make.

A body type is a frozen `msgspec.Struct` that forbids unknown fields; in the body of an update
every field may be absent (`UNSET`), which means "leave it". Nothing is coerced: `"1"` is no
number and `1` no text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from litestar.dto import AbstractDTO
from msgspec import UNSET, Meta, Struct

from actors.store.validity import is_dns_pattern
from channel.reserved import RESERVED
from portal.api.misfits import misfits
from portal.api.problems import FieldError, Problem, invalid
from portal.api.wording import refused_field

if TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator
    from litestar.openapi.spec import Reference, Schema
    from litestar.typing import FieldDefinition

Network = IPv4Network | IPv6Network
Instant = Annotated[
    datetime, Meta(tz=True, description="An instant with its offset, such as 2027-01-31T09:00:00Z.")
]
SecretText = Annotated[
    str,
    Meta(min_length=1, max_length=4_096, description="Write-only: kept sealed, never shown."),
]
Cidrs = Annotated[tuple[Annotated[str, Meta(max_length=49)], ...], Meta(max_length=100)]

EARLIEST: Final = datetime(2000, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(2200, 1, 1, tzinfo=UTC)

NEVER_A_RESOURCE: Final = (
    *RESERVED,
    *(
        ("resolver and name", ip_network(network))
        for network in ("100.96.0.0/11", "100.100.111.0/24", "fd48:4c57:5901::/64")
    ),
)
"""Networks that no resource may touch, apart from the account's own tunnel ranges."""

MAX_DNS_NAME: Final = 253

_HOST_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every body."""


def changes_of(update: Body) -> dict[str, Any]:
    """The fields that the body of an update names, with their values."""
    return {
        name: value
        for name in update.__struct_fields__
        if (value := getattr(update, name)) is not UNSET
    }


def decode_body(content: bytes, body_type: Any) -> Any:
    """The body as `body_type`. Raises Problem: 400 for what is not JSON, 422 for what does not
    fit, with the path of every field that was refused."""
    try:
        try:
            return msgspec.json.decode(content, type=body_type)
        except msgspec.ValidationError as error:
            found = misfits(msgspec.json.decode(content), body_type)
            raise invalid(*(found or (refused_field(str(error)),))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Problem(
            400, "malformed_json", "The body is not JSON (UTF-8). Check its quotes and braces."
        ) from None


class StrictBody(AbstractDTO[Any]):
    """Has Litestar decode `data` with `decode_body` instead of its own lenient conversion."""

    model_type = object

    def decode_bytes(self, value: bytes) -> Any:
        field = self.asgi_connection.route_handler.parsed_data_field
        return decode_body(value, field.annotation)

    @classmethod
    def create_for_field_definition(
        cls, field_definition: FieldDefinition, handler_id: str, backend_cls: Any = None
    ) -> None:
        """Nothing to prepare: the annotation itself is what msgspec decodes."""

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: SchemaCreator
    ) -> Reference | Schema:
        return schema_creator.for_field_definition(field_definition)

    @classmethod
    def generate_field_definitions(cls, model_type: type[Any]) -> Iterator[Any]:  # type: ignore[override]  # Litestar says Generator
        return iter(())

    @classmethod
    def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:
        return False


class Checks:
    """Collects what is wrong with the fields of one body, so that a caller learns it all at once.

    Each check returns the canonical value, or the given one if it was refused; `finish` raises
    the Problem.
    """

    def __init__(self) -> None:
        self._errors: list[FieldError] = []

    def refuse(self, field: str, message: str) -> None:
        self._errors.append(FieldError(field=field, message=message))

    def finish(self) -> None:
        if self._errors:
            raise invalid(*self._errors)

    def network(self, field: str, text: str) -> str:
        """A network in canonical form; an address alone is a network of one."""
        network = self._network(field, text)
        return text if network is None else str(network)

    def networks(self, field: str, texts: Iterable[str]) -> tuple[str, ...]:
        """Networks in canonical form, without repetition."""
        found = (self.network(f"{field}[{i}]", text) for i, text in enumerate(texts))
        return tuple(dict.fromkeys(found))

    def address(self, field: str, text: str) -> str:
        """A single address in canonical form."""
        network = self._network(field, text)
        if network is None:
            return text
        if network.num_addresses != 1:
            self.refuse(field, f"{text} is a network; an address alone is wanted")
        return str(network.network_address)

    def name_pattern(self, field: str, text: str) -> str:
        """A pattern of DNS names in lower case; see `validity.is_dns_pattern`."""
        pattern = text.lower()
        if not is_dns_pattern(pattern):
            self.refuse(
                field,
                "must be a name or a pattern such as *.example.org, in ASCII, without a final dot,"
                " the top-level label without wildcards",
            )
        return pattern

    def host(self, field: str, text: str | None) -> str | None:
        """A DNS name in lower case, without wildcards."""
        if text is None:
            return None
        name = text.lower()
        if len(name) > MAX_DNS_NAME or not all(map(_HOST_LABEL.fullmatch, name.split("."))):
            self.refuse(field, "must be a name such as corp.example.org, with no final dot")
        return name

    def resource_address(self, field: str, text: str, own: Mapping[str, Iterable[Network]]) -> None:
        """Refuses networks that no resource may touch (an address or a canonical network), `own`
        being the account's, by name."""
        try:
            network = ip_network(text)
        except ValueError:
            return  # refused already
        if network.prefixlen == 0:
            self.refuse(field, "the default route is no resource; name the networks themselves")
            return
        forbidden = [*NEVER_A_RESOURCE, *((name, each) for name in own for each in own[name])]
        for name, taken in forbidden:
            if taken.version == network.version and network.overlaps(taken):
                self.refuse(field, f"{network} touches the {name} range {taken}")
                return

    def instant(self, field: str, instant: datetime) -> datetime:
        """An instant in UTC, within the years in which every time zone has a calendar."""
        if not EARLIEST <= instant <= LATEST:
            self.refuse(field, f"must lie between {EARLIEST.year} and {LATEST.year}")
            return EARLIEST
        return instant.astimezone(UTC)

    def future(self, field: str, instant: datetime | None, now: datetime) -> datetime | None:
        """An instant after now, in UTC."""
        if instant is None:
            return None
        try:
            instant = instant.astimezone(UTC)
        except OverflowError:
            self.refuse(field, "is beyond the calendar")
            return None
        if instant <= now:
            self.refuse(field, f"must lie in the future; it is {now:%Y-%m-%dT%H:%M:%SZ} now")
        return instant

    def _network(self, field: str, text: str) -> Network | None:
        host, _, length = text.partition("/")
        try:
            address = ip_address(host)
            if isinstance(address, IPv6Address) and address.scope_id is not None:
                self.refuse(field, "an address with a scope id means nothing to another machine")
                return None
            if length and not (length.isascii() and length.isdigit()):
                raise ValueError
            network = ip_network(text, strict=False)
        except ValueError:
            self.refuse(field, "must be a network such as 10.1.0.0/16 or 2001:db8::/32")
            return None
        if network.network_address != address:
            self.refuse(field, f"{text} has bits set below its prefix; did you mean {network}?")
            return None
        return network


def canonical_source(text: str) -> IPv4Address | IPv6Address | None:
    """The address of a caller as text, IPv4-mapped forms undone; None for what is no address."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
