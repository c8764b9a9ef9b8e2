"""How Ray is set up by us: who may reach it, how fast it sees a death, and what it may use.

Ray executes code for whoever reaches it, so another address than 127.0.0.1 is refused unless there
are a token and TLS certificates. A token there is always, on loopback too, since other users of the
machine reach that. There is no dashboard, and no usage report; no secret is in an argument.

All settings go through the environment of each process, as Ray's C++ reads `RAY_<name>`: what is
given as `_system_config` reaches the raylets only in part (ray-project/ray issue 62074). This
module imports no Ray.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

import attrs

from runtime.service import SecretUnavailable, make_private_directory, read_secret

MIN_TOKEN_CHARACTERS: Final = 32
MIN_OBJECT_STORE_BYTES: Final = 80 * 1024 * 1024
"""Ray's own least is 75 MiB. Nodes do not use it; it is shared memory that is taken when used."""

MAX_DIRECTORY_BYTES: Final = 38
"""Ray's sockets are below it, and the address of a Unix socket has at most 107 bytes."""

LOOPBACK: Final = "127.0.0.1"

_HEAD_AWAY_S: Final = 7 * 86_400

_ALWAYS: Final = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A raylet that dies is given up after 0.5 s + 3 x 0.3 s, not after 15 s.
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    # Raylets and nodes wait for a head that is away, instead of ending after 60 s.
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(_HEAD_AWAY_S),
    # Who asks the head something is told sooner that it is away (60 s).
    "RAY_gcs_server_request_timeout_seconds": "10",
    # A portal is not a task that can be repeated: Ray must not end it when memory gets scarce.
    "RAY_memory_monitor_refresh_ms": "0",
    # No idle processes in store, each of 70 MB.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_enable_metrics_collection": "0",
}


class RayRefused(Exception):
    """These settings would let strangers in; says what to do."""


@attrs.frozen(kw_only=True)
class RayTls:
    """PEM files. The certificate names the machine's address, and serves both as a server's and a
    client's; `authority` has signed those of all machines."""

    certificate: Path
    key: Path
    authority: Path


@attrs.frozen(kw_only=True)
class RayAccess:
    """What proves to a Ray cluster that a process may take part. The same on all its machines."""

    token_file: Path
    """Of this user and 0600; at least MIN_TOKEN_CHARACTERS at random. See `make_token`."""
    tls: RayTls | None = None


def make_token(path: Path) -> None:
    """Write a new token to `path`, 0600, unless a file is there already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as opened:
        opened.write(secrets.token_hex(32))


def is_loopback(host: str) -> bool:
    """Whether Ray, told to be at `host`, listens there alone. That is so of 127.0.0.1; of others it
    listens at all interfaces, of other loopback addresses too."""
    return host == LOOPBACK


def environment(
    host: str, access: RayAccess | None, *, storage: Path | None = None
) -> dict[str, str]:
    """The variables for each process that takes part in a Ray at `host`: head, raylet, driver.

    `storage` is where a head keeps what it knows, so that it finds its nodes again when it
    returns. Raises RayRefused."""
    loopback = is_loopback(host)
    if access is None or (access.tls is None and not loopback):
        raise RayRefused(
            f"Ray executes code for whoever reaches it: at {host} it needs "
            + ("a token file" if loopback else "a token file and TLS (certificate, key, authority)")
            + (f", or use {LOOPBACK}" if not loopback else "")
        )
    try:
        token = read_secret(file=access.token_file)
    except SecretUnavailable as error:
        raise RayRefused(f"Ray's token: {error}") from None
    if len(token.reveal()) < MIN_TOKEN_CHARACTERS:
        raise RayRefused(
            f"Ray's token in {access.token_file} is shorter than {MIN_TOKEN_CHARACTERS} characters"
        )
    found = _ALWAYS | {"RAY_AUTH_TOKEN_PATH": str(access.token_file)}
    if loopback:
        # Else Ray takes the address of an interface wherever it is told a loopback one. (The name
        # of the variable tells on which systems that is its default.)
        found["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if access.tls is not None:
        found |= {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(_readable(access.tls.certificate)),
            "RAY_TLS_SERVER_KEY": str(_private(access.tls.key)),
            "RAY_TLS_CA_CERT": str(_readable(access.tls.authority)),
        }
    if storage is not None:
        found |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(storage)}
    return found


def ray_directory(directory: Path) -> Path:
    """Where Ray itself puts its sockets and logs. It opens that to everybody (0777), so it is
    within a directory that is closed: its sockets ask nobody for a token."""
    return directory / "t"


def prepare_directory(directory: Path) -> None:
    """Make the closed directory of a RayMachine, for everything that Ray leaves on this machine.
    Raises OSError, and ValueError for one whose path is too long."""
    if len(os.fsencode(directory)) > MAX_DIRECTORY_BYTES or not directory.is_absolute():
        raise ValueError(
            f"Ray's directory is an absolute path of at most {MAX_DIRECTORY_BYTES} bytes "
            f"(its sockets are below it): {directory}"
        )
    make_private_directory(directory)
    directory.chmod(0o700)


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise RayRefused(f"Ray's TLS: no file {path}")
    return path


def _private(path: Path) -> Path:
    try:
        read_secret(file=path)
    except SecretUnavailable as error:
        raise RayRefused(f"Ray's TLS key: {error}") from None
    return path
