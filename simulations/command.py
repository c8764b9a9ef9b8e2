"""The subcommands of the simulator: `demo` and `sim`."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import App, Parameter

sim_app = App(name="sim", help="Rehearse networks, faults and policies, in virtual time.")
for _name, _help in {
    "run": "Run a scenario: from one seed, or from many.",
    "replay": "Run a saved failure again.",
    "shrink": "Make a failing scenario small.",
    "compare": "Compare two reports.",
}.items():
    sim_app.command(f"simulations.sim_command:{_name}", name=_name, help=_help)
sim_app.command("simulations.sim_command:list_", name="list", help="List ready-made scenarios.")
sim_app.command("simulations.drill.command:drill", name="drill", help="Break what runs here.")


def demo(
    *,
    json: Annotated[bool, Parameter(negative="")] = False,
    keep: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Watch a whole access on this machine, in network namespaces: denied, direct, cut, relayed.

    Where this machine permits no namespaces, or is not root's, the story is told in virtual time,
    and that is said. The exit status is 0 when every outcome held, 1 when one did not.

    Parameters
    ----------
    json
        Print one JSON object with every outcome and figure to standard output.
    keep
        Keep everything running at the end, to look around, until Ctrl-C.
    """
    from simulations.demo import run_demo

    sys.exit(run_demo(as_json=json, keep=keep))
