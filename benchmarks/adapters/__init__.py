"""The libraries that are measured, and the ways in which each is set up.

An adapter is an object with one method for each row that its library can do, named like the row, and `bare` for the
bare call; each returns a `Subject`. A module of this folder knows one library, and is imported only where that library
is installed. It is not called like the library, or type checkers would take one for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

__all__ = ["OWN", "REFERENCE", "SETUPS", "Setup", "installed_version"]

OWN: Final = "pipeline-mediator"
REFERENCE: Final = "reference"


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to set up one library."""

    library: str
    """The distribution."""
    name: str
    note: str
    needs: tuple[str, ...] = ()
    """Further distributions."""
    hint: str = ""
    """What to know when it is not installed."""

    @property
    def key(self) -> str:
        """Such as "diator:rodi"."""
        return f"{self.library}:{self.name}"

    @property
    def missing(self) -> list[str]:
        """The distributions that are not installed here."""
        library = () if self.library in {OWN, REFERENCE} else (self.library,)
        return [one for one in (*library, *self.needs) if installed_version(one) is None]

    def load(self) -> Any:
        """The adapter."""
        module = import_module(f"benchmarks.adapters.for_{self.library.replace('-', '_')}")
        return module.SETUPS[self.name]()


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


SETUPS: Final = (
    Setup(REFERENCE, "minimal", "no library, 40 lines: a dict by type and a chain compiled once, and nothing else"),
    Setup(OWN, "class", "handler classes, made for each message: what its README shows"),
    Setup(OWN, "object", "handler objects, made once (cheapest)"),
    Setup(OWN, "plain", "its own PlainContainer", ()),
    Setup(OWN, "rodi", "RodiContainer", ("rodi",)),
    Setup(OWN, "dishka", "DishkaContainer", ("dishka",)),
    Setup(OWN, "di", "DIContainer", ("di",)),
    Setup(OWN, "built-in", "its own middlewares, where nothing goes wrong and nobody listens"),
    Setup("diator", "rodi", "RodiContainer, transient handlers, as its documentation shows; no scope", ("rodi",)),
    Setup("diator", "di", "DIContainer, as its README shows; no scope", ("di",)),
    Setup("diator", "cheapest", "a container of three lines that calls the class"),
    Setup(
        "python-cqrs", "bootstrap", "bootstrap(di.Container()), as its README shows; it adds its own logging", ("di",)
    ),
    Setup(
        "python-cqrs",
        "cheapest",
        "RequestMediator and EventMediator by hand, without logging, a container that calls the class",
    ),
    Setup("python-cqrs", "di", "bootstrap with ScopeStrategy.SEND over di", ("di",)),
    Setup("python-cqrs", "dishka", "RequestMediator by hand with ScopeStrategy.SEND over dishka", ("dishka",)),
    Setup("mediatr", "class", "handler and behavior classes, made for each message; it has no events"),
    Setup("mediatr", "function", "handler and behavior functions (cheapest)"),
    Setup("mediatorx", "class", "its default resolver, which calls the class"),
    Setup("mediatorx", "object", "DictResolver.add_instance (cheapest)"),
    Setup("bazario", "dishka", "its DishkaResolver, a dishka scope per message, as its README shows", ("dishka",)),
    Setup("bazario", "cheapest", "a resolver of two lines that calls the class"),
    Setup("pymediate", "object", "Services(instances), as its README shows", hint="it needs Python >= 3.12"),
)
