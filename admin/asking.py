"""Asking the person at the terminal."""

from __future__ import annotations

import sys

from admin.failures import FAILED, Failure


def is_somebody_here() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def ask(question: str) -> None:
    """Raises Failure unless the answer is `yes`."""
    sys.stderr.write(f"{question} Only `yes` will do: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip() != "yes":
        raise Failure(FAILED, "nothing was done")
