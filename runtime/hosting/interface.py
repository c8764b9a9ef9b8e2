"""Where node processes run, behind one interface: in this process, or as actors of Ray.

A *node* is a complete process of whatever is clustered (a portal, say). What it does is its
*body*, an importable async function `module:function` that trio runs, given a `NodeHandle`. The
body says when it is up, answers questions, and returns when it has drained. A `Cluster` starts
nodes under names, restarts those that fail, tells of them, and drains them. It carries nobody's
messages: nodes reach one another by links of their own, and none needs the cluster to go on.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Final, Literal, Protocol

import attrs
import msgspec
import trio

from runtime.clock import NS_PER_S
from runtime.service import get_logger

MAX_NODES: Final = 256
MAX_SETTINGS_BYTES: Final = 64 * 1024
"""As JSON."""
MAX_ANSWER_BYTES: Final = 1024 * 1024
"""As JSON."""
MAX_REASON_CHARACTERS: Final = 300

ASK_NS: Final = 5 * NS_PER_S
START_NS: Final = 60 * NS_PER_S
DRAIN_NS: Final = 60 * NS_PER_S

Body = Callable[["NodeHandle"], Awaitable[None]]
Questions = Mapping[str, Callable[[], Any]]
"""Each gives something that can be JSON, and is called in the node's trio thread, where it must
not take long: whoever asks stops waiting at a deadline, the function is not cut."""

NodeState = Literal["starting", "running", "draining", "drained", "restarting", "unresponsive"]
"""`drained`: the body has returned, its process is about to go. `restarting`: it has failed, and
will be started anew after a pause. `unresponsive`: it is said to run, and did not answer."""

_log = get_logger("cluster.hosting")


class ClusterError(Exception):
    """Base of what a `Cluster` raises on purpose."""


class ClusterUnavailable(ClusterError):
    """What hosts the nodes cannot be reached now. Nodes that run go on."""


class NodeError(ClusterError):
    """About one node; `name` is its name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"node {name}: {text}")
        self.name = name


class NoSuchNode(NodeError):
    """No node of that name is hosted here."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "no such node")


class NodeExists(NodeError):
    """A node of that name is hosted already."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "exists already")


class NodeFailed(NodeError):
    """The body failed; `reason` is one line about it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.reason = reason


class NodeUnavailable(NodeError):
    """The node exists, and cannot answer now: it starts, restarts, or is too slow."""


class NoSuchQuestion(NodeError):
    """The body registered no question of that name."""

    def __init__(self, name: str, question: str) -> None:
        super().__init__(name, f"does not answer {question!r}")


class DrainTimedOut(NodeError):
    """The node had not drained by the deadline, and was ended by force."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "had not drained by the deadline and was ended")


@attrs.frozen(kw_only=True)
class NodeStatus:
    """What is known of a node."""

    name: str
    state: NodeState
    pid: int | None
    """None while it has no process."""
    host: str
    """The address of its machine, as the cluster knows it; empty while it has none."""
    restarts: int
    since: datetime
    """When its present life, or else its wait for one, began."""
    reason: str | None = None
    """Why it failed, as long as it waits to be restarted."""


@attrs.frozen(kw_only=True)
class RestartPause:
    """How long a node that failed waits before it is started anew. One that had lived for long is
    started at once; one that fails soon after its start must not spin."""

    young_ns: int = 30 * NS_PER_S
    pause_ns: int = 5 * NS_PER_S

    def after(self, lived_ns: int) -> int:
        """The pause, in nanoseconds, after a life of `lived_ns`."""
        return self.pause_ns if lived_ns < self.young_ns else 0


class Cluster(Protocol):
    """Starts, watches and drains nodes. Belongs to one trio run. All methods may raise
    ClusterUnavailable; deadlines in nanoseconds."""

    async def start(
        self, name: str, settings: Mapping[str, Any] | None = None, *, deadline_ns: int = START_NS
    ) -> NodeStatus:
        """Start a node, and return when its body has said that it is up. `settings` are added to
        those of the cluster. From then on it is restarted whenever it fails.

        Raises NodeExists; NodeFailed, with the body's own reason, if it fails before it is up
        (nothing is left of it then); NodeUnavailable if it is not up by the deadline (it is ended
        too); ValueError for a name that is none, or settings that are not JSON, or too many. After
        ClusterUnavailable it may have been started all the same."""

    async def nodes(self) -> tuple[NodeStatus, ...]:
        """All nodes, by name, those that are being restarted among them."""

    async def ask(self, name: str, question: str, *, deadline_ns: int = ASK_NS) -> Any:
        """The node's answer, as it is read from JSON.

        Raises NoSuchNode, NoSuchQuestion, NodeUnavailable; NodeFailed if the question raised."""

    async def drain(self, name: str, *, deadline_ns: int = DRAIN_NS) -> None:
        """Ask the node to end in good order, and return when it is gone. It is not restarted.

        Raises NoSuchNode; and, when it is gone all the same, DrainTimedOut, or NodeFailed if the
        body failed on its way out."""

    async def close(self) -> None:
        """Let go of the cluster. Nodes that run in processes of their own go on."""


