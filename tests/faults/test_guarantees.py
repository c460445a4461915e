"""docs/guarantees.md names tests that are there, and every named scenario is in it."""

from __future__ import annotations

import re

from tests.faults.scene import ROOT

PAGE = (ROOT / "docs" / "guarantees.md").read_text()


def names_in(*folders: str) -> set[str]:
    files = (file for folder in folders for file in (ROOT / "tests" / folder).glob("test_*.py"))
    return {
        name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }


def test_the_page_names_only_tests_that_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named - names_in("faults", "middlewares") == set()


def test_the_page_names_every_scenario() -> None:
    scenarios = {name for name in names_in("faults") if re.match(r"test_\d\d_", name)}
    assert scenarios - set(re.findall(r"`(test_\w+)`", PAGE)) == set()
