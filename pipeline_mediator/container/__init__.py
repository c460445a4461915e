"""How the mediator gets handlers and their dependencies: a container that opens one scope per root message.

The protocol is small on purpose: an adapter for another library is two classes. `PlainContainer` needs no library;
the others are `container.rodi`, `container.di` and `container.dishka`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline_mediator.container.plain import PlainContainer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection, Mapping

__all__ = ["Container", "PlainContainer", "Scope"]

T = TypeVar("T")


class Scope(Protocol):
    """The life of what one root message resolves."""

    @property
    def is_async(self) -> bool:
        """Whether `get` returns an awaitable of the object instead of the object."""
        ...

    def get(self, wanted: type[T], /) -> Any:
        """The object of this type; within one scope the same for everything the library calls scoped."""
        ...

    def close(self, error: BaseException | None, /) -> Awaitable[None] | None:
        """End what the scope made, in reverse order; seeds are not the scope's to close.

        `error` is what ended the message, None on success. Called once.
        """
        ...


class Container(Protocol):
    """Opens scopes. An object of the user's that has these two methods is a container."""

    def prepare(self, wanted: Collection[type], seeded: Collection[type], /) -> None:
        """Called once, before the first message.

        `wanted` are the handler classes and the types that handler functions ask for; `seeded` are the types that every
        scope will be opened with. Registers both where the library allows it, resolves everything dry (no object is
        made), and raises one `ResolutionError` that lists all that is missing.
        """
        ...

    def open(self, seeds: Mapping[type, object], /) -> Scope:
        """A new scope that also provides these objects, each under the type it is keyed by."""
        ...
