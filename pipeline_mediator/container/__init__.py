"""How the mediator gets handlers and their dependencies: a container that opens one scope per root message.

The protocol is small on purpose: an adapter for another library is two classes, and
`pipeline_mediator.testing.container_suite` shows whether it keeps what is promised here. `PlainContainer` needs no
library; the others are `container.rodi`, `container.di` and `container.dishka`.
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
        """The object of this type; within one scope the same for everything the library calls scoped.

        A handler class that is not registered is built anew at each call. What a constructor raises passes untouched.
        """
        ...

    def close(self, error: BaseException | None, /) -> Awaitable[None] | None:
        """End what the scope made, in reverse order; seeds are not the scope's to close.

        `error` is what ended the message, None on success; a library that can shows it to what it ends. It is not
        raised again. What ending raises is raised, after the rest was ended too. Called once, also where nothing was
        asked for.
        """
        ...


class Container(Protocol):
    """Opens scopes. An object of the user's that has these two methods is a container.

    It may have a third, `factory(wanted, /) -> Callable[[], object] | None`: a way to build this handler class that
    needs no scope, so that a handler without dependencies does not pay for one; None where there is none. The mediator
    looks for it with `getattr`, and may call it before `prepare`.
    """

    def prepare(self, wanted: Collection[type], seeded: Collection[type], /) -> None:
        """Called by each mediator once, before its first message.

        `wanted` are the handler classes and the types that handler functions ask for; `seeded` are the types that
        scopes will be opened with. Registers both where the library allows it, resolves everything dry (no object is
        made), and raises one `ResolutionError` that lists all that is missing. A handler class need not be known to the
        library; everything else must be, by the library's own rules.

        Raises `ConfigurationError` if the library provides a seeded type itself: half of the handlers would write to
        another session than the one that is committed.
        """
        ...

    def open(self, seeds: Mapping[type, object], /) -> Scope:
        """A new scope that also provides these objects, each under the type it is keyed by.

        Asking such a scope for a type of `seeded` that is not among `seeds` raises `ResolutionError`: a message may
        walk a chain without the middleware that provides it.
        """
        ...
