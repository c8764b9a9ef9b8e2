"""A node as Ray sees it: an actor, in a process of its own, whose thread runs the body under trio.

Ray calls its methods in threads of a pool; what they want of the body goes through the trio run by
its token. If the body fails, the process ends, after a pause, and Ray starts another. This module
imports no Ray: the class is made an actor by `ray_cluster`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Final, Literal

import msgspec
import trio

from runtime.clock import NS_PER_S, SystemClock
from runtime.hosting.interface import (
    Life,
    NodeFailed,
    NodeHandle,
    NodeState,
    NodeUnavailable,
    NoSuchQuestion,
    RestartPause,
    reason_of,
)

MAX_CONCURRENCY: Final = 16
"""Calls of one node at a time; more wait in Ray."""

Report = tuple[NodeState, str | None, int]
"""State, reason of the failure, and the beginning of this life in milliseconds since 1970."""

Answer = tuple[Literal["answer", "no such question", "failed", "unavailable"], bytes]
"""What came of a question, with the answer as JSON, or a text about it."""


class RayNode:
    """One life of a node, in its own process."""

    def __init__(self, name: str, body: str, settings: bytes, pause: tuple[int, int]) -> None:
        self._body = body
        self._life = Life(NodeHandle(name, msgspec.json.decode(settings)))
        self._pause = RestartPause(young_ns=pause[0], pause_ns=pause[1])
        self._clock = SystemClock()
        self._since_ms = int(self._clock.utc_now().timestamp() * 1_000)
        self._token: trio.lowlevel.TrioToken | None = None
        self._running = threading.Event()
        self._settled = threading.Event()
        self._ended = threading.Event()
        self._leaving = threading.Event()
        self._told = False
        """It failed before it was asked to drain."""
        threading.Thread(target=self._run, name=f"node {name}", daemon=True).start()
        self._running.wait()

    # --- called by Ray, in a thread of its pool ------------------------------------------------

    def report(self) -> Report:
        """How it is now."""
        return self._life.state, self._life.failure, self._since_ms

    def settled(self, seconds: float) -> Report:
        """Wait, at most so long, until the body is up or has ended."""
        self._settled.wait(seconds)
        return self.report()

    def ask(self, question: str, seconds: float) -> Answer:
        """The answer of the body, or what stands in its way."""
        answered: Future[Answer] = Future()

        def answer() -> None:
            try:
                answered.set_result(("answer", self._life.answer(question)))
            except NoSuchQuestion:
                answered.set_result(("no such question", b""))
            except NodeFailed as error:
                answered.set_result(("failed", error.reason.encode()))
            except NodeUnavailable:
                answered.set_result(("unavailable", f"is {self._life.state}".encode()))

        if not self._soon(answer):
            return "unavailable", f"is {self._life.state}".encode()
        try:
            return answered.result(seconds)
        except FutureTimeout:
            return "unavailable", b"did not answer by the deadline"

    def drain(self, seconds: float) -> Report:
        """Ask the body to end in good order, and wait, at most so long, until it has. After that
        this process does nothing more, and waits to be killed. A failure before that is no news."""
        if self._ended.is_set() and not self._leaving.is_set():
            self._told = True
        self._leaving.set()
        self._soon(self._life.handle.drain_requested.set)
        self._ended.wait(seconds)
        state, reason, since_ms = self.report()
        return state, None if self._told else reason, since_ms

    # --- in the thread of the node ---------------------------------------------------------------

    def _run(self) -> None:
        begun_ns = self._clock.monotonic_ns()
        try:
            trio.run(self._main)
        except BaseException as error:  # not the body's: whatever it was, this life is over
            self._life.failure = reason_of(error)
            self._life.ended.set()
        self._running.set()
        self._settled.set()
        self._ended.set()
        if self._life.failure is None:
            return
        pause_ns = self._pause.after(self._clock.monotonic_ns() - begun_ns)
        if not self._leaving.wait(pause_ns / NS_PER_S):
            os._exit(1)  # so Ray starts another

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._running.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._life.run, self._body)
            await self._life.wait_up()
            self._settled.set()

    def _soon(self, function: Callable[[], object]) -> bool:
        """Have the trio thread call `function`; False if it has ended."""
        try:
            assert self._token is not None
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            return False
        return True
