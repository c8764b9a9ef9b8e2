"""A local user without rights: what he owns or may write decides nothing for an agent of root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.service import SecretUnavailable, make_private_directory, read_secret
from tunnel.shell.process import device_seed_in

pytestmark = pytest.mark.system
STRANGER = 4_711


def test_nothing_is_taken_from_another_user(tmp_path: Path) -> None:
    directory, file = tmp_path / "state", tmp_path / "token"
    directory.mkdir(mode=0o700)
    file.write_text("a token of another's choice")
    file.chmod(0o600)
    for path in (directory, file):
        os.chown(path, STRANGER, STRANGER)
    with pytest.raises(PermissionError, match="another user"):
        make_private_directory(directory)
    with pytest.raises(SecretUnavailable, match="another user"):
        read_secret(file=file)


def test_no_device_key_is_made_in_a_directory_of_another_user(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    os.chown(directory, STRANGER, STRANGER)
    with pytest.raises(SecretUnavailable):
        device_seed_in(directory / "device.key")
    assert list(directory.iterdir()) == []
