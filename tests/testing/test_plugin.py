"""What a test that fails shows of its harness."""

from __future__ import annotations

import os
import sys

import pytest

pytest_plugins = ["pytester"]

TEST = """
from dataclasses import dataclass
import asyncio
from pipeline_mediator import DomainEvent, EventMap, Mediator
from pipeline_mediator.testing import Harness

@dataclass(frozen=True)
class StockRanLow(DomainEvent):
    sku: str

async def reorder(event: StockRanLow) -> None: ...

async def play(wanted):
    async with Harness(Mediator(event_map=EventMap().bind(StockRanLow, reorder))) as app:
        await app.emit(StockRanLow("book"))
        assert app.handled() == wanted

def test_passes(): asyncio.run(play([StockRanLow("book")]))
def test_fails(): asyncio.run(play([]))
def test_has_none(): assert False
"""


@pytest.fixture(autouse=True)
def same_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner pytest runs in another folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(path) for path in sys.path))  # noqa: PTH100


def test_a_test_that_fails_shows_what_happened(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["pipeline_mediator.testing.plugin"]')
    pytester.makepyfile(TEST)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=2)
    text = result.stdout.str()
    assert text.count("what happened in harness 1") == 1
    assert "emitted   StockRanLow(sku='book')" in text
    assert "handled   StockRanLow(sku='book')" in text


def test_it_loads_nothing_for_tests_that_need_it_not(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["pipeline_mediator.testing.plugin"]')
    pytester.makepyfile("import sys\ndef test_it(): assert 'pipeline_mediator.mediator' not in sys.modules")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
