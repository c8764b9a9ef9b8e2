"""A process of the farm: `python -m simulations.farm.worker`, run by `farm.local`.

Lines of JSON. In: the job, then seeds, each `{"seed": 3}`. Out: `{"seed": 3, "done": 0.4}` now and
then, and `{"seed": 3, "result": {...}}`. What a run prints goes to the standard error, so that it
cannot be taken for a line. When its input ends, its parent is gone: it ends at once, in the middle
of a run too.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from typing import Any, BinaryIO, Final

import msgspec

from simulations.farm.job import decode_job, perform

PROGRESS_S: Final = 0.5


def main() -> None:
    """Run seeds until the input ends."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, lines), daemon=True).start()
    job = decode_job(lines.get())
    while True:
        seed = msgspec.json.decode(lines.get())["seed"]
        told = time.monotonic()

        def progress(over_ns: int, all_ns: int, seed: int = seed) -> None:
            nonlocal told
            if time.monotonic() - told > PROGRESS_S and all_ns > 0:
                told = time.monotonic()
                _write(output, {"seed": seed, "done": min(over_ns / all_ns, 1.0)})

        _write(output, {"seed": seed, "result": perform(job, seed, progress)})


def _read(stream: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        lines.put(line)
    os._exit(0)


def _write(output: BinaryIO, message: dict[str, Any]) -> None:
    try:
        output.write(msgspec.json.encode(message) + b"\n")
        output.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
