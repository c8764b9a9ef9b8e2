"""No value class shows a secret when it is printed, whoever writes the next one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import attrs
import pytest

PACKAGES = (
    "runtime",
    "channel",
    "actors",
    "relays",
    "tunnel",
    "gateways",
    "clients",
    "portal",
    "admin",
)
SECRET = re.compile(r"token$|password|secret|preshared|private|stamp|seed|^key$|hash$|credential")
# Fields whose names sound like it: identifiers, times, counts, public halves, and values whose
# class keeps the secret itself.
HARMLESS_TYPES = re.compile(
    r"^(UUID|int|bool|Path|Secret|Token|DecodedToken|Credentials|IceCredentials|KemKey|FlowKey)\b"
)


def value_classes() -> Iterator[type]:
    for name in PACKAGES:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            module = importlib.import_module(found.name)
            for _, one in inspect.getmembers(module, inspect.isclass):
                if one.__module__ == found.name and attrs.has(one):
                    yield one


def shown_secrets(one: type) -> list[str]:
    return [
        f"{one.__module__}.{one.__qualname__}.{field.name}: {field.type}"
        for field in attrs.fields(one)
        if SECRET.search(field.name)
        and field.repr
        and not HARMLESS_TYPES.match(str(getattr(field.type, "__name__", field.type)))
        and not (field.name == "key" and field.type == "str")  # a name, not of cryptography
    ]


def test_no_value_class_shows_a_field_that_holds_a_secret() -> None:
    classes = list(value_classes())
    assert len(classes) > 200
    assert [shown for one in classes for shown in shown_secrets(one)] == []


def test_a_class_that_forgot_to_hide_one_is_found() -> None:
    @attrs.frozen
    class Careless:
        password: str

    assert len(shown_secrets(Careless)) == 1


@pytest.mark.parametrize("name", ["Join", "RelayJoin", "RelayServer", "IceCredentials"])
def test_messages_that_carry_secrets_hide_them(name: str) -> None:
    one = getattr(importlib.import_module("channel.messages"), name)
    assert any(not field.repr for field in attrs.fields(one))
