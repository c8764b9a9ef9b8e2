"""`holloway netcheck`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import msgspec
import trio
from cyclopts import Parameter

from channel.credentials import DecodedToken, InvalidToken, decode_token
from clients.netcheck.export import is_name, to_fragment
from clients.netcheck.output import render
from clients.netcheck.shell import MAX_SERVERS, Wanted, check, may_mark
from clients.settings import DEFAULT_MARK, DEFAULT_STATE_DIR
from runtime.control import ControlUnavailable, ask_control
from runtime.files import write_file
from runtime.net.address import Address, split_host_port
from runtime.service import SecretUnavailable, read_secret
from tunnel.shell.process import CONTROL_SOCKET

USAGE: Final = 2


def netcheck(
    *,
    stun: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    state_dir: Path = DEFAULT_STATE_DIR,
    token_file: Path | None = None,
    mark: int = DEFAULT_MARK,
    json: Annotated[bool, Parameter(negative="")] = False,
    export: Path | None = None,
    name: str = "captured",
    user: str = "someone",
) -> None:
    """Find out how this network treats UDP: NAT, firewall, IPv6, round trips.

    Asks the relays that the running client was told of, or the STUN servers named here, with at
    most 69 small packets for each IP family, and makes one TLS connection to the portal. Needs no
    root where servers are named.

    Parameters
    ----------
    stun
        HOST or HOST:PORT of a STUN server (3478 otherwise); may be said several times. Two at
        different addresses tell how a NAT maps, one of them at two ports on what that depends;
        so does a single one that has two addresses (RFC 5780).
    state_dir
        The folder that `holloway up` was given, to ask the running client for its relays.
    token_file
        File with a token, whose portal is reached by TLS and proved by the token's pin. The token
        itself is not sent.
    mark
        Mark (SO_MARK) of the sockets, as that of `holloway up`, so that a tunnel is not measured;
        used where the system permits it.
    json
        Print everything that was found as one JSON object.
    export
        Write the network to this file, as a part of a scenario: `holloway sim run SCENARIO --add
        FILE` places a client in it.
    name
        What the exported network is called.
    user
        Whose the exported client is, in the scenario.
    """
    if export is not None:
        _check_export(export, name, user)
    token = None if token_file is None else _token(token_file)
    status = _status(state_dir, needed=not stun and token is None)
    servers = stun or _relays_of(status)
    for server in servers:
        try:
            split_host_port(server, 0)
        except ValueError as error:
            _end(f"--stun: {error}")
    if len(servers) > MAX_SERVERS:
        if stun:
            _end(f"--stun: at most {MAX_SERVERS} servers are asked")
        servers = servers[:MAX_SERVERS]
    portal = _door_of(status) if token is None else token.portal
    if not servers and not portal:
        _end("the client here was told of no relays yet: name servers by --stun HOST:PORT")
    wanted = Wanted(
        servers=servers,
        portal=portal,
        pin=None if token is None else token.pin,
        mark=mark if may_mark(mark) else None,
    )
    report = trio.run(check, wanted)
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
    else:
        render(report)
    if export is not None:
        text = to_fragment(report, name=name, user=user, at=datetime.now(UTC))
        try:
            write_file(export, text.encode(), mode=0o644)
        except OSError as error:
            _end(f"--export: {export}: {error.strerror}")
        if not json:
            sys.stdout.write(f"the network: {export}\n")


def _check_export(export: Path, name: str, user: str) -> None:
    """What cannot be written is found out before anything is measured."""
    if not export.parent.is_dir():
        _end(f"--export: there is no directory {export.parent}")
    for flag, text in (("--name", name), ("--user", user)):
        if not is_name(text):
            _end(f"{flag}: {text!r} is no name of a scenario: lower-case letters, digits, - and _")


def _token(file: Path) -> DecodedToken:
    try:
        return decode_token(read_secret(file=file))
    except (SecretUnavailable, InvalidToken) as error:
        _end(f"--token-file: {error}")


def _status(state_dir: Path, *, needed: bool) -> dict[str, Any]:
    """What the running client says; nothing where there is none and servers were named."""
    path = state_dir / CONTROL_SOCKET
    try:
        return ask_control(path, {"command": "status"})
    except ControlUnavailable:
        if needed:
            _end("no client runs here that knows relays: name servers by --stun HOST:PORT")
    except PermissionError:
        if needed:
            _end(f"{path} belongs to another user; try with sudo, or name servers by --stun")
    return {}


def _relays_of(status: dict[str, Any]) -> tuple[str, ...]:
    """One address of each relay first, so that as many as possible are asked."""
    by_relay = [relay["addresses"] for relay in status.get("relays", ())]
    rounds = range(max(map(len, by_relay), default=0))
    found = [each[turn] for turn in rounds for each in by_relay if turn < len(each)]
    return tuple(str(Address.parse(each)) for each in found)


def _door_of(status: dict[str, Any]) -> str:
    return str(status.get("channel", {}).get("door", ""))


def _end(why: str) -> NoReturn:
    sys.stderr.write(f"holloway netcheck: {why}\n")
    sys.exit(USAGE)
