"""Every setting of every component is a flag, a variable and a TOML key from one definition."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
import pytest

import holloway
from clients.settings import ClientSettings
from gateways.settings import GatewaySettings
from portal.settings import PortalSettings
from relays.settings import RelaySettings

COMPONENTS: dict[str, type[Any]] = {
    "portal": PortalSettings,
    "relay": RelaySettings,
    "gateway": GatewaySettings,
    "up": ClientSettings,
}
EVERY_SETTING = [
    pytest.param(command, field.name, id=f"{command}-{field.name}")
    for command, as_type in COMPONENTS.items()
    for field in attrs.fields(as_type)
]


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """These HOLLOWAY_* variables and no others, within the block."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("HOLLOWAY_"):
            del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def read(command: str, *flags: str, file: Path, variables: dict[str, str] | None = None) -> Any:
    """The settings that `holloway --config file command flags` would run with."""
    with environment(**(variables or {})), contextlib.redirect_stdout(None):
        with contextlib.suppress(SystemExit):
            holloway.launch("--help", config=file)
        _, bound, _ = holloway.app.parse_args([command, *flags])
    return bound.arguments.get("settings", COMPONENTS[command]())


def samples(as_type: Any, default: Any) -> list[Any]:
    """Three values of a setting that are neither its default nor one another, where there are."""
    if get_origin(as_type) in (Union, UnionType):
        [as_type] = [each for each in get_args(as_type) if each is not type(None)]
    if get_origin(as_type) is Literal:
        others = [each for each in get_args(as_type) if each != default]
        return [others[number % len(others)] for number in range(3)]
    if get_origin(as_type) is tuple:
        return [("192.0.2.1:1",), ("192.0.2.2:2", "192.0.2.3:3"), ("192.0.2.4:4",)]
    if as_type is bool:
        return [not default] * 3
    if as_type is Path:
        return [Path(f"/nowhere/{number}") for number in range(3)]
    if as_type is str:
        return [f"sample-{number}" for number in range(3)]
    assert as_type in (int, float), as_type
    return [as_type(default + number) for number in (1, 2, 3)]


def as_flags(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [word for each in value for word in (f"--{flag}", each)]
    return [f"--{flag}", str(value)]


def as_variable(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)


@pytest.mark.parametrize(("command", "name"), EVERY_SETTING)
def test_a_setting_is_a_flag_a_variable_and_a_key_in_this_order_of_precedence(
    tmp_path: Path, command: str, name: str
) -> None:
    as_type = COMPONENTS[command]
    default = getattr(as_type(), name)
    by_file, by_variable, by_flag = samples(get_type_hints(as_type)[name], default)
    empty, file = tmp_path / "empty.toml", tmp_path / "holloway.toml"
    empty.touch()
    file.write_text(f"[{command}]\n{name} = {as_toml(by_file)}\n")
    variables = {f"HOLLOWAY_{command}_{name}".upper(): as_variable(by_variable)}
    flags = as_flags(name, by_flag)

    assert getattr(read(command, file=empty), name) == default
    assert getattr(read(command, file=file), name) == by_file
    assert getattr(read(command, file=empty, variables=variables), name) == by_variable
    assert getattr(read(command, *flags, file=empty), name) == by_flag
    assert getattr(read(command, file=file, variables=variables), name) == by_variable
    assert getattr(read(command, *flags, file=file, variables=variables), name) == by_flag


@pytest.mark.parametrize(("command", "name"), EVERY_SETTING)
def test_no_setting_is_a_secret_itself(command: str, name: str) -> None:
    secret = any(word in name for word in ("token", "secret", "password", "key", "url", "users"))
    is_file = get_type_hints(COMPONENTS[command])[name] in (Path, Path | None)
    assert not secret or name.endswith("_file") or is_file


@pytest.mark.parametrize(("command", "name"), EVERY_SETTING)
def test_every_setting_is_explained(command: str, name: str) -> None:
    assert f"\n{name}\n    " in (COMPONENTS[command].__doc__ or "").replace("\n    ", "\n")
