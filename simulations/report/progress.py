"""Progress on the terminal while seeds are run; nothing where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

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


class Watcher(Protocol):
    """Is told how far the whole is."""

    def advanced(self, done: float, *, failed: int, text: str = "") -> None:
        """`done` of the total that was announced; `failed`: runs that did not hold so far."""

    def say(self, text: str) -> None:
        """Something that should be known at once, such as a worker that died."""


class Quiet:
    """Tells nothing but what must be known, line by line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def advanced(self, done: float, *, failed: int, text: str = "") -> None:
        pass

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
def watching(console: Console, title: str, total: float, *, steps: bool) -> Iterator[Watcher]:
    """Shows progress towards `total` while the block runs; `steps`: it is a count of runs."""
    if not console.is_terminal:
        yield Quiet(lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
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
