"""The items of a stream query, handed over one by one while its chain is at work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from pipeline_mediator.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from anyio.abc import TaskGroup
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from pipeline_mediator.context import Context

__all__ = ["Stream"]

T_co = TypeVar("T_co", covariant=True)


class Stream(Generic[T_co]):
    """The items of a `StreamQuery`, for as long as the `async with` block lasts.

    The chain walks in a task of its own and pushes each item through a channel of size zero, so that every middleware
    spans the whole stream and keeps its one contract. (An async generator through `call_next` would leave the
    transaction before the first item.) What the chain raises is raised by the iteration, or when the block ends.
    """

    def __init__(self, context: Context, walk: Callable[[Context], Awaitable[Any]]) -> None:
        self._context = context
        self._walk = walk
        self._error: Exception | None = None
        self._tasks: TaskGroup | None = None
        self._items: MemoryObjectReceiveStream[Any] | None = None

    async def __aenter__(self) -> Self:
        import anyio

        if self._tasks is not None:
            raise ConfigurationError("a stream is opened once; call mediator.stream(query) again")
        send, self._items = anyio.create_memory_object_stream[Any](0)
        self._context.sink = send.send
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._walk_chain, send)
        return self

    async def _walk_chain(self, items: MemoryObjectSendStream[Any]) -> None:
        try:
            await self._walk(self._context)
        except Exception as error:  # noqa: BLE001 - raised to who iterates
            self._error = error
        finally:
            await items.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T_co:
        import anyio

        if self._items is None:
            raise ConfigurationError("open the stream first: `async with mediator.stream(query) as items:`")
        try:
            item: T_co = await self._items.receive()
        except anyio.EndOfStream:
            self._raise_error()
            raise StopAsyncIteration from None
        return item

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks, items = self._tasks, self._items
        if tasks is None or items is None:
            return
        tasks.cancel_scope.cancel()
        await items.aclose()
        # The task group would wrap the block's own error in a group: it is not told of it, and the block raises it.
        await tasks.__aexit__(None, None, None)
        if error is None:
            self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            # Its traceback holds this frame: without this, a cycle keeps the context alive.
            del error
