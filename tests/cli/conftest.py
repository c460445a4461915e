"""An application in a module of its own, and commands that are called with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from itertools import count
from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner

from pipeline_mediator.cli.program import app
from tests.cli.called import Called

_numbers = count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[[str], str]]:
    """Writes a module into the current directory, and gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: list[str] = []

    def write(text: str) -> str:
        names.append(f"shop_{next(_numbers)}")
        (tmp_path / f"{names[-1]}.py").write_text(dedent(text))
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def call() -> Callable[..., Called]:
    """Runs a command in this process, with `answers` typed into it."""

    def call(*arguments: str, answers: str = "") -> Called:
        result = CliRunner().invoke(app, arguments, input=answers)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Called(result.exit_code, result.stdout, result.stderr)

    return call
