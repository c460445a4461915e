"""Public names that are imported when they are first asked for (PEP 562): an import loads only what is used."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["lazy_names"]


def lazy_names(
    package: str, modules: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package, whose public names come from its modules.

    `modules` lists the names by module. Kept out of type checkers' sight (`if TYPE_CHECKING: <imports> else: <this>`):
    one that sees a module's `__getattr__` believes that every name exists.
    """
    places = {name: f"{package}.{module}" for module, names in modules.items() for name in names}
    namespace = vars(sys.modules[package])

    def load(name: str) -> Any:
        place = places.get(name)
        if place is None:
            raise AttributeError(_unknown(package, name, places), name=name)
        # Kept, so that it is looked up once.
        value = namespace[name] = getattr(import_module(place), name)
        return value

    def names() -> list[str]:
        return sorted({*namespace, *places})

    return load, names


def _unknown(package: str, name: str, known: Mapping[str, str]) -> str:
    from difflib import get_close_matches

    nearest = get_close_matches(name, known, n=2)
    hint = f". Did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"module {package!r} has no attribute {name!r}{hint}"
