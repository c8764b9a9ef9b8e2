"""How much work one question may cost.

Questions are worked out in a thread, which nothing stops; so that an account made for the purpose
cannot keep one busy for hours, they count what they do. A core reads no clock, so effort is counted
in steps: a step is a fraction of a microsecond, one comparison of a condition with a value.
"""

from __future__ import annotations

from typing import Final

import attrs

MAX_STEPS: Final = 20_000_000
"""Some seconds. A policy of 10,000 users takes a hundredth of that."""
OF_A_POLICY: Final = 16
"""Steps to ask one policy."""
OF_A_PAIR: Final = 16
"""Steps to look at one principal and one resource."""


class Exhausted(Exception):
    """A question would cost more than it may."""


@attrs.define
class Effort:
    """What is left for one question."""

    steps: int = MAX_STEPS

    def spend(self, steps: int) -> None:
        """Raises Exhausted when there is no more."""
        self.steps -= steps
        if self.steps < 0:
            raise Exhausted
