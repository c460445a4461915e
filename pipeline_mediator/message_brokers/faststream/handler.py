"""The handler that FastStream calls: it gets the message as it came, and nothing is decoded or validated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["as_it_is", "handler_of"]


async def as_it_is(message: Any) -> Any:
    """The decoder: FastStream hands what it returns to the handler."""
    return message


def handler_of(take: Callable[[Any, str], Awaitable[None]], destination: str) -> Callable[[Any], Awaitable[None]]:
    """A handler for what comes from one destination."""

    async def handle(message: Any) -> None:
        await take(message, destination)

    # FastStream reads them, as objects; what is Any is not validated.
    handle.__annotations__ = {"message": Any, "return": None}
    return handle
