"""The command line as somebody meets it who gets everything wrong: one sentence, no stack trace."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[2]


def attempt(*argv: str, **env: str) -> tuple[int, str]:
    """Run `holloway argv` to its end: its exit status, and what it said to stderr."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HOLLOWAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "holloway", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean | env,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[up]\nfrob = 1\n", "Unknown option"),
        ("[upp]\nname = 'x'\n", "'upp' is none of [portal], [cluster]"),
        ("name = 'x'\n", "'name' is none of"),
        ("[up\n", "is no TOML"),
        ("[up]\nmark = 'x'\n", "unable to convert"),
    ],
)
def test_a_settings_file_that_nobody_understands_is_refused(
    tmp_path: Path, content: str, words: str
) -> None:
    file = tmp_path / "holloway.toml"
    file.write_text(content)
    code, said = attempt("--config", str(file), "up", "--state-dir", str(tmp_path))
    assert code != 0
    assert words in said


def test_a_settings_file_that_is_not_there_is_named() -> None:
    code, said = attempt("status", HOLLOWAY_CONFIG="/nowhere/holloway.toml")
    assert (code, said) == (
        1,
        "holloway: the settings file /nowhere/holloway.toml: No such file or directory",
    )


def test_a_table_of_the_file_is_what_its_subcommand_reads(tmp_path: Path) -> None:
    file = tmp_path / "holloway.toml"
    file.write_text("[up]\ninterface = 'a'\n\n[relay]\nlisten = ['file']\n")
    code, said = attempt("--config", str(file), "relay")
    assert code == 1
    assert said.startswith("holloway relay: listen: no port in 'file'")
    code, said = attempt("--config", str(file), "relay", HOLLOWAY_RELAY_LISTEN="other")
    assert said.startswith("holloway relay: listen: no port in 'other'")
    code, said = attempt("--config", str(file), "relay", "--listen", "flag")
    assert said.startswith("holloway relay: listen: no port in 'flag'")


def test_a_taken_port_is_named_with_its_setting_and_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = attempt(
            "portal", "--state-dir", str(tmp_path), "--listen", "127.0.0.1:0",
            "--observability", address,
        )  # fmt: skip
    assert code == 1
    assert said == (
        f"holloway portal: observability: cannot listen on {address}: Address already in use "
        "(another process has that port: end it, or set another)"
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--observability", "nowhere"], "observability: no port in 'nowhere'"),
        (["--observability", "192.0.2.77:1"], "observability: cannot listen on 192.0.2.77:1"),
        (["--listen", "nowhere"], "listen: no port in 'nowhere'"),
        (["--state-dir", "/proc/nowhere"], "state_dir: /proc/nowhere: No such file"),
        (["--database-url-file", "/nowhere"], "/nowhere: No such file"),
    ],
)
def test_settings_of_the_portal_that_cannot_work_are_named(
    tmp_path: Path, argv: list[str], words: str
) -> None:
    env = {"HOLLOWAY_PORTAL_STATE_DIR": str(tmp_path)}
    code, said = attempt("portal", *argv, **env)
    assert code == 1
    assert said.startswith("holloway portal: ")
    assert words in said


def test_a_url_of_no_database_is_refused_without_being_shown(tmp_path: Path) -> None:
    code, said = attempt(
        "portal", "--state-dir", str(tmp_path), "--observability", "",
        DATABASE_URL="mysql://ada:opensesame@nowhere",
    )  # fmt: skip
    assert code == 1
    assert "opensesame" not in said


def test_a_database_that_cannot_be_reached_is_waited_for_in_whole_lines_of_json(
    tmp_path: Path,
) -> None:
    portal = subprocess.Popen(
        [sys.executable, "-m", "holloway", "portal", "--log-format", "json"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {
            "DATABASE_URL": "postgresql://ada:opensesame@127.0.0.1:1/holloway",
            "HOLLOWAY_PORTAL_STATE_DIR": str(tmp_path),
            "HOLLOWAY_PORTAL_OBSERVABILITY": "",
        },
    )
    assert portal.stderr is not None
    first = json.loads(portal.stderr.readline())
    portal.terminate()
    _, said = portal.communicate(timeout=60)
    assert portal.returncode == 0
    assert first["event"] == "database_unavailable"
    assert "Connection refused Is the server running" in first["error"]
    assert "opensesame" not in str(first) + said
    assert all(json.loads(line) for line in said.splitlines())


def test_netcheck_without_a_server_or_with_a_wrong_word_says_what_to_do(tmp_path: Path) -> None:
    nothing = ("netcheck", "--state-dir", str(tmp_path))
    for argv, words in (
        ((), "name servers by --stun HOST:PORT"),
        (("--stun", "host:x"), "--stun: no port in 'host:x'"),
        (("--stun", "127.0.0.1", "--export", "/nowhere/file"), "there is no directory /nowhere"),
        (("--stun", "127.0.0.1", "--export", str(tmp_path / "f"), "--name", "My Flat"), "--name"),
        (("--token-file", str(tmp_path / "none")), "--token-file"),
    ):
        code, said = attempt(*nothing, *argv)
        assert code == 2
        assert words in said
