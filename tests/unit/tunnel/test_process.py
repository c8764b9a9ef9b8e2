"""What an agent's process has before it begins: its device's key, and the machine for itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.service import SecretUnavailable
from tunnel.shell.lock import AlreadyRunning, only_one
from tunnel.shell.process import device_seed_in, fresh_device_seed


def test_a_device_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "device.key"
    first = device_seed_in(path)
    assert len(first.reveal()) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert device_seed_in(path).matches(first)
    assert not fresh_device_seed().matches(first)
    assert first.reveal().hex() not in repr(first)


@pytest.mark.parametrize("content", ["", "no hexadecimal", "ab" * 31, "ab" * 33])
def test_a_device_key_that_is_none_is_refused_without_being_shown(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "device.key"
    path.touch(mode=0o600)
    path.write_text(content)
    with pytest.raises(SecretUnavailable) as refused:
        device_seed_in(path)
    assert not content or content not in str(refused.value)


def test_a_device_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    device_seed_in(path)
    path.chmod(0o640)
    with pytest.raises(SecretUnavailable, match="chmod 0600"):
        device_seed_in(path)


def test_what_one_agent_has_no_other_gets_until_it_lets_go() -> None:
    thing = f"table of test {os.getpid()}"
    with only_one(thing):
        with (
            pytest.raises(AlreadyRunning, match=f"{thing}.* by process {os.getpid()} of user"),
            only_one(thing),
        ):
            pytest.fail("two had it at once")
        with only_one(f"another {thing}"):
            pass
    with only_one(thing):
        pass
