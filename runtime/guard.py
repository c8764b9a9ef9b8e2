"""One input that meets a mistake of ours does not end the process.

Decoders refuse what is malformed with their own errors. What is left are mistakes in our code
that some input finds; a stranger who finds one must not be able to stop a relay for everybody.
So each loop that takes inputs handles every one of them under a `Guard`, which logs and counts.

In tests a mistake has to be seen: after `surface_failures`, or where the environment has
HOLLOWAY_SURFACE_FAILURES, guards let every exception through.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Final

from runtime.service import get_logger

VARIABLE: Final = "HOLLOWAY_SURFACE_FAILURES"

_surfacing = bool(os.environ.get(VARIABLE))


def surface_failures(surface: bool = True) -> bool:
    """Whether guards let exceptions through, from now on in this process; what held before."""
    global _surfacing
    before, _surfacing = _surfacing, surface
    return before


class Guard:
    """Use it as `with guard:` around the handling of one input. Cancellation and the end of the
    process pass through it. `failures` counts what it held back.

    Whoever found the mistake can repeat it at will, so only the 1st, 2nd, 4th, 8th, ... failure
    is logged, with its traceback (which holds no values). Exceptions of `passes` are no mistakes of
    ours, but how the handling says what is wrong with the input: they go on to whoever asked.
    """

    __slots__ = ("_component", "_passes", "failures")

    def __init__(self, component: str, passes: tuple[type[Exception], ...] = ()) -> None:
        self._component = component
        self._passes = passes
        self.failures = 0

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, self._passes):
            return False
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:
            log = get_logger(self._component)
            log.error("input_failed", failures=self.failures, exc_info=error)
        return not _surfacing
