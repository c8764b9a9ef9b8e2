"""A command for every operation of the description: its flags, their help, and its completion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final, Literal

from cyclopts import App, Group, Parameter
from cyclopts.validators import Number

from admin.calling import NULL, Common, carry_out
from admin.description import Description, Field, Operation
from admin.failures import Failure

CONNECTION: Final = Group("Portal and output", sort_key=9)
ORDER: Final = ("list", "get", "create", "update", "delete")
BY_HAND: Final = {"declaration"}
"""Nouns whose commands are in files of their own."""
RESERVED: Final = {"portal", "ca", "token_file", "account", "profile", "output", "data"}
PLAIN: Final[dict[str, Any]] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "json": str,
}

Run = Callable[..., None]


def build(app: App, description: Description, ended: Callable[[Failure], None]) -> None:
    """Add a command for each noun, with its verbs. `ended` is told how one fails."""
    for noun, verbs in description.nouns.items():
        if noun in BY_HAND:
            continue
        sub = App(name=_word(noun), help=_about(noun, verbs), sort_key=noun)
        for verb in sorted(verbs, key=_rank):
            operation = verbs[verb]
            sub.command(_command(operation, ended), name=_word(verb), sort_key=_rank(verb))
        app.command(sub, alias=noun if "_" in noun else ())


def _command(operation: Operation, ended: Callable[[Failure], None]) -> Run:
    parameters = list(_parameters(operation))

    def run(*path: str, common: Common | None = None, **flags: Any) -> None:
        try:
            carry_out(operation, common or Common(), path, flags)
        except Failure as failure:
            ended(failure)

    run.__name__ = f"{operation.verb}_{operation.noun}"
    run.__doc__ = "\n\n".join(
        filter(None, (operation.description or operation.summary, operation.about_body))
    )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what cyclopts reads
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parameters(operation: Operation) -> Iterator[inspect.Parameter]:
    for field in operation.parameters:
        help = "Id, or a name that no other has." if field.refers else ""
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_ONLY,
            annotation=Annotated[str, Parameter(help=help)],
        )
    fields = {field.name: field for field in (*(operation.body or ()), *operation.query)}
    for field in sorted(fields.values(), key=lambda each: not each.required):
        yield _flag(field)
    if operation.body is not None:
        yield _extra("data", str, "The whole body: JSON, @file, or - for the standard input.")
    if operation.is_list:
        limit = Annotated[int, Number(gte=1), Parameter(help="How many at the most.")]
        yield _keyword("limit", limit, 100)
        yield _extra("all", bool, "All of them.")
    if operation.is_stream:
        yield _extra("after", int, "Resume after the event with this id.")
    if operation.verb == "get" and operation.parameters:
        yield _extra("print_etag", bool, "Print the ETag alone, for --if-match.")
    if operation.verb == "delete":
        yes = Parameter(name=["--yes", "-y"], help="Do not ask.", negative=())
        yield _keyword("yes", Annotated[bool | None, yes], None)
    if operation.verb in ("update", "delete"):
        yield _extra("if_match", str, "Only if the thing has this ETag (of `get --print-etag`).")
    yield _keyword("common", Annotated[Common | None, Parameter(name="*", group=CONNECTION)], None)


def _flag(field: Field) -> inspect.Parameter:
    names = [field.flag if field.name not in RESERVED else f"--the-{field.name}"]
    names += field.short_flags
    return _keyword(
        field.name,
        Annotated[_type_of(field) | None, Parameter(name=names, help=_help(field), negative=())]
        if field.kind != "boolean" and not field.many
        else Annotated[_type_of(field) | None, Parameter(name=names, help=_help(field))],
        None,
    )


def _type_of(field: Field) -> Any:
    choices = field.choices
    if field.kind == "boolean" and field.nullable:
        choices = ("true", "false")
    one: Any = PLAIN[field.kind]
    if field.is_secret or (field.nullable and not field.many):
        one = str
    if choices:
        one = Literal[(*choices, NULL) if field.nullable else choices]
    return tuple[one, ...] if field.many else one


def _help(field: Field) -> str:
    parts = [field.description.rstrip(".")]
    if field.required:
        parts.append("Needed")
    if field.refers is not None:
        parts.append(f"Of {_word(field.refers)}, by id or name")
    if field.is_secret:
        parts.append("A file of mode 0600")
    elif field.kind == "json":
        known = f" with {', '.join(field.parts)}" if field.parts else ""
        parts.append(f"JSON, or @file{known}")
    if field.nullable:
        parts.append(f"`{NULL}` for none")
    if field.default not in (None, "", [], {}) and field.kind != "json":
        parts.append(f"By default {_told(field.default)}")
    return "".join(f"{part}. " for part in parts if part).rstrip()


def _told(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _extra(name: str, type_: type, help: str) -> inspect.Parameter:
    shown = Parameter(help=help, negative=(), allow_leading_hyphen=name == "data")
    return _keyword(name, Annotated[type_ | None, shown], None)


def _keyword(name: str, annotation: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


def _about(noun: str, verbs: dict[str, Operation]) -> str:
    return f"{noun.replace('_', ' ').capitalize()}: {', '.join(sorted(verbs, key=_rank))}."


def _rank(verb: str) -> tuple[int, str]:
    return (ORDER.index(verb) if verb in ORDER else len(ORDER), verb)


def _word(name: str) -> str:
    return name.replace("_", "-")
