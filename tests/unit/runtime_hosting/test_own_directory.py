"""Which directories of dead processes are removed, and that nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.hosting.own_directory import LOCK, PREFIX, open_own_directory, remove_left_behind

MAKER = """
import subprocess, sys
from pathlib import Path
from runtime.hosting.own_directory import open_own_directory

with open_own_directory(Path(sys.argv[1])) as made:
    (made.path / "state" / "deep").mkdir(parents=True)
    (made.path / "state" / "deep" / "file").write_text("left behind")
    if sys.argv[2:]:  # who inherits the lock lives until our standard input is closed, as we do
        subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"],
                         pass_fds=(made.lock,), stdout=subprocess.DEVNULL)
    print(made.path, flush=True)
    sys.stdin.read()
"""


@contextmanager
def maker(parent: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has made a directory, and the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(parent), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def left_behind(parent: Path) -> Path:
    """A directory whose maker was killed."""
    with maker(parent) as (process, path):
        process.kill()
    return path


def test_a_directory_is_closed_and_goes_with_its_block(tmp_path: Path) -> None:
    with open_own_directory(tmp_path) as made:
        assert made.path.parent == tmp_path
        assert made.path.stat().st_mode & 0o777 == 0o700
        (made.path / "full").mkdir()
        (made.path / "full" / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    assert (path / "state" / "deep" / "file").exists()
    with open_own_directory(tmp_path) as made:
        assert list(tmp_path.iterdir()) == [made.path]


def test_what_a_living_process_has_stays(tmp_path: Path) -> None:
    with maker(tmp_path) as (_, path), open_own_directory(tmp_path) as made:
        assert remove_left_behind(tmp_path) == []
        assert {path, made.path} == set(tmp_path.iterdir())


def test_it_stays_as_long_as_one_lives_that_was_given_the_lock(tmp_path: Path) -> None:
    with maker(tmp_path, "with an heir") as (process, path):
        process.kill()
        process.wait()
        assert remove_left_behind(tmp_path) == []
        assert (path / "state").exists()
        assert process.stdin is not None
        process.stdin.close()
        while not remove_left_behind(tmp_path):
            time.sleep(0.01)  # until the heir has seen it
        assert not path.exists()


def test_the_name_alone_is_no_reason_to_remove_anything(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / LOCK).touch(mode=0o600)
    without_lock = tmp_path / f"{PREFIX}none"
    without_lock.mkdir(mode=0o700)
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}file").touch(mode=0o600)
    linked_lock = tmp_path / f"{PREFIX}linked"
    linked_lock.mkdir(mode=0o700)
    (linked_lock / LOCK).symlink_to(elsewhere / LOCK)
    opened = tmp_path / f"{PREFIX}opened"
    opened.mkdir()
    opened.chmod(0o755)
    (opened / LOCK).touch(mode=0o600)
    before = sorted(tmp_path.rglob("*"))
    assert remove_left_behind(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before
    assert remove_left_behind(tmp_path / "nowhere") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a directory to another user")
def test_another_users_directory_stays(tmp_path: Path) -> None:
    theirs, their_lock = tmp_path / f"{PREFIX}theirs", tmp_path / f"{PREFIX}lock"
    for path in (theirs, their_lock):
        path.mkdir(mode=0o700)
        (path / LOCK).touch(mode=0o600)
    os.chown(theirs, 65_534, 65_534)
    os.chown(their_lock / LOCK, 65_534, 65_534)
    assert remove_left_behind(tmp_path) == []
    assert {theirs, their_lock} == set(tmp_path.iterdir())
    os.chown(theirs, 0, 0)
    os.chown(their_lock / LOCK, 0, 0)
    assert remove_left_behind(tmp_path) == [their_lock, theirs]


def test_what_a_link_in_it_leads_to_stays(tmp_path: Path) -> None:
    path = left_behind(tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (path / "link").symlink_to(kept)
    (path / "state" / "link").symlink_to(kept)
    assert remove_left_behind(tmp_path) == [path]
    assert (kept / "file").exists()
