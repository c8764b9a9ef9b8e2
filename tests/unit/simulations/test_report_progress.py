"""Progress: a bar where there is a terminal, a line a minute where there is none."""

from __future__ import annotations

import io
import re

from rich.console import Console

from runtime.clock import NS_PER_S, VirtualClock
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


def test_without_a_terminal_each_minute_has_a_line() -> None:
    written = io.StringIO()
    console = Console(file=written, width=20, force_terminal=False, color_system=None)
    clock = VirtualClock()
    with watching(console, TITLE, 1200, steps=True, clock=clock) as watcher:
        for minute in range(4):
            for _ in range(6):
                clock.advance(10 * NS_PER_S)
                watcher.advanced(100.5 * (minute + 1), failed=minute // 2)
    assert written.getvalue().splitlines() == [
        "mine {task} [red][31m: 100 of 1,200, about 11 min left",
        "mine {task} [red][31m: 201 of 1,200, about 10 min left",
        "mine {task} [red][31m: 301 of 1,200, 1 did not hold, about 9 min left",
        "mine {task} [red][31m: 402 of 1,200, 1 did not hold, about 8 min left",
    ]


def test_what_must_be_known_is_told_at_once() -> None:
    assert shown(terminal=False) == "seed 3: its worker died[31m; it is run again\n"
