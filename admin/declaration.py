"""`holloway admin export`, `diff` and `apply`: the account as one file (see docs/admin.md)."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from rich.text import Text

from admin.asking import ask, is_somebody_here
from admin.calling import KEY_HEADER, Common, Session
from admin.failures import FAILED, REFUSED, Failure, usage
from admin.output import TABLES, console, show_one, to_second
from admin.safety import printable
from admin.toml import to_toml
from runtime.service import SecretUnavailable, read_secret

PATH: Final = "/v1/declaration"
MAX_FILE_BYTES: Final = 16 << 20
SECRET_FIELDS: Final = ("client_secret", "credentials")
MARKS: Final = {"create": ("+", "green"), "update": ("~", "yellow"), "delete": ("-", "red")}
HEAD: Final = """\
# The account as declared: `holloway admin diff -f FILE`, `holloway admin apply -f FILE`.
# A section that is left out is left alone; see docs/admin.md.

"""


def export(common: Common, file: Path | None) -> None:
    """Write the account's declaration, to a file or the standard output. Raises Failure."""
    with Session.open(common) as session:
        declared = session.connection.call("get", PATH, again=True).json()
    if common.output in ("json", "yaml"):
        show_one(declared, (), common.output, _as_it_is)
        return
    text = HEAD + to_toml(declared)
    if file is None:
        sys.stdout.write(text)
        return
    try:
        file.write_text(text)
    except OSError as error:
        raise Failure(FAILED, f"{file}: {error.strerror}") from None


def plan(common: Common, file: Path) -> dict[str, Any]:
    """What an apply would do; printed, and returned. Raises Failure."""
    with Session.open(common) as session:
        planned = _planned(session, read_declaration(file))
        _show(planned, session)
        return planned


def apply(common: Common, file: Path, *, is_dry: bool, confirm: bool) -> None:
    """Make the account as the file says. Raises Failure.

    Who confirms sees the plan first; and if the account has changed since then, nothing is done.
    """
    declared = read_declaration(file)
    with Session.open(common) as session:
        planned = _planned(session, declared)
        if is_dry or session.format in TABLES:
            _show(planned, session)
        if is_dry and planned["failing_tests"]:
            raise Failure(REFUSED, "policy tests would fail, so this would be refused")
        if is_dry or (not planned["steps"] and session.format in TABLES):
            return
        if confirm and planned["steps"]:
            if not is_somebody_here():
                raise usage("nobody is here to ask: look at --dry-run, then give --yes")
            ask("Apply this?")
        done = session.connection.call(
            "post",
            f"{PATH}/apply",
            body={"declaration": declared, "number": planned["number"]},
            headers={KEY_HEADER: str(uuid4())},
            again=True,
        ).json()
        if session.format in TABLES:
            sys.stderr.write(f"applied: the account is at change {done['number']} now\n")
        else:
            show_one(done, (), session.format, _as_it_is)


def _planned(session: Session, declared: Mapping[str, Any]) -> dict[str, Any]:
    body = {"declaration": declared}
    answer = session.connection.call("post", f"{PATH}/plan", body=body, again=True)
    return dict(answer.json())


def _show(planned: Mapping[str, Any], session: Session) -> None:
    if session.format in TABLES:
        show_plan(planned)
    else:
        show_one(planned, (), session.format, _as_it_is)


def _as_it_is(_: object, value: str) -> str:
    return value


# --- reading -------------------------------------------------------------------------------------


def read_declaration(file: Path) -> dict[str, Any]:
    """A declaration from TOML (or JSON, by the name's end; `-` is the standard input), with its
    secrets in their places. Raises Failure."""
    try:
        if str(file) == "-":
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with file.open("rb") as opened:
                content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise usage(f"{file}: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise usage(f"{file}: more than {MAX_FILE_BYTES} bytes")
    try:
        text = content.decode()
        read = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise usage(f"{file}: cannot be read: {printable(str(error))}") from None
    if not isinstance(read, dict):
        raise usage(f"{file}: no declaration")
    return {name: _settled(value, name, file.parent) for name, value in read.items()}


def _settled(value: Any, path: str, folder: Path) -> Any:
    """With times as texts and secrets in their places."""
    match value:
        case dict():
            return {
                name: _secret(each, f"{path}.{name}", folder)
                if name in SECRET_FIELDS
                else _settled(each, f"{path}.{name}", folder)
                for name, each in value.items()
            }
        case list():
            return [_settled(each, f"{path}[{i}]", folder) for i, each in enumerate(value)]
        case datetime() | date() | time():
            return value.isoformat()
        case _:
            return value


def _secret(reference: Any, path: str, folder: Path) -> str:
    """What `{ env = "NAME" }` or `{ file = "path" }` means. Raises Failure, never with a secret."""
    match reference:
        case {"env": str(name), **rest} if not rest:
            if not os.environ.get(name):
                raise usage(f"{path}: the variable {name} is not set")
            return os.environ[name].strip()
        case {"file": str(name), **rest} if not rest:
            try:
                return read_secret(file=folder / Path(name).expanduser()).reveal_text()
            except (SecretUnavailable, ValueError) as error:
                raise usage(f"{path}: {error}") from None
    raise usage(
        f'{path}: a secret is not written here; write {{ env = "NAME" }} or {{ file = "path" }}'
    )


# --- showing -------------------------------------------------------------------------------------


def show_plan(planned: Mapping[str, Any]) -> None:
    """Print a plan: a line for each thing, one for each of its fields; then who gains and loses."""
    out = console()
    steps = planned["steps"]
    for step in steps:
        mark, colour = MARKS[step["action"]]
        title = printable(f"{mark} {step['kind'].replace('_', ' ')} {step['name']}")
        because = f"  (goes with {printable(step['because'])})" if step.get("because") else ""
        out.print(Text(title, style=colour) + Text(because, style="dim"))
        if step["action"] != "delete":
            for field in step.get("fields", ()):
                for line in _field_lines(field):
                    out.print(Text("    " + line))
    access = planned.get("access") or {}
    for word, colour in (("gained", "green"), ("lost", "red")):
        for each in access.get(word, ()):
            out.print(Text(f"{word}: {_access(each)}", style=colour))
    if access and not access["complete"]:
        out.print("more people gain or lose something than are named here")
    for name in planned.get("failing_tests", ()):
        out.print(Text(f"this test would fail, so it is refused: {printable(name)}", style="red"))
    if not steps:
        out.print("no difference")
        return
    counts = {action: sum(step["action"] == action for step in steps) for action in MARKS}
    words = {"create": "to make", "update": "to change", "delete": "to remove"}
    out.print(", ".join(f"{counts[action]} {words[action]}" for action in MARKS))


def _field_lines(field: Mapping[str, Any]) -> Iterator[str]:
    name, before, after = printable(field["field"]), field.get("before"), field.get("after")
    if isinstance(before, list) and isinstance(after, list):
        yield f"{name}:"
        yield from (f"  - {_value(each)}" for each in before if each not in after)
        yield from (f"  + {_value(each)}" for each in after if each not in before)
    elif before is None:
        yield f"{name}: {_value(after)}"
    else:
        yield f"{name}: {_value(before)} -> {_value(after)}"


def _value(value: Any) -> str:
    if value is None:
        return "(default)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return printable(text)


def _access(each: Mapping[str, Any]) -> str:
    until = f", until {to_second(each['until'])}" if each.get("until") else ""
    since = to_second(each["since"])
    return printable(f"{each['principal']} -> {each['resource']}, from {since}{until}")
