"""The settings of a portal, and the files of its first start."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from inspect import signature
from itertools import combinations
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from actors.model import Token
from actors.store.memory import MemoryStore
from actors.store.sealing import KeyRing, make_ring
from channel.credentials import InvalidToken, decode_token, encode_token
from portal.answers import CLUSTER, control_socket
from portal.asking import ask_cluster, find_cluster
from portal.cluster_command import drain, restart, start, status
from portal.command import reseal, tree
from portal.first_start import (
    check_key_ring,
    ensure_operator_token,
    load_key_ring,
    load_reset_key,
    prepare_state,
)
from portal.settings import PortalSettings, SettingsError, check
from runtime.clock import VirtualClock
from runtime.files import write_file
from runtime.randomness import SeededRandomness
from runtime.service import SecretUnavailable

PIN = bytes(range(32))


def test_the_address_of_tokens_is_the_one_given() -> None:
    places = check(PortalSettings(address="portal.example.org", listen="192.0.2.1:8443"))
    assert places.portal == "portal.example.org:443"
    assert check(PortalSettings(address="[2001:db8::1]:99")).portal == "[2001:db8::1]:99"


def test_without_one_it_is_where_the_channel_listens() -> None:
    assert check(PortalSettings(listen="192.0.2.1:8443")).portal == "192.0.2.1:8443"
    host, _, port = check(PortalSettings(listen="[::]:99")).portal.rpartition(":")
    assert host
    assert port == "99"


def test_the_certificate_names_every_way_to_the_portal_once() -> None:
    places = check(
        PortalSettings(
            address="portal.example.org:1",
            listen="0.0.0.0:1",
            api_listen="127.0.0.1:2",
            names=("api.example.org", "portal.example.org"),
        )
    )
    assert places.names == ("portal.example.org", "127.0.0.1", "localhost", "api.example.org")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("listen", "nowhere"),
        ("listen", "localhost:1"),
        ("api_listen", "192.0.2.1:70000"),
        ("address", "a b:1"),
        ("address", "portal:x"),
        ("database_connections", 0),
        ("api_connections", -1),
        ("api_connections_per_source", 0),
        ("drain_timeout_s", -1.0),
        ("link_listen", "nowhere"),
        ("link_address", "a b:x"),
    ],
)
def test_a_bad_setting_is_named(setting: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"^{setting}: "):
        check(PortalSettings(**{setting: value}))


@pytest.mark.parametrize(
    ("listen", "api_listen", "place"),
    [
        ("[::]:443", "[::]:443", "api"),
        ("192.0.2.1:443", "192.0.2.1:443", "api"),
        ("192.0.2.1:443", "[::]:443", "api"),
        ("192.0.2.1:443", "0.0.0.0:443", "api"),
        ("192.0.2.1:443", "192.0.2.2:443", "own"),
        ("[2001:db8::1]:443", "0.0.0.0:443", "own"),
        ("[::]:443", "[::]:8443", "own"),
        ("127.0.0.1:0", "127.0.0.1:0", "own"),
    ],
)
def test_agents_come_by_websocket_where_the_api_is_or_at_a_socket_of_their_own(
    listen: str, api_listen: str, place: str
) -> None:
    assert check(PortalSettings(listen=listen, api_listen=api_listen)).websocket == place
    without = PortalSettings(listen=listen, api_listen=api_listen, websocket=False)
    assert check(without).websocket == "nowhere"


@pytest.mark.parametrize(
    ("listen", "api_listen"),
    [("[::]:443", "127.0.0.1:443"), ("0.0.0.0:443", "127.0.0.1:443"), ("[::]:443", "0.0.0.0:443")],
)
def test_an_api_at_a_part_of_the_channels_port_is_refused(listen: str, api_listen: str) -> None:
    with pytest.raises(SettingsError, match=r"^api_listen: .*websocket to false"):
        check(PortalSettings(listen=listen, api_listen=api_listen))
    check(PortalSettings(listen=listen, api_listen=api_listen, websocket=False))


def test_nodes_that_listen_everywhere_say_where_others_reach_them() -> None:
    for listen in ("0.0.0.0:7400", "[::]:7400"):
        with pytest.raises(SettingsError, match=r"^link_address: "):
            check(PortalSettings(link_listen=listen))
        assert check(PortalSettings(link_listen=listen, link_address="192.0.2.1")).link_listen


def test_what_asks_a_portal_looks_where_a_portal_keeps_its_state() -> None:
    for command in (tree, reseal, status, drain, start, restart):
        default = signature(command).parameters["state_dir"].default
        assert default == PortalSettings().state_dir


def test_a_command_that_was_killed_is_none(tmp_path: Path) -> None:
    path = control_socket(tmp_path, CLUSTER)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    assert find_cluster("cluster status", tmp_path, {"command": "nodes"}) is None
    with pytest.raises(SystemExit, match="is it running"):
        ask_cluster("cluster drain", tmp_path, {"command": "drain", "node": "portal-1"})


def test_one_that_does_not_answer_in_time_is_none(tmp_path: Path) -> None:
    path = control_socket(tmp_path, CLUSTER)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        assert find_cluster("cluster status", tmp_path, {}, timeout_ns=10**6) is None


async def ensure(directory: Path, store: MemoryStore, seed: int = 1) -> None:
    await ensure_operator_token(
        directory,
        store,
        portal="portal.example:443",
        pin=PIN,
        clock=VirtualClock(),
        randomness=SeededRandomness(seed, "operator"),
    )


async def known(store: MemoryStore, id: UUID) -> Token | None:
    return await store.find_token(id)


async def test_the_first_start_makes_an_operators_token_and_later_ones_none(
    tmp_path: Path,
) -> None:
    store = MemoryStore()
    await ensure(tmp_path, store)
    path = tmp_path / "operator-token"
    assert path.stat().st_mode & 0o777 == 0o600
    decoded = decode_token(path.read_text())
    assert (decoded.kind, decoded.portal, decoded.pin) == ("operator", "portal.example:443", PIN)
    row = await known(store, decoded.id)
    assert row is not None
    assert row.hash == decoded.hash
    await ensure(tmp_path, store, seed=2)
    assert decode_token(path.read_text()) == decoded
    path.unlink()
    await ensure(tmp_path, store, seed=3)
    assert not path.exists()


async def test_a_crash_between_the_file_and_the_row_is_made_good(tmp_path: Path) -> None:
    text = encode_token("operator", UUID(int=7), bytes(32), "portal.example:443", PIN)
    write_file(tmp_path / "operator-token", text.reveal(), mode=0o600)
    store = MemoryStore()
    await ensure(tmp_path, store)
    assert await known(store, UUID(int=7)) is not None
    (tmp_path / "operator-token.made").unlink()
    await ensure(tmp_path, store)


async def test_a_file_of_another_kind_or_open_to_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "operator-token"
    text = encode_token("relay", UUID(int=7), bytes(32), "portal.example:443", PIN)
    for content in (text.reveal(), b"nonsense"):
        write_file(path, content, mode=0o600)
        with pytest.raises(InvalidToken, match="delete the file"):
            await ensure(tmp_path, MemoryStore())
    path.chmod(0o644)
    with pytest.raises(SecretUnavailable, match="open to others"):
        await ensure(tmp_path, MemoryStore())


def test_the_reset_key_outlives_a_restart(tmp_path: Path) -> None:
    first = load_reset_key(tmp_path, SeededRandomness(1, "key"))
    assert len(first) == 32
    assert load_reset_key(tmp_path, SeededRandomness(2, "key")) == first
    assert (tmp_path / "reset-key").stat().st_mode & 0o777 == 0o600


def ring_of(state: Path, seed: int = 1, **settings: Any) -> KeyRing:
    return load_key_ring(PortalSettings(state_dir=state, **settings), SeededRandomness(seed, "k"))


def text_of(seed: int) -> bytes:
    return make_ring(SeededRandomness(seed, "ring")).reveal()


def test_the_encryption_keys_outlive_a_restart(tmp_path: Path) -> None:
    first = ring_of(tmp_path)
    assert ring_of(tmp_path, seed=2).fingerprints == first.fingerprints
    assert (tmp_path / "encryption-keys").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def environment() -> Iterator[None]:
    """What a test changes of it is undone."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("environment")
