"""How to reach a portal: profile, token, trust, and one call over HTTPS with its retries."""

from __future__ import annotations

import os
import ssl
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
import httpx
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from admin.failures import FAILED, UNAVAILABLE, UNTRUSTED, Failure, of_problem, usage
from admin.safety import printable
from channel.credentials import (
    DEFAULT_PORTAL_PORT,
    DecodedToken,
    InvalidToken,
    UntrustedPortal,
    decode_token,
    pin_of,
    verify_portal,
)
from channel.presented import presented_chain
from runtime.net.address import join_host_port, split_host_port
from runtime.secret import Secret
from runtime.service import SecretUnavailable, read_secret

ACCOUNT_HEADER: Final = "Holloway-Account"
CONNECT_TIME_S: Final = 10.0
ANSWER_TIME_S: Final = 60.0
MAX_ATTEMPTS: Final = 6
MAX_LOST: Final = 3
MAX_WAIT_S: Final = 60.0
MAX_PROFILE_BYTES: Final = 65_536
TOO_MANY: Final = 429
RETRIED: Final = (TOO_MANY, 503)


@attrs.frozen(kw_only=True)
class Profile:
    """Where and as whom. What is empty is told by the token, or not needed."""

    portal: str = ""
    ca: Path | None = None
    token_file: Path | None = None
    account: str = ""
    output: str = ""


