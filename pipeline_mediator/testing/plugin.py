"""The pytest plugin: a test that fails with a `Harness` open shows what happened in it.

It is there when this library is installed; `-p no:pipeline_mediator.testing.plugin` leaves it out.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["pytest_runtest_makereport", "pytest_runtest_setup"]

_HARNESS = "pipeline_mediator.testing.harness"


def pytest_runtest_setup() -> None:
    """Forget the harnesses of the test before."""
    _harnesses().clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add a section for each harness."""
    report = yield
    if report.failed and call.when == "call":
        for number, harness in enumerate(_harnesses(), start=1):
            report.sections.append((f"what happened in harness {number}", harness.story()))
    return report


def _harnesses() -> list[Any]:
    """Without importing anything for tests that use none."""
    module = sys.modules.get(_HARNESS)
    return [] if module is None else module.harnesses
