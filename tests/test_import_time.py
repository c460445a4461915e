"""What an import costs: nothing third-party is loaded before it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PLAIN = """
import asyncio
from dataclasses import dataclass

from pipeline_mediator import Command, Context, DomainEvent, EventMap, Mediator, Pipeline, RequestMap

@dataclass(frozen=True)
class Add(Command[int]):
    number: int

@dataclass(frozen=True)
class Added(DomainEvent):
    number: int

seen = []

async def add(command: Add, context: Context) -> int:
    context.emit(Added(command.number))
    return command.number + 1

async def note(event: Added) -> None:
    seen.append(event.number)

async def through(context, call_next):
    return await call_next(context)

async def main():
    mediator = Mediator(
        RequestMap().bind(Add, add), event_map=EventMap().bind(Added, note), middlewares=Pipeline(through)
    )
    async with mediator:
        assert await mediator.send(Add(1)) == 2
        await mediator.emit(Added(3))
    assert seen == [1, 3]

asyncio.run(main())
"""


def loaded_by(code: str) -> set[str]:
    """The top-level modules that `code` loads in a fresh interpreter, without the standard library's."""
    program = f"""
import json, sys
before = set(sys.modules)
{code}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(loaded - set(sys.stdlib_module_names))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import pipeline_mediator", id="import"),
        pytest.param("import pipeline_mediator.middlewares", id="middlewares"),
        pytest.param("from pipeline_mediator import Mediator, Pipeline, RequestMap", id="names"),
        pytest.param(PLAIN, id="send and emit"),
    ],
)
def test_nothing_third_party_is_loaded(code: str) -> None:
    assert loaded_by(code) == {"pipeline_mediator"}


def test_the_look_itself_finds_what_is_loaded() -> None:
    assert "anyio" in loaded_by("import anyio")


def test_the_package_alone_loads_no_module_of_its_own_but_the_lazy_one() -> None:
    code = "import pipeline_mediator, sys; print(*sorted(one for one in sys.modules if one.startswith('pipeline_med')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pipeline_mediator", "pipeline_mediator.lazy"]
