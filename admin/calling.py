"""One command carried out: its flags become a call, the answer is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from uuid import UUID, uuid4

import attrs
import msgspec
from cyclopts import Parameter

from admin.asking import ask, is_somebody_here
from admin.connection import Connection, Profile, profile_path, read_profile
from admin.description import Description, Field, Operation, description
from admin.failures import FAILED, Failure, usage
from admin.names import Names, items_of
from admin.output import TABLES, Format, Label, show_event, show_many, show_one
from admin.safety import printable
from runtime.service import SecretUnavailable, read_secret

DEFAULT_LIMIT: Final = 100
MAX_ITEMS: Final = 1_000_000
MAX_FILE_BYTES: Final = 4 << 20
NULL: Final = "null"
KEY_HEADER: Final = "Idempotency-Key"
FORMATS: Final = ("table", "wide", "json", "yaml")


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class Common:
    """Where to, and how to print. Each has a variable, and but for the output a key of a profile.

    Parameters
    ----------
    portal
        Of the portal, `host:port`; by default what the token says.
    ca
        File of the certificate authority (PEM); by default the one that the token pins.
    token_file
        File with the token, mode 0600; else HOLLOWAY_TOKEN_FILE or HOLLOWAY_TOKEN.
    account
        Account to act on, by slug or id. Operators need it.
    profile
        Profile of ~/.config/holloway/admin.toml.
    output
        How to print.
    """

    portal: Annotated[str, Parameter(env_var="HOLLOWAY_ADMIN_PORTAL")] = ""
    ca: Annotated[Path | None, Parameter(env_var="HOLLOWAY_ADMIN_CA")] = None
    token_file: Path | None = None
    account: Annotated[str, Parameter(env_var="HOLLOWAY_ADMIN_ACCOUNT")] = ""
    profile: Annotated[str, Parameter(env_var="HOLLOWAY_ADMIN_PROFILE")] = ""
    output: Annotated[
        Literal["table", "wide", "json", "yaml"] | None,
        Parameter(name=["--output", "-o"], env_var="HOLLOWAY_ADMIN_OUTPUT"),
    ] = None


@attrs.frozen(kw_only=True)
class Session:
    """An open connection, and what belongs to one command."""

    connection: Connection
    names: Names
    format: Format
    description: Description

    @classmethod
    @contextmanager
    def open(cls, common: Common) -> Iterator[Session]:
        """From the flags and the profile. Raises Failure."""
        kept = read_profile(common.profile, profile_path())
        if kept.output and kept.output not in FORMATS:
            raise usage(f"the profile's output is none of {', '.join(FORMATS)}")
        format: Any = common.output or kept.output or "table"
        profile = Profile(
            portal=common.portal or kept.portal,
            ca=common.ca or kept.ca,
            token_file=common.token_file or kept.token_file,
        )
        with Connection.open(profile) as connection, connection.understood():
            names = Names(connection, description())
            account = common.account or kept.account
            if account:
                # A name is looked up as no account's business; the header follows after.
                connection.account_id = names.id_of("accounts", account, "--account")
            yield cls(connection=connection, names=names, format=format, description=description())

    def label(self, field: Field, value: str) -> str:
        """What a table has instead of an id."""
        by, _, id = value.partition(" ")
        if field.name == "who" and by == "token":
            return f"token {self.names.labels('tokens').get(id, id)}"
        if field.refers is None or not _is_id(value):
            return value
        return self.names.labels(field.refers).get(value, value)

    @property
    def labels(self) -> Label:
        return self.label


def carry_out(
    operation: Operation, common: Common, path: Sequence[str], flags: Mapping[str, Any]
) -> None:
    """Call, and print the answer. `flags` are the values that were given, by the names of fields,
    with `data`, `limit`, `all` and `if_match` beside them. Raises Failure."""
    with Session.open(common) as session:
        values = {
            field.name: session.names.id_of(field.refers, text) if field.refers else text
            for field, text in zip(operation.parameters, path, strict=True)
        }
        url = operation.url(values)
        if operation.is_stream:
            _watch(session, url, flags)
        elif operation.is_list:
            _list(session, operation, url, flags)
        else:
            _call(session, operation, url, flags)


def _call(session: Session, operation: Operation, url: str, flags: Mapping[str, Any]) -> None:
    headers = {}
    is_repeatable = operation.is_question
    if KEY_HEADER in operation.headers:
        headers[KEY_HEADER] = str(uuid4())
        is_repeatable = True
    if flags.get("if_match"):
        headers["If-Match"] = _tag(flags["if_match"])
    doomed = None
    if operation.verb == "delete":
        doomed = _doomed(session, operation, url)
        if is_somebody_here() and not flags.get("yes"):
            ask(f"Delete {doomed.title}, with all that refers to it?")
    answer = session.connection.call(
        operation.method,
        url,
        query=_query(session, operation, flags),
        body=_body(session, operation, flags),
        headers=headers,
        again=is_repeatable,
        flags={field.name: field.flag for field in (*(operation.body or ()), *operation.query)},
    )
    if flags.get("print_etag"):
        print(printable(answer.headers.get("etag", "")))  # noqa: T201
    elif answer.content:
        show_one(answer.json(), operation.columns, session.format, session.labels)
    elif doomed is not None:
        _show_deleted(session, doomed)


@attrs.frozen
class _Doomed:
    """What is about to be deleted, as it is. `title` is for people."""

    title: str
    item: Mapping[str, Any]
    columns: tuple[Field, ...]


def _doomed(session: Session, operation: Operation, url: str) -> _Doomed:
    """Raises Failure if it is not there."""
    noun, id = _singular(operation.noun), url.rpartition("/")[2]
    get = session.description.operation(operation.noun, "get")
    if get is None:
        return _Doomed(printable(f"{noun} {id}"), {"id": id}, ())
    item = session.connection.call("get", url, again=True).json()
    name = item.get("name") or item.get("description")
    title = f"{noun} {name} ({id})" if name else f"{noun} {id}"
    return _Doomed(printable(title), item, get.columns)


def _singular(noun: str) -> str:
    words = noun.replace("_", " ")
    return f"{words.removesuffix('ies')}y" if words.endswith("ies") else words.removesuffix("s")


def _show_deleted(session: Session, doomed: _Doomed) -> None:
    if session.format in TABLES:
        print(f"deleted: {doomed.title}")  # noqa: T201
    else:
        show_one(doomed.item, doomed.columns, session.format, session.labels)


def _list(session: Session, operation: Operation, url: str, flags: Mapping[str, Any]) -> None:
    most = MAX_ITEMS if flags.get("all") else flags.get("limit") or DEFAULT_LIMIT
    query = _query(session, operation, flags)
    found = list(
        items_of(session.connection, url, query, most=most + 1, is_paged=operation.is_paged)
    )
    show_many(found[:most], operation.columns, session.format, session.labels)
    if len(found) > most:
        sys.stderr.write(f"there are more than these {most}: see --limit and --all\n")


def _watch(session: Session, url: str, flags: Mapping[str, Any]) -> None:
    headers = {"accept": "text/event-stream"}
    if flags.get("after"):
        headers["Last-Event-ID"] = str(flags["after"])
    with session.connection.stream(url, headers) as lines:
        for event in events_of(lines):
            show_event(event, session.format)
            if event["event"] == "end":
                raise Failure(FAILED, "the portal has ended the stream; start it again")


def events_of(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Server-sent events (WHATWG HTML, 9.2) as dictionaries of `event`, `id` and `data`."""
    name, id = "message", ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield {"event": name, "id": id, "data": _json_or_text("\n".join(data))}
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "id":
            id = value
        elif field == "data":
            data.append(value)


