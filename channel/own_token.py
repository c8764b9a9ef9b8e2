"""The token by which an agent of this machine joins: from a file, the environment or systemd.

There is no flag for it, since every user of a machine can read command lines.
"""

from __future__ import annotations

import os
from pathlib import Path

from channel.credentials import InvalidToken, TokenKind, decode_token
from runtime.secret import Secret
from runtime.service import SecretUnavailable, read_secret


def read_token(command: str, kind: TokenKind, file: Path | None) -> Secret:
    """The token of what was started as `holloway <command>`: from `file`, or else the variable
    HOLLOWAY_<COMMAND>_TOKEN (taken out of the environment), or else the systemd credential
    `holloway-<command>-token`.

    Raises SecretUnavailable when there is none or its file is unfit, InvalidToken when it is no
    token or one of another kind than `kind`.
    """
    variable, credential = f"HOLLOWAY_{command.upper()}_TOKEN", f"holloway-{command}-token"
    value = os.environ.pop(variable, None)
    if file is None and not value and "CREDENTIALS_DIRECTORY" not in os.environ:
        raise SecretUnavailable(
            f"no token is given: set --token-file, {variable}, or the systemd credential "
            f"{credential}"
        )
    token = read_secret(file=file, value=value, credential=credential)
    found = decode_token(token).kind
    if found != kind:
        raise InvalidToken(f"the token is for {_with_article(found)}, and this is a {kind}")
    return token


def _with_article(kind: TokenKind) -> str:
    called = {"api": "the API", "operator": "an operator"}
    return called.get(kind, f"a {kind}")
