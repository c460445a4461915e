"""What the user names on the command line as module:attribute, such as shop.app:create_mediator."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import isawaitable
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, cast

from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.errors import MediatorError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Sequence
    from types import ModuleType

    from pipeline_mediator.consumer import Consumer
    from pipeline_mediator.mediator import Mediator
    from pipeline_mediator.message_brokers.protocol import Subscription
    from pipeline_mediator.outbox import OutboxRelay
    from pipeline_mediator.outbox.protocol import OutboxStore

__all__ = ["Application", "application", "load"]


@dataclass(frozen=True, slots=True)
class Application:
    """What a target gave: a mediator, alone or with what it was handed to."""

    target: str
    mediator: Mediator
    relay: OutboxRelay | None = None
    consumer: Consumer | None = None

    @property
    def outbox(self) -> OutboxStore | None:
        """The store that its relay serves, or would serve."""
        return self.mediator.outbox if self.relay is None else self.relay.store

    @property
    def subscriptions(self) -> Sequence[Subscription]:
        """What its consumer receives from."""
        return () if self.consumer is None else self.consumer.subscriptions


def load(target: str) -> object:
    """Import the module, from the current directory too, and return the attribute. Raises `CommandError`."""
    name, colon, path = target.partition(":")
    if not colon or not name or not path:
        raise CommandError(f"{target!r} names nothing: it should look like shop.app:create_mediator, module:attribute")
    found: Any = _module(name)
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            nearest = get_close_matches(attribute, dir(found), n=2)
            hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
            raise CommandError(f"{target}: there is no {attribute!r} in {name}.{hint}")
        found = getattr(found, attribute)
    return found


@asynccontextmanager
async def application(found: object, target: str) -> AsyncGenerator[Application]:
    """What `found` is, or makes when it is called; awaited, or entered and left, if need be. Raises `CommandError`."""
    from pipeline_mediator.consumer import Consumer
    from pipeline_mediator.mediator import Mediator
    from pipeline_mediator.outbox import OutboxRelay

    kinds = (Mediator, OutboxRelay, Consumer)
    async with AsyncExitStack() as stack:
        made = found
        if callable(found) and not isinstance(found, kinds):
            made = await _made_by(found, target)
            if not isinstance(made, kinds) and isinstance(made, AbstractAsyncContextManager):
                made = await _entered(cast("AbstractAsyncContextManager[object]", made), stack, target)
        match made:
            case Mediator():
                yield Application(target, made)
            case OutboxRelay():
                yield Application(target, cast("Mediator", made.mediator), relay=made)
            case Consumer():
                yield Application(target, cast("Mediator", made.mediator), consumer=made)
            case _:
                returns = "returns" if callable(found) else "is"
                raise CommandError(
                    f"{target} {returns} a {type(made).__name__}; needed is a Mediator, or what returns one, async or "
                    "not. An OutboxRelay or a Consumer will do too."
                )


async def _made_by(factory: Callable[[], Any], target: str) -> object:
    with _told_for(target):
        made = factory()
        return await made if isawaitable(made) else made


async def _entered(manager: AbstractAsyncContextManager[object], stack: AsyncExitStack, target: str) -> object:
    with _told_for(target):
        return await stack.enter_async_context(manager)


@contextmanager
def _told_for(target: str) -> Generator[None]:
    try:
        yield
    except MediatorError:
        raise
    except Exception as error:
        raise CommandError(f"{target} failed: {_told(error)}") from error


def _module(name: str) -> ModuleType:
    here = os.getcwd()  # noqa: PTH109 - sys.path is of text
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise CommandError(f"{name} cannot be imported: {_told(error)}") from error
        raise CommandError(
            f"there is no module {error.name!r}, neither in {here} nor among what is installed"
        ) from error
    except MediatorError:
        raise
    except Exception as error:
        raise CommandError(f"{name} cannot be imported: {_told(error)}") from error


def _told(error: Exception) -> str:
    """What went wrong, and where: the user's own code is easier to mend than to guess at."""
    frames = extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
