"""Ray executes code for whoever reaches it: what it is refused without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.hosting.ray_machine import MachineSettings, RayMachine
from runtime.hosting.ray_settings import (
    RayAccess,
    RayRefused,
    RayTls,
    environment,
    make_token,
    prepare_directory,
)


@pytest.fixture
def access(tmp_path: Path) -> RayAccess:
    make_token(tmp_path / "token")
    return RayAccess(token_file=tmp_path / "token")


@pytest.fixture
def tls(tmp_path: Path) -> RayTls:
    for name in ("certificate", "key", "authority"):
        (tmp_path / name).write_text("PEM")
    (tmp_path / "key").chmod(0o600)
    return RayTls(
        certificate=tmp_path / "certificate", key=tmp_path / "key", authority=tmp_path / "authority"
    )


# Ray listens at all interfaces for each of them, the loopback ones too.
@pytest.mark.parametrize(
    "host", ["0.0.0.0", "192.0.2.1", "::", "::1", "127.0.0.2", "localhost", "ray.example", ""]
)
def test_other_addresses_than_loopback_are_refused_without_token_and_tls(
    host: str, access: RayAccess, tls: RayTls
):
    for given in (None, access):
        with pytest.raises(RayRefused, match=r"a token file and TLS.*or use 127\.0\.0\.1"):
            environment(host, given)
    found = environment(host, RayAccess(token_file=access.token_file, tls=tls))
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_USE_TLS"] == "1"
    assert found["RAY_TLS_SERVER_KEY"] == str(tls.key)


def test_loopback_needs_a_token_all_the_same(access: RayAccess):
    with pytest.raises(RayRefused, match="needs a token file"):
        environment("127.0.0.1", None)
    found = environment("127.0.0.1", access)
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_AUTH_TOKEN_PATH"] == str(access.token_file)
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"
    token = access.token_file.read_text()
    assert len(token) == 64
    assert token not in "".join(found.values())


def test_a_head_is_not_even_started_where_it_is_refused(tmp_path: Path, access: RayAccess):
    short = Path("/") / "nowhere"
    with pytest.raises(RayRefused):
        RayMachine.join(MachineSettings(directory=short), "127.0.0.1:6379")
    with pytest.raises(ValueError, match="at most 38 bytes"):
        RayMachine.head(MachineSettings(directory=tmp_path / ("long" * 20), access=access))
    with pytest.raises(ValueError, match="absolute"):
        prepare_directory(Path("here"))
    with pytest.raises(ValueError, match="object store"):
        MachineSettings(directory=short, object_store_bytes=1)


def test_a_token_that_others_may_read_or_guess_is_refused(access: RayAccess):
    access.token_file.chmod(0o640)
    with pytest.raises(RayRefused, match="chmod 0600"):
        environment("127.0.0.1", access)
    access.token_file.chmod(0o600)
    access.token_file.write_text("guess me")
    with pytest.raises(RayRefused, match="shorter than 32"):
        environment("127.0.0.1", access)
    access.token_file.unlink()
    with pytest.raises(RayRefused, match="No such file"):
        environment("127.0.0.1", access)


def test_a_key_of_tls_that_others_may_read_is_refused(access: RayAccess, tls: RayTls):
    tls.key.chmod(0o644)
    with pytest.raises(RayRefused, match="chmod 0600"):
        environment("192.0.2.1", RayAccess(token_file=access.token_file, tls=tls))
    tls.key.chmod(0o600)
    tls.authority.unlink()
    with pytest.raises(RayRefused, match="no file"):
        environment("192.0.2.1", RayAccess(token_file=access.token_file, tls=tls))


def test_a_token_is_made_once(access: RayAccess):
    before = access.token_file.read_text()
    assert access.token_file.stat().st_mode & 0o777 == 0o600
    make_token(access.token_file)
    assert access.token_file.read_text() == before


def test_ray_is_not_imported_before_a_cluster_is_opened():
    modules = ("local_cluster", "ray_cluster", "ray_machine", "ray_node", "ray_settings")
    imports = "; ".join(f"import runtime.hosting.{module}" for module in modules)
    program = f"import sys; {imports}; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