def _query(session: Session, operation: Operation, flags: Mapping[str, Any]) -> dict[str, str]:
    given = {
        field.name: flags[field.name]
        for field in operation.query
        if flags.get(field.name) is not None
    }
    fields = {field.name: field for field in operation.query}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in session.names.filled(fields, given).items()
    }


def _body(session: Session, operation: Operation, flags: Mapping[str, Any]) -> Any:
    """`--data`, and over it the fields that have a flag of their own."""
    if operation.body is None:
        return None
    body: dict[str, Any] = {}
    if flags.get("data"):
        read = read_json(flags["data"], "--data")
        if not isinstance(read, dict):
            raise usage("--data: an object is wanted")
        body = read
    for field in operation.body:
        value = flags.get(field.name)
        if value is not None:
            body[field.name] = _value(field, value)
    missing = [f.flag for f in operation.body if f.required and f.name not in body]
    if missing:
        raise usage(f"{', '.join(missing)}: needed; see --help")
    return session.names.filled({field.name: field for field in operation.body}, body)


def _value(field: Field, value: Any) -> Any:
    if field.is_secret:
        return read_secret_file(value, field.flag)
    if field.nullable and value == NULL:
        return None
    if field.kind == "json" and not field.many:
        return read_json(value, field.flag)
    if field.kind in ("integer", "number") and isinstance(value, str):
        try:
            return int(value) if field.kind == "integer" else float(value)
        except ValueError:
            raise usage(f"{field.flag}: a number is wanted") from None
    if field.kind == "boolean" and isinstance(value, str):
        return value == "true"
    return list(value) if isinstance(value, tuple) else value


def read_secret_file(path: str, flag: str) -> str | None:
    """The secret in a private file; `null` stands for none. Raises Failure."""
    if path == NULL:
        return None
    try:
        return read_secret(file=path).reveal_text()
    except (SecretUnavailable, ValueError) as error:
        raise usage(f"{flag}: {error}") from None


def read_json(text: str, flag: str) -> Any:
    """JSON itself, or `@file`, or `-` for the standard input. Raises Failure."""
    try:
        if text == "-":
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        elif text.startswith("@"):
            with open(text[1:], "rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        else:
            content = text.encode()
    except OSError as error:
        raise usage(f"{flag}: {text[1:]}: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise usage(f"{flag}: more than {MAX_FILE_BYTES} bytes")
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise usage(f"{flag}: no JSON; write JSON, or @file") from None


def _json_or_text(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _tag(text: str) -> str:
    return text if text == "*" or text.startswith(('"', "W/")) else f'"{text}"'


def _is_id(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
