"""Programs that import a library, build a mediator and send one message; each is run in a fresh process.

Each leaves what it got in `answer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.adapters import OWN, installed_version

__all__ = ["ANSWER", "FLOOR", "PROGRAMS", "Program"]

FLOOR: Final = "import asyncio"

ANSWER: Final = 7


@dataclass(frozen=True, slots=True)
class Program:
    """One file of this folder."""

    name: str
    """What the report calls it."""
    file: str
    package: str
    """What the library is imported as."""
    needs: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The distribution that it shows."""
        return self.needs[0] if self.needs else self.name

    @property
    def installed(self) -> bool:
        """Whether everything that it imports is here."""
        return all(installed_version(one) is not None for one in self.needs)


PROGRAMS: Final = (
    Program(FLOOR, "with_asyncio.py", "asyncio"),
    Program(OWN, "with_pipeline_mediator.py", "pipeline_mediator"),
    Program("mediatr", "with_mediatr.py", "mediatr", ("mediatr",)),
    Program("mediatorx", "with_mediatorx.py", "mediatorx", ("mediatorx",)),
    Program("bazario", "with_bazario.py", "bazario", ("bazario",)),
    Program("diator, rodi", "with_diator.py", "diator", ("diator", "rodi")),
    Program("python-cqrs, di", "with_python_cqrs.py", "cqrs", ("python-cqrs", "di")),
    Program("pymediate", "with_pymediate.py", "pymediate", ("pymediate",)),
)
