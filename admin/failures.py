"""How a command ends that does not succeed: one sentence that says what to do, and a status by the
kind of failure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from admin.safety import printable

FAILED: Final = 1
USAGE: Final = 2
REFUSED: Final = 3
NOT_FOUND: Final = 4
UNAVAILABLE: Final = 5
UNTRUSTED: Final = 6
STATUS_OF_HTTP: Final = {404: NOT_FOUND, 410: NOT_FOUND} | dict.fromkeys(
    (408, 429, 502, 503, 504), UNAVAILABLE
)
MAX_TOLD_FIELDS: Final = 20


class Failure(Exception):
    """Ends a command with this exit status. The text is for the terminal, and safe for it. `http`
    is the status that the portal answered, 0 if it is not the portal that says so."""

    def __init__(self, status: int, text: str, http: int = 0) -> None:
        super().__init__(text)
        self.status = status
        self.http = http


def usage(text: str) -> Failure:
    """The command itself cannot be meant."""
    return Failure(USAGE, text)


def of_problem(status: int, problem: Mapping[str, Any], flags: Mapping[str, str]) -> Failure:
    """An answer of the portal (RFC 9457) that is no success. `flags` are by the fields that they
    fill."""
    detail = printable(str(problem.get("detail") or f"The portal answered {status}."))
    if problem.get("code") == "account_required":
        detail = "An operator names the account to act on: --account SLUG."
    errors = problem.get("errors", ())[:MAX_TOLD_FIELDS]
    if errors and problem.get("code") == "invalid_fields":
        detail = detail.partition(":")[0] + ":"  # what follows it is said once more below
    lines = [detail]
    for error in errors:
        field = printable(str(error.get("field", "")))
        message = printable(str(error.get("message", "")))
        lines.append(f"  {flags.get(field, field) or 'body'}: {message}")
    named = [f"{problem[name]}" for name in ("code", "request_id") if problem.get(name)]
    if named:
        lines.append("  (" + printable(", request ".join(named)) + ")")
    exit_status = STATUS_OF_HTTP.get(status, REFUSED if 400 <= status < 500 else FAILED)
    return Failure(exit_status, "\n".join(lines), http=status)
