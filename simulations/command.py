"""The subcommands of the simulator: `demo` and `sim`."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import App, Parameter

sim_app = App(name="sim", help="Replay an access in virtual time; break a real installation.")
sim_app.command("simulations.drill.command:drill", name="drill", help="Break what runs here.")


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


@sim_app.default
def sim(
    *,
    seed: int = 1,
    nat: Literal["port_restricted", "symmetric"] = "port_restricted",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Replay one whole access in virtual time, the same for the same seed.

    The exit status is 0 when access was denied, then given, then cut, as it has to be.

    Parameters
    ----------
    seed
        From which everything random is drawn.
    nat
        What both NATs are: an easy one, which is punched, or a hard one, which needs the relay.
    json
        Print one JSON object.
    """
    import json as json_module

    import attrs

    from runtime.service import configure_logging
    from simulations.access import Access
    from simulations.nat import PORT_RESTRICTED, SYMMETRIC

    configure_logging("text", "warning")
    report = Access(seed, SYMMETRIC if nat == "symmetric" else PORT_RESTRICTED).run()
    if json:
        print(json_module.dumps(attrs.asdict(report)))
    else:
        print(
            f"denied without a policy: {'yes' if report.denied_at_first else 'NO'}\n"
            f"answered with one:       {'yes' if report.answered else 'NO'}, {report.path}, "
            f"after {report.first_answer_ns / 1e6:.0f} virtual ms\n"
            f"cut when it went:        {'yes' if report.cut_after_revocation else 'NO'}\n"
            f"datagrams:               {report.datagrams}\n"
            f"trace of seed {report.seed}:         {report.trace}"
        )
    held = report.denied_at_first and report.answered and report.cut_after_revocation
    sys.exit(0 if held else 1)
