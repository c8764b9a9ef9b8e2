"""The token of an agent, from outside: where it may come from, what is said when it is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from channel.credentials import InvalidToken, TokenKind, encode_token
from channel.own_token import read_token
from runtime.service import SecretUnavailable

VARIABLE = "HOLLOWAY_UP_TOKEN"


def text_of(kind: TokenKind) -> str:
    return encode_token(kind, UUID(int=1), b"s" * 32, "portal.example:443", bytes(32)).reveal_text()


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    yield
    os.environ.pop(VARIABLE, None)
    os.environ.pop("CREDENTIALS_DIRECTORY", None)


def test_a_token_of_the_environment_is_taken_out_of_it() -> None:
    os.environ[VARIABLE] = f" {text_of('client')} "
    assert read_token("up", "client", None).reveal_text() == text_of("client")
    assert VARIABLE not in os.environ


def test_without_a_token_every_way_to_give_one_is_named() -> None:
    with pytest.raises(SecretUnavailable) as said:
        read_token("up", "client", None)
    for way in ("--token-file", VARIABLE, "holloway-up-token"):
        assert way in str(said.value)


def test_a_file_comes_before_the_environment_and_that_before_the_credential(
    tmp_path: Path,
) -> None:
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text(text_of("client"))
    os.environ[VARIABLE] = "not looked at"
    assert read_token("up", "client", file).reveal_text() == text_of("client")
    (tmp_path / "holloway-up-token").write_text(text_of("client"))
    os.environ["CREDENTIALS_DIRECTORY"] = str(tmp_path)
    assert read_token("up", "client", None).reveal_text() == text_of("client")


@pytest.mark.parametrize("kind", ["gateway", "relay", "api", "operator"])
def test_a_token_of_another_kind_is_refused(kind: TokenKind) -> None:
    os.environ[VARIABLE] = text_of(kind)
    with pytest.raises(InvalidToken, match=r"the token is for .*, and this is a client"):
        read_token("up", "client", None)


@pytest.mark.parametrize("wrong", ["nonsense", "hlw_client_AAAA", "hlw_client_*", "x" * 700])
def test_a_damaged_token_is_named_as_what_is_wrong_and_never_shown(wrong: str) -> None:
    os.environ[VARIABLE] = wrong
    with pytest.raises(InvalidToken, match=r"^the token .*: copy it again$") as said:
        read_token("up", "client", None)
    assert wrong not in str(said.value)
