"""The outbox's measurements run, and their figures become files; how fast anything is, is asserted nowhere."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("redis")
pytest.importorskip("asyncpg")

from benchmarks.outbox.__main__ import QUICK, main
from benchmarks.outbox.cases import GOALS, GROUPS
from benchmarks.outbox.databases import address_of
from benchmarks.outbox.measuring import BY_HAND, OURS
from benchmarks.outbox.results import Results, charts, page, tables, write

RELAY = "SQLite, batches of 100"


@pytest.fixture
def results() -> Results:
    results = Results("1.2.3", "3.11", {"python": "CPython 3.11"}, asdict(QUICK))
    for side, values in ((OURS, [50_000.0, 40_000.0]), (BY_HAND, [100_000.0, 40_000.0])):
        for value in values:
            results.add("relay", RELAY, side, value)
    results.add("poll", "SQLite, p50", OURS, 7.0)
    return results


def test_a_quotient_is_of_the_rounds_in_which_both_were_measured(results: Results) -> None:
    assert results.quotient(("relay", RELAY, OURS), ("relay", RELAY, BY_HAND)) == 0.75
    assert results.quotient(("relay", RELAY, OURS), ("relay", "another", BY_HAND)) is None


def test_what_was_reached_is_told_beside_the_limit(results: Results) -> None:
    *_, goals = tables(results)
    assert ("relay, SQLite, batches of 100: of by hand", "≥ 0.7", "0.75", "yes") in goals.rows
    assert ("look behind a failed head, SQLite, p50, ms", "≤ 5", "7.00", "no") in goals.rows
    assert len(goals.rows) == 2


def test_every_goal_is_about_a_group_that_is_shown() -> None:
    groups = {group.name for group in GROUPS}
    assert {goal.figure[0] for goal in GOALS} <= groups
    assert len({goal.title for goal in GOALS}) == len(GOALS)


def test_a_run_becomes_a_page_and_charts(results: Results, tmp_path: Path) -> None:
    write(results, tmp_path)
    text = (tmp_path / "outbox.md").read_text(encoding="utf-8")
    assert text == page(results)
    assert "| SQLite, batches of 100 | 45,000 ±11% | 70,000 ±43% | 0.75 |" in text
    assert json.loads((tmp_path / "outbox.json").read_text())["values"]["relay"][RELAY][OURS] == [50_000.0, 40_000.0]
    (chart,) = charts(results)
    assert f"![{chart.title}]({chart.file})" in text
    assert 'aria-label="From a table into a stream"' in (tmp_path / chart.file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("url", "sqlalchemy", "driver"),
    [
        ("postgresql://a@b:1/c", "postgresql+asyncpg://a@b:1/c", "postgresql://a@b:1/c"),
        ("sqlite:////a/b.db", "sqlite+aiosqlite:////a/b.db", "/a/b.db"),
    ],
)
def test_an_address_is_told_as_each_client_wants_it(url: str, sqlalchemy: str, driver: str) -> None:
    address = address_of(url)
    assert (address.sqlalchemy, address.driver) == (sqlalchemy, driver)


@pytest.mark.parametrize("only", ["SQLite, by hand: relay, 100,", "SQLite, ours: relay, 100,", "SQLite, ours: latency"])
def test_a_measurement_ends_with_figures(only: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--only", only, "--output", str(tmp_path)]) == 0
    assert "SQLite" in capsys.readouterr().out
    values = json.loads((tmp_path / "outbox.json").read_text())["values"]
    assert all(value > 0 for rows in values.values() for sides in rows.values() for (value,) in sides.values())


def test_a_measurement_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--only", "Oracle"]) == 1
    assert "no measurement has 'Oracle' in its name" in capsys.readouterr().err
