"""The subcommands of the simulator: `demo` and `sim`."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import App, Parameter

sim_app = App(name="sim", help="Rehearse networks, faults and policies, in virtual time.")
_EXITS = "2 when a file or the command is wrong, 3 when something of the simulator failed."
_HELP = {  # here, so that the list of commands brings in nothing
    "run": "Run a scenario: from one seed, or from many.\n\n"
    f"The exit status is 0 when every run held, 1 when one did not, {_EXITS}",
    "replay": "Run a saved failure again.\n\n"
    f"The exit status is 1 when it fails again, 0 when it does not, {_EXITS}",
    "shrink": "Make a failing scenario small.\n\n"
    f"The exit status is 0 when a file was written, 1 when the seed does not fail, {_EXITS}",
    "compare": "Compare two reports.\n\n"
    "Worse is: a smaller share of runs or checks held, or of pairs was direct; more failed; a rule "
    "was broken more often; the median or 95th percentile of a time grew; all beyond a tolerance. "
    f"The exit status is 0 when the second is not worse, 1 when it is, {_EXITS}",
    "list": "List the ready-made scenarios.",
}
for _name, _help in _HELP.items():
    _function = "list_" if _name == "list" else _name
    sim_app.command(f"simulations.sim_command:{_function}", name=_name, help=_help)
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
