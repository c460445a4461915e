"""The items of a stream query, handed over one by one while its chain is at work."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from pipeline_mediator.concurrency import Beside
from pipeline_mediator.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

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
        self._chain: Beside | None = None
        self._sent: MemoryObjectSendStream[Any] | None = None
        self._items: MemoryObjectReceiveStream[Any] | None = None

    async def __aenter__(self) -> Self:
        import anyio

        if self._items is not None:
            raise ConfigurationError("a stream is opened once; call mediator.stream(query) again")
        self._sent, self._items = anyio.create_memory_object_stream[Any](0)
        self._context.sink = self._sent.send
        self._chain = Beside(partial(self._walk_chain, self._sent))
        await self._chain.start()
        return self

    async def _walk_chain(self, sent: MemoryObjectSendStream[Any]) -> None:
        try:
            await self._walk(self._context)
        except Exception as error:  # noqa: BLE001 - raised to who iterates
            self._error = error
        finally:
            sent.close()

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
        except anyio.ClosedResourceError:
            raise ConfigurationError(
                "this stream has been left; read its items inside `async with mediator.stream(query) as items:`"
            ) from None
        return item

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Let go of it: it holds this stream.
        chain, self._chain = self._chain, None
        if chain is None or self._items is None or self._sent is None:
            return
        chain.cancel()
        self._items.close()
        await chain.end()
        # The chain has closed it, unless it was cancelled before it began.
        self._sent.close()
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
