"""What the API can do, read from its OpenAPI document: operations by noun and verb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal
from urllib.parse import quote

import attrs
import msgspec

Kind = Literal["string", "integer", "number", "boolean", "json"]
STANDARD: Final = {
    ("get", False): "list",
    ("post", False): "create",
    ("get", True): "get",
    ("patch", True): "update",
    ("delete", True): "delete",
}
"""The verbs of a noun and (True) of one thing of it."""
WRITING: Final = ("create", "update", "delete")
QUIET_QUERY: Final = ("limit", "cursor")
ALIASES: Final = {"device": "clients"}
"""Names in fields of what is a noun under another name."""
WRITE_ONLY: Final = "Write-only"
"""How the description of a secret begins."""
MEDIA: Final = "application/json"
EVENTS: Final = "text/event-stream"


@attrs.frozen(kw_only=True)
class Field:
    """One value that an operation takes. `kind` is that of one of them if there may be `many`;
    `parts` are the fields of an object, or of each object of a list; `refers` is the noun that it
    names one of, by id. A secret is never written on a command line, nor shown."""

    name: str
    kind: Kind
    many: bool = False
    nullable: bool = False
    required: bool = False
    choices: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    description: str = ""
    default: object = None
    is_id: bool = False
    refers: str | None = None
    is_secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-") + ("-file" if self.is_secret else "")

    @property
    def short_flags(self) -> tuple[str, ...]:
        """`--site` for `--site-id`; `--site` and `--sites` for `--site-ids`."""
        if self.refers is None or not self.name.endswith(("_id", "_ids")):
            return ()
        stem = "--" + self.name.removesuffix("_ids").removesuffix("_id").replace("_", "-")
        return (stem, stem + "s") if self.many else (stem,)


@attrs.frozen(kw_only=True)
class Operation:
    """One verb of one noun. `columns` are the fields of what it answers, in their order. A list
    that is not paged comes whole."""

    noun: str
    verb: str
    method: str
    path: str
    summary: str
    description: str
    parameters: tuple[Field, ...] = ()
    query: tuple[Field, ...] = ()
    body: tuple[Field, ...] | None = None
    about_body: str = ""
    headers: frozenset[str] = frozenset()
    columns: tuple[Field, ...] = ()
    is_list: bool = False
    is_paged: bool = False
    is_stream: bool = False

    @property
    def is_question(self) -> bool:
        """Whether it changes nothing, so that it may be asked again."""
        return self.method == "get" or (self.method == "post" and self.verb not in WRITING)

    def url(self, values: Mapping[str, str]) -> str:
        """The path with these values in the places of its parameters."""
        path = self.path
        for name, value in values.items():
            path = path.replace(f"{{{name}}}", quote(value, safe=""))
        return path


@cache
def description() -> Description:
    """The description that came with this program."""
    text = files("admin").joinpath("openapi.json").read_bytes()
    return Description(msgspec.json.decode(text))


class Description:
    """The operations of an OpenAPI document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._schemas: Mapping[str, Any] = document["components"]["schemas"]
        self.nouns: dict[str, dict[str, Operation]] = {}
        names = {self._noun_of(path) for path in document["paths"] if path.startswith("/v1/")}
        self._noun_names = frozenset(names)
        for path, methods in document["paths"].items():
            if path.startswith("/v1/"):
                for method, operation in methods.items():
                    made = self._operation(path, method, operation)
                    self.nouns.setdefault(made.noun, {})[made.verb] = made

    def operation(self, noun: str, verb: str) -> Operation | None:
        """The operation, if there is one."""
        return self.nouns.get(noun, {}).get(verb)

    def _operation(self, path: str, method: str, operation: Mapping[str, Any]) -> Operation:
        parameters = operation.get("parameters", [])
        answer = self._answer(operation)
        is_list = {"items", "next_cursor"} <= answer.get("properties", {}).keys()
        shown = answer["properties"]["items"].get("items", {}) if is_list else answer
        content = operation.get("requestBody", {}).get("content", {})
        noun = self._noun_of(path)
        return Operation(
            noun=noun,
            verb=self._verb_of(path, method, operation, is_list=is_list),
            method=method,
            path=path,
            summary=operation.get("summary", ""),
            description=operation.get("description", ""),
            parameters=tuple(
                attrs.evolve(field, refers=noun if field.is_id else None)
                for each in parameters
                if each["in"] == "path"
                for field in [self._field(each["name"], each["schema"])]
            ),
            query=tuple(
                self._field(each["name"], each["schema"], description=each.get("description", ""))
                for each in parameters
                if each["in"] == "query" and each["name"] not in QUIET_QUERY
            ),
            body=tuple(self._fields(content[MEDIA]["schema"])) if MEDIA in content else None,
            about_body=self._resolved(content.get(MEDIA, {}).get("schema", {})).get(
                "description", ""
            ),
            headers=frozenset(each["name"] for each in parameters if each["in"] == "header"),
            columns=tuple(self._fields(shown)),
            is_list=is_list,
            is_paged=any(each["name"] == "limit" for each in parameters),
            is_stream=EVENTS in self._success(operation).get("content", {}),
        )

    @staticmethod
    def _noun_of(path: str) -> str:
        return path.split("/")[2]

    @staticmethod
    def _verb_of(path: str, method: str, operation: Mapping[str, Any], *, is_list: bool) -> str:
        """`list`, `get` and the like; else the words of the path behind the noun, after the first
        word of the operation's id where that says that something is made, changed or removed."""
        rest = path.split("/")[3:]
        words = [each.replace("_", "-") for each in rest if not each.startswith("{")]
        first = operation.get("operationId", "").partition("_")[0]
        if words and first == "create":
            words[-1] = words[-1].removesuffix("s")
        if words:
            return "-".join([first, *words] if first in WRITING else words)
        if method == "get" and not rest and not is_list:
            return "watch" if first == "read" else "get"
        return STANDARD.get((method, bool(rest)), first or method)

    @staticmethod
    def _success(operation: Mapping[str, Any]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = next(
            (each for status, each in operation["responses"].items() if status.startswith("2")), {}
        )
        return found

    def _answer(self, operation: Mapping[str, Any]) -> Mapping[str, Any]:
        content = self._success(operation).get("content", {})
        return self._resolved(content.get(MEDIA, {}).get("schema", {}))

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema

    def _fields(self, schema: Mapping[str, Any]) -> Iterator[Field]:
        schema = self._resolved(schema)
        required = schema.get("required", ())
        for name, each in schema.get("properties", {}).items():
            yield self._field(name, each, required=name in required)

    def _field(
        self, name: str, schema: Mapping[str, Any], *, required: bool = False, description: str = ""
    ) -> Field:
        shape = self._shape(schema)
        description = description or self._described(schema)
        return Field(
            name=name,
            kind=shape.kind,
            many=shape.many,
            nullable=shape.nullable,
            required=required,
            choices=shape.choices,
            parts=self._parts(schema),
            description=description,
            default=schema.get("default"),
            is_id=shape.is_id,
            refers=self._refers(name) if shape.is_id else None,
            is_secret=description.startswith(WRITE_ONLY),
        )

    def _described(self, schema: Mapping[str, Any]) -> str:
        """The description, or that of the one of several that is not null."""
        parts = [schema, *schema.get("anyOf", ())]
        return next((str(each["description"]) for each in parts if "description" in each), "")

    def _parts(self, schema: Mapping[str, Any]) -> tuple[str, ...]:
        schema = self._resolved(schema)
        for each in schema.get("anyOf", ()):
            if found := self._parts(each):
                return found
        if schema.get("type") == "array":
            return self._parts(schema.get("items", {}))
        return tuple(schema.get("properties", ()))

    def _shape(self, schema: Mapping[str, Any]) -> _Shape:
        schema = self._resolved(schema)
        if "enum" in schema or "const" in schema:
            values = schema.get("enum", [schema.get("const")])
            choices = tuple(each for each in values if isinstance(each, str))
            kind: Kind = "string" if choices else "json"
            return _Shape(kind=kind, nullable=None in values, choices=choices)
        if "anyOf" in schema:
            parts = [self._resolved(each) for each in schema["anyOf"]]
            real = [each for each in parts if each.get("type") != "null"]
            one = self._shape(real[0]) if len(real) == 1 else _Shape()
            return attrs.evolve(one, nullable=len(real) < len(parts))
        type_ = schema.get("type")
        if type_ == "array":
            one = self._shape(schema.get("items", {}))
            is_list = one.kind != "json" and not one.many
            return attrs.evolve(one, many=True, nullable=False) if is_list else _Shape()
        if type_ in ("string", "integer", "number", "boolean"):
            return _Shape(kind=type_, is_id=schema.get("format") == "uuid")
        return _Shape(nullable=type_ == "null")

    def _refers(self, name: str) -> str | None:
        stem = name.removesuffix("_ids").removesuffix("_id")
        if stem == name:
            return None
        candidates = (ALIASES.get(stem, ""), f"{stem}s", f"{stem.removesuffix('y')}ies")
        return next((each for each in candidates if each in self._noun_names), None)


@attrs.frozen(kw_only=True)
class _Shape:
    kind: Kind = "json"
    many: bool = False
    nullable: bool = False
    choices: tuple[str, ...] = ()
    is_id: bool = False
