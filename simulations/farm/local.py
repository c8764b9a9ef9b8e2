"""Seeds over the cores of this machine: one process each, which talks in lines (`farm.worker`).

A process that dies (killed for its memory, say) costs a rerun of the one seed that it had, at most
MAX_TRIES times; another takes its place. One that takes longer than the limit is ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import msgspec
import trio

from simulations.farm.job import Job
from simulations.farm.seeds import Gone, Seeds
from simulations.report.progress import Watcher
from simulations.result import Result

SEED_LIMIT_S: Final = 3_600.0
MAX_LINE: Final = 256 << 20
ERROR_BYTES: Final = 2_000
"""Of what a worker wrote to its standard error, the last."""
MAX_DEATHS_AT_ONCE: Final = 8
"""Workers in a row that died without a single result: nothing can be run here."""

_ROOT: Final = Path(__file__).resolve().parents[2]

Take = Callable[[Result | Gone], object]


class FarmError(Exception):
    """Nothing can be run; says why."""


@attrs.frozen(kw_only=True)
class FarmOptions:
    jobs: int
    seed_limit_s: float = SEED_LIMIT_S
    stop_after: int = 0
    """End when so many runs did not hold; 0: never."""


def cores() -> int:
    """How many processes make sense here."""
    return len(os.sched_getaffinity(0))


def run_local(
    job: Job, seeds: Sequence[int], options: FarmOptions, take: Take, watcher: Watcher
) -> None:
    """Run all seeds; `take` is given what each gave, in their order. Raises FarmError."""
    run_interruptibly(_Farm(job, seeds, options, take, watcher).run)


def run_interruptibly(function: Callable[[], Awaitable[object]]) -> None:
    """`trio.run` that raises a lone KeyboardInterrupt as such, however many nurseries it passed."""
    try:
        trio.run(function)
    except BaseExceptionGroup as group:
        interrupted, others = group.split(KeyboardInterrupt)
        if interrupted is None or others is not None:
            raise
        raise KeyboardInterrupt from None


class _Farm:
    def __init__(
        self, job: Job, seeds: Sequence[int], options: FarmOptions, take: Take, watcher: Watcher
    ) -> None:
        self._job = job
        self._options = options
        self._take = take
        self._watcher = watcher
        self._seeds = Seeds(seeds, ahead=4 * options.jobs)
        self._workers = min(options.jobs, len(seeds))
        self._changed = trio.Event()
        self._in_vain = 0
        self._why = ""
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                for _ in range(self._workers):
                    nursery.start_soon(self._work)
        if self._why:
            raise FarmError(self._why)

    async def _work(self) -> None:
        """Keeps one worker alive for as long as there are seeds."""
        while (seed := await self._next_seed()) is not None:
            async with _Process(self._job) as process:
                while seed is not None:
                    if not await self._run_one(process, seed):
                        break
                    seed = await self._next_seed()

    async def _next_seed(self) -> int | None:
        while not self._seeds.over:
            seed = self._seeds.take()
            if seed is not None:
                return seed
            await self._changed.wait()
        return None

    async def _run_one(self, process: _Process, seed: int) -> bool:
        """Whether the process lives on."""
        try:
            with trio.fail_after(self._options.seed_limit_s):
                result = await process.run(seed, partial(self._progressed, seed))
        except trio.TooSlowError:
            self._died(seed, f"took longer than {self._options.seed_limit_s:.0f} s")
            return False
        except _Died as death:
            self._died(seed, str(death))
            return False
        self._in_vain = 0
        self._seeds.finished(seed, result)
        self._flush()
        return True

    def _progressed(self, seed: int, share: float) -> None:
        self._seeds.progressed(seed, share)
        self._tell()

    def _died(self, seed: int, why: str) -> None:
        again = self._seeds.died(seed, why)
        self._watcher.say(f"seed {seed}: {why}; " + ("it is run again" if again else "given up"))
        self._in_vain += 1
        if self._in_vain >= MAX_DEATHS_AT_ONCE:
            self._why = f"{self._in_vain} workers died in a row; the last: {why}"
            self._scope.cancel()
        self._flush()

    def _flush(self) -> None:
        for outcome in self._seeds.leaving():
            self._take(outcome)
        self._tell()
        if self._options.stop_after and self._seeds.failed >= self._options.stop_after:
            self._scope.cancel()
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _tell(self) -> None:
        self._watcher.advanced(self._seeds.done, failed=self._seeds.failed)


class _Died(Exception):
    pass


class _Process:
    """One worker. Ended, and gone, when its block is left."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._errors = b""

    async def __aenter__(self) -> _Process:
        environment = os.environ | {"PYTHONPATH": _python_path()}
        self._process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "simulations.farm.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to hear
        )
        self._lines = _Lines(self._process.stdout)
        await self._send(self._job.encoded())
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.CancelScope(shield=True):
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                assert stream is not None
                await stream.aclose()

    async def run(self, seed: int, progressed: Callable[[float], None]) -> Result:
        """What the seed gives. Raises _Died."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_errors)
            result = await self._run(seed, progressed)
            nursery.cancel_scope.cancel()
        if result is None:
            raise _Died(await self._why())
        return result

    async def _run(self, seed: int, progressed: Callable[[float], None]) -> Result | None:
        try:
            await self._send(msgspec.json.encode({"seed": seed}))
            while (line := await self._lines.next()) is not None:
                message: dict[str, Any] = msgspec.json.decode(line)
                if message["seed"] == seed and "result" in message:
                    return msgspec.convert(message["result"], Result)
                progressed(message.get("done", 0.0))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return None
        return None

    async def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send_all(line + b"\n")
        except trio.BrokenResourceError:
            return  # it died: its output has ended too

    async def _read_errors(self) -> None:
        assert self._process.stderr is not None
        async for data in self._process.stderr:
            self._errors = (self._errors + data)[-ERROR_BYTES:]

    async def _why(self) -> str:
        with trio.move_on_after(5):
            await self._process.wait()
            await self._read_errors()
        code = self._process.returncode
        if code is not None and code < 0:
            return f"its worker was killed by {signal.Signals(-code).name}"
        last = self._errors.decode(errors="replace").strip().splitlines()
        return f"its worker ended with {code}" + (f": {last[-1]}" if last else "")


class _Lines:
    """Lines of a stream, up to MAX_LINE bytes each."""

    def __init__(self, stream: trio.abc.ReceiveStream | None) -> None:
        assert stream is not None
        self._stream = stream
        self._parts: list[bytes] = []
        self._ready: list[bytes] = []

    async def next(self) -> bytes | None:
        """The next line; None when the stream has ended, or a line is too long."""
        while not self._ready:
            data = bytes(await self._stream.receive_some(1 << 16))
            if not data:
                return None
            *lines, rest = data.split(b"\n")
            if lines:
                self._ready = [b"".join([*self._parts, lines[0]]), *lines[1:]]
                self._ready.reverse()
                self._parts = []
            self._parts.append(rest)
            if sum(map(len, self._parts)) > MAX_LINE:
                return None
        return self._ready.pop()


def _python_path() -> str:
    before = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, (str(_ROOT), before)))
