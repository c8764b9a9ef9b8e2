"""What a farm runs in tests in place of `simulations.run:run`: made-up results, and deaths."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from simulations.result import Checked, Pair, Result
from simulations.scenario.schema import Scenario


def made_up(scenario: Scenario, seed: int, **_: Any) -> Result:
    """Holds, but for seeds that 10 divides."""
    held = seed % 10 != 0
    return Result(
        scenario=scenario.name,
        seed=seed,
        pairs=(
            Pair(
                client="laptop",
                resource="wiki",
                client_nat="easy",
                gateway_nat="easy",
                expected="direct",
                outcome="direct" if held else "failed",
                first_answer_ns=10**8 + seed if held else None,
                asked=3,
                answered=3 if held else 0,
            ),
        ),
        checks=(Checked(number=1, text="the wiki is reached", held=held),),
        virtual_ns=10**9,
        cost={"cpu_s": 0.01},
    )


def chatty(scenario: Scenario, seed: int, *, progress: Any, **_: Any) -> Result:
    """Prints to its standard output, and says how far it is."""
    print('{"seed": 1, "result": {}}')
    os.write(1, b"garbage\n")
    for part in range(4):
        time.sleep(0.3)
        progress(part, 4)
    return made_up(scenario, seed)


def killed_at_first(scenario: Scenario, seed: int, **_: Any) -> Result:
    """Seeds that 3 divides kill their worker when they are run for the first time, as marked in
    the directory that the scenario's description names."""
    mark = Path(scenario.description) / str(seed)
    if seed % 3 == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return made_up(scenario, seed)


def deadly(scenario: Scenario, seed: int, **_: Any) -> Result:
    """Seed 5 kills its worker every time."""
    if seed == 5:
        sys.stderr.write("out of luck\n")
        os._exit(9)
    return made_up(scenario, seed)


def hanging(scenario: Scenario, seed: int, **_: Any) -> Result:
    """Seed 2 never ends."""
    while seed == 2:
        time.sleep(1)
    return made_up(scenario, seed)


def always_dying(scenario: Scenario, seed: int, **_: Any) -> Result:
    os._exit(3)


def failing(scenario: Scenario, seed: int, **_: Any) -> Result:
    raise RuntimeError("an actor was not where it should be")