def profile_path() -> Path:
    """`$XDG_CONFIG_HOME/holloway/admin.toml`, by default below ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "holloway" / "admin.toml"


def read_profile(name: str, path: Path) -> Profile:
    """The profile of this name, or the file's `default`. Without a file and a name, an empty one.

    Raises Failure for a file that cannot be read, or has no such profile.
    """
    try:
        content = path.read_bytes()[: MAX_PROFILE_BYTES + 1]
    except FileNotFoundError:
        if name:
            raise usage(f"there is no profile {name!r}: {path} does not exist") from None
        return Profile()
    except OSError as error:
        raise usage(f"{path}: {error.strerror}") from None
    try:
        file = msgspec.convert(tomllib.loads(content.decode()), _ProfileFile)
    except (ValueError, msgspec.ValidationError) as error:
        raise usage(f"{path} is no file of profiles: {error}") from None
    name = name or file.default
    if not name:
        return Profile()
    if name not in file.profiles:
        known = ", ".join(sorted(file.profiles)) or "none"
        raise usage(f"{path} has no profile {name!r} (but: {known})")
    found = file.profiles[name]
    return Profile(
        portal=found.portal,
        ca=_near(path, found.ca),
        token_file=_near(path, found.token_file),
        account=found.account,
        output=found.output,
    )


class _ProfileEntry(msgspec.Struct, forbid_unknown_fields=True):
    portal: str = ""
    ca: str = ""
    token_file: str = ""
    account: str = ""
    output: str = ""


class _ProfileFile(msgspec.Struct, forbid_unknown_fields=True):
    default: str = ""
    profiles: dict[str, _ProfileEntry] = {}


def _near(path: Path, text: str) -> Path | None:
    """A path of a profile; a relative one lies beside the file."""
    return path.parent / Path(text).expanduser() if text else None


def read_token(file: Path | None) -> Secret:
    """From the file that is given, or HOLLOWAY_TOKEN_FILE, or HOLLOWAY_TOKEN. Raises Failure."""
    named = file or os.environ.get("HOLLOWAY_TOKEN_FILE") or None
    value = os.environ.get("HOLLOWAY_TOKEN")
    if named is None and not value:
        raise usage(
            "no token: put one into a file of mode 0600 and name it by --token-file,"
            " HOLLOWAY_TOKEN_FILE or a profile; or set HOLLOWAY_TOKEN"
        )
    try:
        return read_secret(file=named, value=value)
    except SecretUnavailable as error:
        raise usage(f"the token: {error}") from None


class _Lost(Failure):
    """The call went out, and no answer came back: it may have been carried out, or not."""


class Connection:
    """One portal, called as one token's owner. To be closed.

    `account_id` is the account that an operator acts on.
    """

    def __init__(self, *, base_url: str, token: Secret, tls: ssl.SSLContext) -> None:
        self.account_id = ""
        self._token = token
        self._client = httpx.Client(
            base_url=base_url,
            verify=tls,
            timeout=httpx.Timeout(ANSWER_TIME_S, connect=CONNECT_TIME_S),
            follow_redirects=False,
            trust_env=False,
        )

    @classmethod
    @contextmanager
    def open(cls, profile: Profile) -> Iterator[Connection]:
        """Prove the portal, by the CA file that is given or else the pin of the token, before the
        token is sent. Raises Failure."""
        token = read_token(profile.token_file)
        try:
            decoded = decode_token(token)
        except InvalidToken as error:
            raise usage(str(error)) from None
        if decoded.kind not in ("api", "operator"):
            raise usage(f"this is a token for a {decoded.kind}; the API wants one of an admin")
        host, port = host_and_port(profile.portal or decoded.portal)
        if profile.ca is not None:
            tls = _trusting_file(profile.ca)
        else:
            tls = _trusting_pin(host, port, decoded)
        base_url = f"https://{join_host_port(host, port)}"
        connection = cls(base_url=base_url, token=token, tls=tls)
        try:
            yield connection
        finally:
            connection.close()

    def close(self) -> None:
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        again: bool = False,
        flags: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """One call, and its answer if that is a success.

        With `again`, a call that may be repeated is: while the portal is busy or away (429, 503)
        and says when, and where its answer was lost on the way. Raises Failure for whatever is not
        a success.
        """
        content = None if body is None else msgspec.json.encode(body)
        waited_s, attempt = 0.0, 0
        while True:
            attempt += 1
            try:
                answer = self._send(method, path, query, content, headers)
            except _Lost:
                if not again or attempt >= MAX_LOST:
                    raise
                continue
            if answer.is_success:
                return answer
            wait_s = _retry_after_s(answer)
            if (
                not again
                or answer.status_code not in RETRIED
                or attempt >= MAX_ATTEMPTS
                or waited_s + wait_s > MAX_WAIT_S
            ):
                raise of_problem(answer.status_code, _problem(answer), flags or {})
            if attempt == 1 and answer.status_code != TOO_MANY:
                sys.stderr.write("the portal is busy or away: asking again, for a minute at most\n")
            time.sleep(wait_s)
            waited_s += wait_s

    @contextmanager
    def understood(self) -> Iterator[None]:
        """For the length of the block answers are taken to be as described. Raises Failure for one
        that is not: whatever a portal sends, a command ends with a sentence."""
        try:
            yield
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise Failure(
                FAILED,
                f"the answer of the portal cannot be understood ({type(error).__name__}); are"
                " both of one version?",
            ) from error

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[Iterator[str]]:
        """The lines of an answer that goes on. Raises Failure."""
        try:
            with self._client.stream(
                "GET", path, headers=self._headers(headers), timeout=None
            ) as answer:
                if not answer.is_success:
                    answer.read()
                    raise of_problem(answer.status_code, _problem(answer), {})
                yield answer.iter_lines()
        except httpx.HTTPError as error:
            raise Failure(UNAVAILABLE, f"the portal went away ({_reason(error)})") from None

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        content: bytes | None,
        headers: Mapping[str, str] | None,
    ) -> httpx.Response:
        try:
            return self._client.request(
                method.upper(),
                path,
                params=query,
                content=content,
                headers=self._headers(headers)
                | ({"content-type": "application/json"} if content is not None else {}),
            )
        except httpx.HTTPError as error:
            where = printable(str(self._client.base_url))
            kind = Failure if isinstance(error, httpx.ConnectError) else _Lost
            raise kind(
                UNAVAILABLE,
                f"no answer from the portal at {where} ({_reason(error)}); is it running?",
            ) from None

    def _headers(self, headers: Mapping[str, str] | None) -> dict[str, str]:
        own = {
            "authorization": f"Bearer {self._token.reveal_text()}",
            "user-agent": f"holloway-admin/{version('holloway')}",
        }
        if self.account_id:
            own[ACCOUNT_HEADER] = self.account_id
        return own | dict(headers or {})


def host_and_port(text: str) -> tuple[str, int]:
    """Of `host`, `host:port` or `https://host:port`. Raises Failure."""
    if "://" in text:
        url = urlsplit(text)
        if url.scheme != "https" or url.path not in ("", "/"):
            raise usage(f"--portal: {printable(text)} is not https://host:port")
        text = url.netloc
    try:
        return split_host_port(text, DEFAULT_PORTAL_PORT)
    except ValueError as error:
        raise usage(f"--portal: {error}") from None


def _trusting_file(path: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise usage(f"--ca: {path}: {error.strerror or error}") from None


def _trusting_pin(host: str, port: int, token: DecodedToken) -> ssl.SSLContext:
    """TLS that trusts the CA which the token's pin names, and no other.

    The CA's certificate is taken from what the server presents, in a connection on which nothing is
    sent. What speaks for it is the pin alone (see `verify_portal`).
    """
    chain = _presented(host, port)
    try:
        verify_portal(chain, pin=token.pin, host=host, at=datetime.now(UTC))
    except UntrustedPortal as error:
        raise Failure(
            UNTRUSTED,
            f"{host}:{port} is not the portal of this token: {printable(str(error))}. Nothing was"
            " sent to it. Check --portal; for a certificate of another authority name that by --ca",
        ) from None
    root = next(each for each in chain if pin_of(each) == token.pin)
    return ssl.create_default_context(cadata=root.public_bytes(Encoding.PEM).decode())


def _presented(host: str, port: int) -> list[x509.Certificate]:
    """The certificates that a server presents, whoever it is."""
    try:
        return presented_chain(host, port, timeout_s=CONNECT_TIME_S)
    except OSError as error:
        raise Failure(
            UNAVAILABLE,
            f"no portal answers at {host}:{port} ({_reason(error)}); is it running?",
        ) from None
    except ValueError:
        raise Failure(
            UNTRUSTED, f"{host}:{port} presents no certificate that one can read"
        ) from None


def _reason(error: Exception) -> str:
    return printable(str(error)) or type(error).__name__


def _problem(answer: httpx.Response) -> Mapping[str, Any]:
    try:
        found = msgspec.json.decode(answer.content)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _retry_after_s(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "1")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 1.0