def test_keys_that_are_given_come_before_those_of_the_state_directory(tmp_path: Path) -> None:
    own = ring_of(tmp_path).fingerprints
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    os.environ["CREDENTIALS_DIRECTORY"] = str(credentials)
    assert ring_of(tmp_path).fingerprints == own
    (credentials / "holloway-encryption-keys").write_bytes(text_of(2))
    by_credential = ring_of(tmp_path).fingerprints
    os.environ["HOLLOWAY_ENCRYPTION_KEYS"] = text_of(3).decode()
    by_variable = ring_of(tmp_path).fingerprints
    write_file(tmp_path / "file", text_of(4), mode=0o600)
    by_file = ring_of(tmp_path, encryption_keys_file=tmp_path / "file").fingerprints
    found = [own, by_credential, by_variable, by_file]
    assert all(one != other for one, other in combinations(found, 2))


def test_a_file_that_holds_no_keys_is_refused_without_being_quoted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(SecretUnavailable):
        ring_of(tmp_path, encryption_keys_file=path)
    write_file(path, b"hunter2", mode=0o600)
    with pytest.raises(SettingsError) as refusal:
        ring_of(tmp_path, encryption_keys_file=path)
    assert "hunter2" not in str(refusal.value)
    assert not (tmp_path / "encryption-keys").exists()


async def test_a_portal_with_other_keys_than_its_database_knows_does_not_start(
    tmp_path: Path,
) -> None:
    store = MemoryStore()
    await check_key_ring(store, ring_of(tmp_path))
    await check_key_ring(store, ring_of(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(SettingsError, match="Copy the keys"):
        await check_key_ring(store, ring_of(elsewhere, seed=2))


def test_the_state_directory_is_not_for_others(tmp_path: Path) -> None:
    state = tmp_path / "a" / "state"
    prepare_state(state)
    assert state.stat().st_mode & 0o066 == 0


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.new").write_text("left by a crash")
    write_file(path, b"new", mode=0o640)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
