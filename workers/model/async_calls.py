"""Run a model's ``async def`` methods on the device thread, on an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import weakref
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any


class DeviceLoop:
    """The event loop of the device thread, created when it is first needed.

    It is one loop for the life of the worker, so that ``predict`` can use a client which ``setup``
    opened. It runs only during a call: one request at a time, as for any model. Call all methods
    on the device thread.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def resolve(self, value: Any) -> Any:
        """Return the value itself, the result of a coroutine, or an Iterator over an async
        generator. Raises what the coroutine raises."""
        while inspect.isawaitable(value):
            value = self._run(value)
        return self._iterate(value) if isinstance(value, AsyncIterator) else value

    def _run(self, awaitable: Awaitable[Any]) -> Any:
        return self._get_loop().run_until_complete(_awaited(awaitable))

    def _iterate(self, source: AsyncIterator[Any]) -> Iterator[Any]:
        """Yield items one at a time, each produced on demand. Closing this closes ``source``.

        One task drives the source from its first item to its last, because timeouts and cancel
        scopes that are open across a ``yield`` belong to the task that entered them.
        """
        loop = self._get_loop()
        handed: asyncio.Future[Any] = loop.create_future()
        wanted: asyncio.Future[None] = loop.create_future()

        async def drive() -> None:
            nonlocal wanted
            async with _closing(source):
                async for item in source:
                    wanted = loop.create_future()
                    handed.set_result(item)
                    await wanted

        task = loop.create_task(drive())
        try:
            while True:
                loop.run_until_complete(
                    asyncio.wait({task, handed}, return_when=asyncio.FIRST_COMPLETED)
                )
                if not handed.done():
                    task.result()
                    return
                item, handed = handed.result(), loop.create_future()
                yield item
                wanted.set_result(None)
        finally:
            handed.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    loop.run_until_complete(task)

    def _get_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            weakref.finalize(self, self._loop.close)
        return self._loop


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@contextlib.asynccontextmanager
async def _closing(source: AsyncIterator[Any]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
