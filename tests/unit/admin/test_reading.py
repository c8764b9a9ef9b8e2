"""What is read: profiles, portals' addresses, declarations with their secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from admin.calling import read_json
from admin.connection import Profile, host_and_port, read_profile
from admin.declaration import read_declaration
from admin.failures import USAGE, Failure

PROFILES = """
default = "acme"
[profiles.acme]
portal = "portal.example.org"
token_file = "acme.token"
account = "acme"
[profiles.other]
output = "json"
"""


def test_a_profile_is_the_one_that_is_named_or_the_default(tmp_path: Path) -> None:
    file = tmp_path / "admin.toml"
    file.write_text(PROFILES)
    assert read_profile("", file) == Profile(
        portal="portal.example.org", token_file=tmp_path / "acme.token", account="acme"
    )
    assert read_profile("other", file) == Profile(output="json")
    assert read_profile("", tmp_path / "nowhere.toml") == Profile()


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (PROFILES, "third", "no profile 'third' (but: acme, other)"),
        ("[profiles.a]\ntoken = 'x'\n", "a", "unknown field `token`"),
        ("[profiles\n", "", "no file of profiles"),
        ("profiles = 1\n", "", "no file of profiles"),
    ],
)
def test_a_file_of_profiles_that_cannot_be_meant_is_refused(
    tmp_path: Path, content: str, name: str, words: str
) -> None:
    file = tmp_path / "admin.toml"
    file.write_text(content)
    with pytest.raises(Failure) as refused:
        read_profile(name, file)
    assert words in str(refused.value)
    assert refused.value.status == USAGE


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("portal.example.org", ("portal.example.org", 443)),
        ("portal.example.org:8443", ("portal.example.org", 8443)),
        ("https://portal.example.org", ("portal.example.org", 443)),
        ("https://[2001:db8::1]:8443/", ("2001:db8::1", 8443)),
    ],
)
def test_a_portal_is_named_as_people_name_it(text: str, address: tuple[str, int]) -> None:
    assert host_and_port(text) == address


@pytest.mark.parametrize("text", ["http://portal", "https://portal/path", "a:b", ""])
def test_another_address_is_refused(text: str) -> None:
    with pytest.raises(Failure):
        host_and_port(text)


def test_json_is_given_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "body.json"
    file.write_text('{"a": 1}')
    assert read_json('[{"protocol": "tcp"}]', "--filters") == [{"protocol": "tcp"}]
    assert read_json(f"@{file}", "--data") == {"a": 1}
    for text in ("{", f"@{tmp_path}/nowhere", f"@{tmp_path}"):
        with pytest.raises(Failure, match="--data"):
            read_json(text, "--data")


def test_a_declaration_is_toml_or_json_with_its_times_as_texts(tmp_path: Path) -> None:
    toml, other = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text("[[policies]]\nexpires_at = 2027-01-31T09:00:00Z\nstart = 09:30:00\n")
    other.write_text(json.dumps({"policies": []}))
    assert read_declaration(toml) == {
        "policies": [{"expires_at": "2027-01-31T09:00:00+00:00", "start": "09:30:00"}]
    }
    assert read_declaration(other) == {"policies": []}


def test_a_secret_is_in_a_private_file_and_never_in_the_declaration(tmp_path: Path) -> None:
    file, secret = tmp_path / "a.toml", tmp_path / "secret"
    secret.write_text("sesame\n")
    secret.chmod(0o600)
    file.write_text('[[auth_providers]]\nclient_secret = { file = "secret" }\n')
    assert read_declaration(file) == {"auth_providers": [{"client_secret": "sesame"}]}
    secret.chmod(0o644)
    for bad in ('{ file = "secret" }', '"opensesame"', '{ env = "NOWHERE_AT_ALL" }', "{}"):
        file.write_text(f"[[auth_providers]]\nclient_secret = {bad}\n")
        with pytest.raises(Failure, match=r"auth_providers\[0\].client_secret") as refused:
            read_declaration(file)
        assert "opensesame" not in str(refused.value)


@pytest.mark.parametrize("content", [b"[", b"\xff", b'"', b"[[a]]\n" * 3_000_000])
def test_no_declaration_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    with pytest.raises(Failure):
        read_declaration(file)
