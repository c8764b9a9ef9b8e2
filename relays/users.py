"""The users of a stand-alone relay, from a file or named one by one.

There is no flag for a password, since every user of a machine can read command lines.
"""

from __future__ import annotations

import getpass
import os
import sys
from typing import Final

from relays.settings import RelaySettings, SettingsError, parse_users
from runtime.service import SecretUnavailable, has_credential, read_secret

VARIABLE: Final = "HOLLOWAY_RELAY_PASSWORD"
CREDENTIAL: Final = "holloway-relay-password"


def read_users(settings: RelaySettings) -> dict[str, str]:
    """User names and passwords: those of `users_file`, and each `user`. The variable is taken out
    of the environment. Raises SettingsError, runtime.service.SecretUnavailable."""
    users = {}
    if settings.users_file is not None:
        users = parse_users(read_secret(file=settings.users_file).reveal_text())
    if not settings.user:
        return users
    if twice := users.keys() & set(settings.user):
        raise SettingsError(f"user: {min(twice)} is in users_file too")
    password = _password(settings)
    if not password:
        raise SettingsError("user: the password is empty")
    return {**users, **dict.fromkeys(settings.user, password)}


def _password(settings: RelaySettings) -> str:
    value = os.environ.pop(VARIABLE, None)
    if settings.password_file is not None or value or has_credential(CREDENTIAL):
        secret = read_secret(file=settings.password_file, value=value, credential=CREDENTIAL)
        return secret.reveal_text()
    if not sys.stdin.isatty():
        raise SecretUnavailable(
            f"no password is given: set --password-file, {VARIABLE}, or the systemd credential "
            f"{CREDENTIAL}, or start the relay in a terminal to be asked"
        )
    return getpass.getpass(f"Password of {', '.join(settings.user)}: ").strip()
