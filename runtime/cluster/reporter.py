"""What a node says of itself, to whoever asks it on whatever node: questions with answers as JSON.

scheduler.spawn(Reporter({"status": lambda: {...}}), name=REPORTER)
answer = await host.call(NamedRef(REPORTER, "b"), AskNode("status"))
msgspec.json.decode(answer.json)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import attrs
import msgspec

from runtime.actor import Actor, Raise, handles

REPORTER: Final = "reporter"
"""The registered name of a node's reporter."""
MAX_ANSWER_BYTES: Final = 2 * 1024 * 1024


@attrs.frozen
class AskNode:
    """Call: answered by NodeAnswer. Refused with LookupError (no such question), ValueError."""

    question: Annotated[str, msgspec.Meta(max_length=100)]


@attrs.frozen
class NodeAnswer:
    """The answer, as JSON."""

    json: Annotated[bytes, msgspec.Meta(max_length=MAX_ANSWER_BYTES)]


class Reporter(Actor):
    """Each answer gives something that can be JSON, at once."""

    def __init__(self, answers: Mapping[str, Callable[[], Any]]) -> None:
        self._answers = dict(answers)

    @handles(AskNode)
    def _on_ask(self, message: AskNode) -> NodeAnswer | Raise:
        answer = self._answers.get(message.question)
        if answer is None:
            return Raise(LookupError(f"nobody knows of {message.question!r} here"))
        written = msgspec.json.encode(answer())
        if len(written) > MAX_ANSWER_BYTES:
            return Raise(ValueError(f"the answer has more than {MAX_ANSWER_BYTES} bytes"))
        return NodeAnswer(written)
