"""Scenario files: read with everything that is wrong with them, and written.

A file is data. Nothing in it is a command, a path of another file or a name that is looked up
outside of it, and what it may hold is bounded (`schema`, MAX_FILE_BYTES), so a file from a stranger
can be run without reading it first.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import attrs

from admin.safety import printable
from admin.toml import to_toml
from runtime.files import write_file
from simulations.scenario.checking import check
from simulations.scenario.schema import FORMAT, MAX_FILE_BYTES, Scenario
from simulations.scenario.structure import MISSING, Problem, Problems, read

SUFFIX: Final = ".toml"
_READY: Final = "simulations.scenario.ready"


class ScenarioError(Exception):
    """A file that cannot be run. `problems` are all that are wrong with it (at most MAX_PROBLEMS,
    of `total`); `name` is the file."""

    def __init__(self, name: str, problems: tuple[Problem, ...], total: int) -> None:
        super().__init__(name, problems, total)
        self.name = name
        self.problems = problems
        self.total = total

    def __str__(self) -> str:
        lines = [f"{self.name}: {printable(str(problem))}" for problem in self.problems]
        if self.total > len(self.problems):
            lines.append(f"{self.name}: and {self.total - len(self.problems)} more")
        return "\n".join(lines)


def load(file: Path) -> Scenario:
    """The scenario in a file. Raises ScenarioError, also where the file cannot be read."""
    return loads(_read_file(file), str(file))


def load_part(file: Path) -> Scenario:
    """A part of a scenario in a file, as a capture is or a drill: every field is well formed, but
    names may refer to what is elsewhere. Raises ScenarioError."""
    return _loads(_read_file(file), str(file), is_whole=False)


def _read_file(file: Path) -> bytes:
    """Not more than shows that it is too large. Raises ScenarioError."""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        problem = Problem("", error.strerror or str(error))
        raise ScenarioError(str(file), (problem,), 1) from None


def loads(data: bytes | str, name: str = "scenario") -> Scenario:
    """The scenario that TOML text says; `name` is for messages. Raises ScenarioError."""
    return _loads(data, name, is_whole=True)


def _loads(data: bytes | str, name: str, *, is_whole: bool) -> Scenario:
    problems = Problems()
    found = MISSING
    if (document := _document(data, problems)) is not None:
        found = _scenario(document, problems, is_whole=is_whole)
    if problems.total:
        raise ScenarioError(name, tuple(problems.found), problems.total)
    scenario: Scenario = found
    return scenario


def checked(scenario: Scenario, name: str = "scenario") -> Scenario:
    """The same scenario, which was not read but made: by a program, a draw, a shrinker. Raises
    ScenarioError as `loads` does."""
    return loads(dump(scenario), name)


def dump(scenario: Scenario) -> str:
    """The scenario as a file, which is read again as the same. Defaults are left out."""
    return to_toml(_plain(scenario))


def save(scenario: Scenario, file: Path, *, head: str = "") -> None:
    """Write a file in one step, with `head` in comments above it. Raises OSError."""
    comments = "".join(f"# {printable(line)}".rstrip() + "\n" for line in head.splitlines())
    text = (comments + "\n" if comments else "") + dump(scenario)
    write_file(file, text.encode(), mode=0o644)


# --- those that come with Holloway ---------------------------------------------------------------


def ready_names() -> list[str]:
    """The names of the ready-made scenarios."""
    found = (each.name for each in files(_READY).iterdir())
    return sorted(name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX))


def ready(name: str) -> Scenario:
    """A ready-made scenario. Raises KeyError."""
    if name not in ready_names():
        raise KeyError(name)
    return loads(files(_READY).joinpath(name + SUFFIX).read_bytes(), name)


# --- reading -------------------------------------------------------------------------------------


def _document(data: bytes | str, problems: Problems) -> Mapping[str, Any] | None:
    raw = data.encode() if isinstance(data, str) else data
    if len(raw) > MAX_FILE_BYTES:
        problems.note("", f"is larger than {MAX_FILE_BYTES >> 20} MiB")
        return None
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError:
        problems.note("", "is no text in UTF-8")
    except RecursionError:
        problems.note("", "is no scenario: tables within tables within tables")
    except ValueError as error:
        problems.note("", f"is no TOML: {error}")
    return None


def _scenario(document: Mapping[str, Any], problems: Problems, *, is_whole: bool) -> Any:
    if document.get("format") != FORMAT or isinstance(document.get("format"), bool):
        problems.note("format", f"this release reads files with `format = {FORMAT}`")
        return MISSING
    try:
        scenario = read(document, Scenario, "", problems)
    except RecursionError:
        problems.note("", "is no scenario: tables within tables within tables")
        return MISSING
    if scenario is not MISSING and is_whole:
        check(scenario, problems)  # what could be read of it, so that one run tells all
    return scenario


# --- writing -------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if attrs.has(type(value)):
        found = {}
        for field in attrs.fields(type(value)):
            of_it = getattr(value, field.name)
            if of_it is None or (of_it == _default(field) and field.name != "format"):
                continue
            found[field.name] = _plain(of_it)
        return found
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _default(field: Any) -> Any:
    if isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
        return field.default.factory()
    return field.default
