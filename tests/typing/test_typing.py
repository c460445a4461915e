"""mypy and pyright accept every line of `cases/` but those marked `# expect-error`, and refuse each of these."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASES = sorted((HERE / "cases").glob("*.py"))
MARK = "# expect-error"

Errors = dict[tuple[str, int], str]
"""The first error of each refused line, by file name and line number."""


def expected() -> set[tuple[str, int]]:
    return {
        (case.name, number)
        for case in CASES
        for number, line in enumerate(case.read_text().splitlines(), start=1)
        if line.endswith(MARK)
    }


def run(checker: str, *arguments: str) -> str:
    if importlib.util.find_spec(checker) is None:
        reason = f'{checker} is not installed: pip install "pipeline-mediator[lint]"'
        if os.environ.get("REQUIRE_CHECKERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    # From the repository's root, where mypy finds the same package as this test and its configuration.
    command = [sys.executable, "-m", checker, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode in {0, 1}, f"{checker} could not run:\n{done.stdout}{done.stderr}"
    return done.stdout


def mypy() -> Errors:
    report = run("mypy", "--no-pretty", "--hide-error-context", "--no-error-summary", *map(str, CASES))
    found = re.findall(r"^(.+?):(\d+): error: (.*)$", report, re.MULTILINE)
    return dict(first_of_each_line((file, int(line), text) for file, line, text in found))


def pyright() -> Errors:
    report = json.loads(run("pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(HERE)))
    found = [one for one in report["generalDiagnostics"] if one["severity"] == "error"]
    # Lines count from 0 there.
    return dict(first_of_each_line((one["file"], one["range"]["start"]["line"] + 1, one["message"]) for one in found))


def first_of_each_line(found: Iterator[tuple[str, int, str]]) -> Iterator[tuple[tuple[str, int], str]]:
    seen: set[tuple[str, int]] = set()
    for file, line, text in found:
        place = (Path(file).name, line)
        # Errors elsewhere are the business of the checkers' own run over the repository.
        if Path(file).parent.name == "cases" and place not in seen:
            seen.add(place)
            yield place, text


@pytest.mark.parametrize("check", [mypy, pyright], ids=["mypy", "pyright"])
def test_exactly_the_marked_lines_are_refused(check: Callable[[], Errors]) -> None:
    refused = check()
    accepted = [f"{file}:{line}: accepted, though it is marked" for file, line in sorted(expected() - refused.keys())]
    unexpected = [f"{file}:{line}: {refused[file, line]}" for file, line in sorted(refused.keys() - expected())]
    assert not accepted + unexpected, "\n".join(accepted + unexpected)


def test_cases_are_there() -> None:
    assert {case.stem for case in CASES} >= {"events", "middlewares", "names", "requests", "streams"}
    assert len(expected()) > 50