# --- for those that host nodes ------------------------------------------------------------------


class NodeHandle:
    """What a body is given. Belongs to the trio run of the body."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.settings: Final = settings
        """Plain values, never a secret: secrets come from files and the environment."""
        self.drain_requested: Final = trio.Event()
        self._questions: Questions = {}
        self._up = trio.Event()

    def started(self, questions: Questions | None = None) -> None:
        """The body is up, and answers these questions from now on."""
        self._questions = dict(questions or {})
        self._up.set()


class Life:
    """One run of a body, from its start to its end. Belongs to one trio run."""

    def __init__(self, handle: NodeHandle) -> None:
        self.handle: Final = handle
        self.ended: Final = trio.Event()
        self.failure: str | None = None
        """Set, before `ended` is, if the body failed."""

    @property
    def was_up(self) -> bool:
        return self.handle._up.is_set()

    @property
    def state(self) -> NodeState:
        if self.ended.is_set():
            return "drained" if self.failure is None else "restarting"
        if self.handle.drain_requested.is_set():
            return "draining"
        return "running" if self.was_up else "starting"

    async def run(self, body: str) -> None:
        """Run the body to its end. Never raises what it raised; see `failure`."""
        handle = self.handle
        try:
            await load_body(body)(handle)
            if not handle.drain_requested.is_set():
                self.failure = "returned without being asked to drain"
        except Exception as error:
            self._fail(error)
        except BaseExceptionGroup as group:  # cancelled, and failed on the way out
            cancelled, failed = group.split(trio.Cancelled)
            if failed is None or not isinstance(failed, Exception):
                raise
            self._fail(failed)
            assert cancelled is not None
            raise cancelled from None
        finally:
            self.ended.set()

    def _fail(self, error: Exception) -> None:
        self.failure = reason_of(error)
        _log.error("node_failed", node=self.handle.name, reason=self.failure, exc_info=error)

    async def wait_up(self) -> None:
        """Return when the body is up, or has ended."""
        async with trio.open_nursery() as nursery:

            async def first(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(first, self.handle._up)
            nursery.start_soon(first, self.ended)

    def answer(self, question: str) -> bytes:
        """The answer as JSON. Raises as `Cluster.ask` does."""
        name = self.handle.name
        if not self.was_up or self.ended.is_set():
            raise NodeUnavailable(name, f"is {self.state}")
        function = self.handle._questions.get(question)
        if function is None:
            raise NoSuchQuestion(name, question)
        try:
            answer = msgspec.json.encode(function())
        except Exception as error:
            raise NodeFailed(name, f"{question!r}: {reason_of(error)}") from error
        if len(answer) > MAX_ANSWER_BYTES:
            raise NodeFailed(name, f"{question!r}: an answer of more than {MAX_ANSWER_BYTES} B")
        return answer


def load_body(body: str) -> Body:
    """The function that `module:function` names. Raises ValueError, or what the import raises."""
    module, _, function = body.partition(":")
    found = getattr(importlib.import_module(module), function, None) if module else None
    if not inspect.iscoroutinefunction(found):
        raise ValueError(f"not an async function: {body}")
    loaded: Body = found
    return loaded


def encode_settings(*settings: Mapping[str, Any] | None) -> bytes:
    """Settings as JSON, later ones over earlier ones. Raises ValueError."""
    merged = {key: value for some in settings for key, value in (some or {}).items()}
    try:
        encoded = msgspec.json.encode(merged)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings of a node are plain values: {error}") from None
    if len(encoded) > MAX_SETTINGS_BYTES:
        raise ValueError(f"settings of a node have at most {MAX_SETTINGS_BYTES} B")
    return encoded


def reason_of(error: BaseException) -> str:
    """One line about an exception; of a group that has only one, about that one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MAX_REASON_CHARACTERS].rstrip(": ")
