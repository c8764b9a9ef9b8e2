"""Progress: a bar where there is a terminal, and only what must be known where there is none."""

from __future__ import annotations

import io
import re

from rich.console import Console

from simulations.report.progress import watching

TITLE = "mine {task} [red]\x1b[31m"


def shown(*, terminal: bool) -> str:
    written = io.StringIO()
    console = Console(file=written, width=120, force_terminal=terminal, color_system=None)
    with watching(console, TITLE, 10, steps=True) as watcher:
        watcher.advanced(3.5, failed=2, text="[bold]{x}")
        watcher.say("seed 3: its worker died\x1b[31m; it is run again")
    return written.getvalue()


def test_a_bar_tells_how_many_are_done_and_how_many_failed() -> None:
    text = shown(terminal=True)
    assert "mine {task} [red][31m" in text
    assert "2 did not hold" in text
    assert "[bold]{x}" in text
    assert "seed 3: its worker died" in text
    assert not re.search("\x1b\\[31m", text)


def test_without_a_terminal_only_what_must_be_known_is_told() -> None:
    assert shown(terminal=False) == "seed 3: its worker died[31m; it is run again\n"
