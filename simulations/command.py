"""The subcommands of the simulator: `demo` and `sim`."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter


def demo(
    *,
    json: Annotated[bool, Parameter(negative="")] = False,
    keep: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Watch a whole access on this machine, in network namespaces: denied, direct, cut, relayed.

    The exit status is 0 when every outcome held, 1 when one did not, 2 when it cannot run here.

    Parameters
    ----------
    json
        Print one JSON object with every outcome and figure to standard output.
    keep
        Keep everything running at the end, to look around, until Ctrl-C.
    """
    from simulations.demo import run_demo

    sys.exit(run_demo(as_json=json, keep=keep))
