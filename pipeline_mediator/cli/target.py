"""What the user names on the command line as module:attribute, such as shop.app:create_mediator."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from inspect import isawaitable
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.errors import MediatorError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["load", "made_from"]

T = TypeVar("T")


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


async def made_from(found: object, kind: type[T], target: str) -> T:
    """`found` itself, or what it returns when it is called, awaited if need be. Raises `CommandError`."""
    if isinstance(found, kind):
        return found
    result = found
    if callable(found):
        try:
            result = found()
            if isawaitable(result):
                result = await result
        except MediatorError:
            raise
        except Exception as error:
            raise CommandError(f"{target} failed: {_told(error)}") from error
    if isinstance(result, kind):
        return result
    returns = "returns" if callable(found) else "is"
    raise CommandError(
        f"{target} {returns} a {type(result).__name__}; needed is a {kind.__name__}, or what returns one"
    )


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
