"""What the first start leaves in the state directory, and every later start finds there.

operator-token       the first operator's token, mode 0600; delete it once it is kept elsewhere
operator-token.made  that it was made, so that a deleted one does not come back
encryption-keys      seal the secrets in the database; without them those are lost
cluster-secret       what nodes prove to each other to know (if there are several)
reset-key            lets agents notice at once that the portal was started anew
ca.pem               the CA's certificate for `curl --cacert` and the like, not a secret
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from actors.model import Token
from actors.store.interface import Conflict, Store
from actors.store.sealing import BadKeys, KeyRing, make_ring
from channel.credentials import (
    SECRET_BYTES,
    InvalidToken,
    decode_token,
    encode_token,
)
from portal.settings import PortalSettings, SettingsError
from runtime.clock import Clock
from runtime.cluster.membership import make_secret
from runtime.files import write_file
from runtime.randomness import Randomness, uuid7
from runtime.secret import Secret
from runtime.service import get_logger, has_credential, read_secret

OPERATOR_FILE = "operator-token"
MADE_MARK = "operator-token.made"
RESET_KEY = "reset-key"
RESET_KEY_BYTES = 32
CLUSTER_SECRET = "cluster-secret"  # noqa: S105  # a file's name
ENCRYPTION_KEYS = "encryption-keys"
KEYS_VARIABLE = "HOLLOWAY_ENCRYPTION_KEYS"
KEYS_CREDENTIAL = "holloway-encryption-keys"

log = get_logger("portal")


def prepare_state(directory: Path) -> None:
    """Make the state directory. Others may pass through it (only) if we are root, since the
    account of the embedded PostgreSQL has to reach its own directory. Raises SettingsError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o711 if os.geteuid() == 0 else 0o700)
    except OSError as error:
        raise SettingsError(f"state_dir: {directory}: {error.strerror}") from None


def load_reset_key(directory: Path, randomness: Randomness) -> bytes:
    """The key of stateless resets, made at the first start."""
    path = directory / RESET_KEY
    if not path.exists():
        write_file(path, randomness.bytes(RESET_KEY_BYTES).hex().encode(), mode=0o600)
    return bytes.fromhex(read_secret(file=path).reveal_text())


def load_cluster_secret(settings: PortalSettings, randomness: Randomness) -> Secret:
    """The secret that the nodes share: of the file that is named, or made at the first start.
    Raises SecretUnavailable, OSError."""
    if settings.cluster_secret_file is not None:
        return read_secret(file=settings.cluster_secret_file)
    path = settings.state_dir / CLUSTER_SECRET
    if not path.exists():
        write_file(path, make_secret(randomness).reveal() + b"\n", mode=0o600)
    return read_secret(file=path)


def load_key_ring(settings: PortalSettings, randomness: Randomness) -> KeyRing:
    """The keys that seal secrets in the database: of the file, variable or credential that is
    given, or made at the first start. Raises SecretUnavailable, SettingsError, OSError."""
    file = settings.encryption_keys_file
    value = os.environ.get(KEYS_VARIABLE)
    path = settings.state_dir / ENCRYPTION_KEYS
    if file is None and not value and not has_credential(KEYS_CREDENTIAL):
        file = path
        if not path.exists():
            write_file(path, make_ring(randomness).reveal() + b"\n", mode=0o600)
    text = read_secret(file=file, value=value, credential=KEYS_CREDENTIAL)
    try:
        return KeyRing.parse(text, randomness)
    except BadKeys as error:
        raise SettingsError(f"encryption keys: {error}") from None


async def check_key_ring(store: Store, ring: KeyRing) -> None:
    """That these are the keys of the installation, before anything is sealed by others. Raises
    SettingsError, Unavailable."""
    try:
        await store.check_keys(ring.fingerprints)
    except Conflict:
        raise SettingsError(
            "encryption keys: one has the number of another key by which this database was"
            " sealed. Copy the keys of the other nodes, or of the backup. If they are lost, give"
            " a new key a new number, and set the secrets of providers and directories anew"
        ) from None


async def ensure_operator_token(
    directory: Path,
    store: Store,
    *,
    portal: str,
    pin: bytes,
    clock: Clock,
    randomness: Randomness,
) -> None:
    """Make the operator's token, once in the life of the installation.

    The file comes first and the row after it: a crash between leaves a file whose row the next
    start adds. Raises StoreError, SecretUnavailable (the file is open to others), OSError.
    """
    path, made = directory / OPERATOR_FILE, directory / MADE_MARK
    if made.exists():
        return
    if not path.exists():
        id, secret = uuid7(clock, randomness), randomness.bytes(SECRET_BYTES)
        text = encode_token("operator", id, secret, portal, pin)
        write_file(path, text.reveal() + b"\n", mode=0o600)
        log.info("operator_token_written", file=str(path))
    try:
        token = _row_of(path, clock.utc_now())
    except InvalidToken as error:
        raise InvalidToken(f"{path}: {error}; delete the file to get another token") from None
    if await store.find_token(token.id) is None:
        await store.put_installation_token(token)
    write_file(made, b"", mode=0o600)


def _row_of(path: Path, now: datetime) -> Token:
    decoded = decode_token(read_secret(file=path))
    if decoded.kind != "operator":
        raise InvalidToken(f"a token of the kind {decoded.kind}")
    return Token(
        id=decoded.id,
        account_id=None,
        kind="operator",
        name="first operator",
        hash=decoded.hash,
        created_at=now,
    )
