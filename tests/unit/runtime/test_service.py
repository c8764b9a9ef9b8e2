"""Logs that keep secrets, and secrets that come from outside."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from runtime.secret import Secret
from runtime.service import (
    Health,
    SecretUnavailable,
    configure_logging,
    get_logger,
    make_private_directory,
    read_secret,
)

Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = ("text", "json")


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    yield
    configure_logging("text", "info")


# --- logs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_no_secret_is_logged_wherever_it_stands(
    format: Format, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(format)
    secret = Secret("swordfish")
    get_logger("test").warning(
        "something",
        plain=secret,
        inside=[{"deep": (secret,)}],
        text=f"{secret}",
        error=repr(secret),
    )
    try:
        local = secret.reveal_text()
        raise ValueError(f"{secret} {len(local)}")
    except ValueError:
        get_logger("test").error("failed", exc_info=True)
    written = capsys.readouterr()
    assert written.out == ""
    assert "something" in written.err
    assert "ValueError" in written.err
    assert "swordfish" not in written.err


@pytest.mark.parametrize("format", FORMATS)
def test_control_characters_never_reach_the_terminal(
    format: Format, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(format)
    get_logger("test").info("name", value="a\x1b[31mred\x07\x9bb", nested={"\x1bkey": ["\r"]})
    written = capsys.readouterr().err
    assert "red" in written
    assert all(character.isprintable() or character == "\n" for character in written)


def test_json_is_one_object_a_line_with_its_component_and_level(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("json", "warning")
    log = get_logger("gateway", site="berlin")
    log.info("not heard")
    log.warning("heard", count=3, where=Path("/tmp"))
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "heard",
        "component": "gateway",
        "site": "berlin",
        "level": "warning",
        "count": 3,
        "where": "/tmp",
    }


def test_what_libraries_log_is_a_line_in_our_form(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    logging.getLogger("somebody").warning("two\nlines %s", 7)
    logging.getLogger("somebody").info("chatter")
    for library in ("quic", "psycopg"):
        logging.getLogger(library).warning("what is raised too, or what strangers bring about")
    (line,) = capsys.readouterr().err.splitlines()
    said = json.loads(line)
    assert said["component"] == "somebody"
    assert said["level"] == "warning"
    assert said["text"] == "two\nlines 7"


# --- secrets from outside ----------------------------------------------------------------------


def private_file(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_file_comes_before_a_value_and_a_value_before_a_credential(
    tmp_path: Path, credentials: Path
) -> None:
    file = private_file(tmp_path / "token", b"  from the file\n")
    (credentials / "token").write_bytes(b"from systemd\n")
    assert read_secret(file=file, value="v", credential="token").matches("from the file")
    assert read_secret(value=" from the value\n", credential="token").matches("from the value")
    assert read_secret(value="", credential="token").matches("from systemd")
    assert read_secret(credential="token").matches("from systemd")


@pytest.fixture
def credentials(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "credentials"
    directory.mkdir()
    before = os.environ.get("CREDENTIALS_DIRECTORY")
    os.environ["CREDENTIALS_DIRECTORY"] = str(directory)
    yield directory
    if before is None:
        del os.environ["CREDENTIALS_DIRECTORY"]
    else:
        os.environ["CREDENTIALS_DIRECTORY"] = before


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o622, 0o666])
def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SecretUnavailable, match="chmod 0600") as caught:
        read_secret(file=private_file(tmp_path / "token", b"swordfish", mode))
    assert "swordfish" not in str(caught.value)


def test_what_cannot_be_a_secret_is_refused(tmp_path: Path, credentials: Path) -> None:
    empty = private_file(tmp_path / "empty", b" \n")
    large = private_file(tmp_path / "large", b"x" * 20_000)
    for file in (empty, large, tmp_path / "missing", tmp_path):
        with pytest.raises(SecretUnavailable):
            read_secret(file=file)
    for name in ("../token", "", ".", "missing"):
        with pytest.raises(SecretUnavailable):
            read_secret(credential=name)
    with pytest.raises(SecretUnavailable, match="neither"):
        read_secret()


# --- health ------------------------------------------------------------------------------------


def test_a_process_is_ready_while_every_condition_holds_and_there_is_one() -> None:
    health = Health()
    states = [health.ready]
    health.set("portal", True)
    states.append(health.ready)
    health.set("tun", False, "no device")
    states.append(health.ready)
    assert health.checks()["tun"].detail == "no device"
    health.remove("tun")
    health.remove("tun")
    states.append(health.ready)
    assert states == [False, True, False, True]


# --- who else may write where we read ------------------------------------------------------------


def test_a_private_directory_is_ours_and_nobody_else_writes_to_it(tmp_path: Path) -> None:
    made = tmp_path / "above" / "state"
    make_private_directory(made)
    assert made.stat().st_mode & 0o777 == 0o700
    make_private_directory(made)
    made.chmod(0o770)
    with pytest.raises(PermissionError, match="others may write"):
        make_private_directory(made)
