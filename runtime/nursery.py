"""What trio's nurseries are used for in several places."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def beside(
    *tasks: Callable[[], Awaitable[object]], leave: Callable[[], None] | None = None
) -> AsyncIterator[None]:
    """Run tasks beside the block. After it they are called off, or with `leave`, which is to bring
    about their end, waited for. What the block raises comes out as it is, not in a group."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(task)
        try:
            yield
        except Exception as error:
            failure = error
        finally:
            (leave or nursery.cancel_scope.cancel)()
    if failure is not None:
        raise failure


def only_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception behind nested groups; the group itself if there are more."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]
    return group if isinstance(cause, BaseExceptionGroup) else cause
