"""Progress while seeds are run: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from admin.safety import printable
from runtime.clock import NS_PER_S, Clock, SystemClock

LINE_INTERVAL_NS: Final = 60 * NS_PER_S


class Watcher(Protocol):
    """Is told how far the whole is."""

    def advanced(self, done: float, *, failed: int, text: str = "") -> None:
        """`done` of the total that was announced; `failed`: runs that did not hold so far."""

    def say(self, text: str) -> None:
        """Something that should be known at once, such as a worker that died."""


class Lines:
    """Tells how far the whole is every LINE_INTERVAL_NS, and what must be known at once."""

    def __init__(
        self, say: Callable[[str], None], title: str, total: float, clock: Clock, *, steps: bool
    ) -> None:
        self._say = say
        self._title = title
        self._total = total
        self._clock = clock
        self._steps = steps
        self._began_ns = clock.monotonic_ns()
        self._told_ns = self._began_ns

    def advanced(self, done: float, *, failed: int, text: str = "") -> None:
        now = self._clock.monotonic_ns()
        if now - self._told_ns < LINE_INTERVAL_NS:
            return
        self._told_ns = now
        share = done / self._total
        how_far = f"{int(done):,} of {self._total:,.0f}" if self._steps else f"{share:.0%}"
        parts = [how_far, f"{failed:,} did not hold" if failed else "", text]
        if done > 0:
            left_ns = (now - self._began_ns) * (1 - share) / share
            parts.append(f"about {max(1, round(left_ns / (60 * NS_PER_S)))} min left")
        self.say(f"{self._title}: {', '.join(part for part in parts if part)}")

    def say(self, text: str) -> None:
        self._say(printable(text))


class Bar:
    """A bar, with what remains and how many failed."""

    def __init__(self, progress: Progress, title: str, total: float) -> None:
        self._progress = progress
        self._task = progress.add_task(printable(title), total=total, failed="", text="")

    def advanced(self, done: float, *, failed: int, text: str = "") -> None:
        told = f"[red]{failed:,} did not hold[/red]" if failed else ""
        self._progress.update(self._task, completed=done, failed=told, text=printable(text)[:40])

    def say(self, text: str) -> None:
        self._progress.console.print(printable(text), markup=False, highlight=False)


@contextmanager
def watching(
    console: Console, title: str, total: float, *, steps: bool, clock: Clock | None = None
) -> Iterator[Watcher]:
    """Shows progress towards `total` while the block runs; `steps`: it is a count of runs."""
    if not console.is_terminal:

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield Lines(say, title, total, clock or SystemClock(), steps=steps)
        return
    how_far = MofNCompleteColumn() if steps else TaskProgressColumn()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        how_far,
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, title, total)
