"""Adapters do the work that they are timed for, and figures become files; how fast anything is, is asserted nowhere."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import plots, report
from benchmarks.__main__ import main
from benchmarks.adapters import OWN, SETUPS, Setup
from benchmarks.cases import BUILT_IN, CASES, LIMITS, STARTUP
from benchmarks.results import ROOT, Measured, Method, Results, Row, Started
from benchmarks.rounds import BenchmarkError, Plan, Processes, fresh_processes, plan, run
from benchmarks.startup import FLOOR, PROGRAMS, Program
from benchmarks.tables import behind, tables, times
from benchmarks.work import COUNT, RESULT, AdapterError, Subject, classes, copies
from benchmarks.worker import measure, prove

SHORT = Method(rounds=1, repeats=1, seconds=0.0005, seed=1)


# -- the work is the same ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with fresh_processes() as made:
        yield made


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.key)
def test_every_installed_adapter_does_its_work(setup: Setup, processes: Processes) -> None:
    if setup.missing:
        pytest.skip(f"{', '.join(setup.missing)} not installed")
    rows = {case.name for case in (*CASES, *BUILT_IN)}
    measured = processes.measure(setup, rows, SHORT)  # proves each row before it is timed, and fails otherwise
    assert measured
    assert all(row["ns"] > 0 and row["bare"] > 0 for row in measured.values())


def test_this_library_takes_part_in_every_row() -> None:
    own = [setup.load() for setup in SETUPS if setup.library == OWN and not setup.missing]
    assert all(any(hasattr(adapter, case.name) for adapter in own) for case in (*CASES, *BUILT_IN))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_every_program_gets_its_answer(program: Program, processes: Processes) -> None:
    if not program.installed:
        pytest.skip(f"{', '.join(program.needs)} not installed")
    assert processes.start(program)["ms"] > 0


async def first(call_next: Any) -> Any:
    return await call_next()


async def handler() -> object:
    COUNT[0] += 1
    return RESULT


def subject(call: Any, *steps: Any, handled: int = 1) -> Subject:
    return Subject(call=call, message=None, steps=steps, handled=handled)


async def proved(call: Any, *steps: Any, handled: int = 1) -> None:
    await prove(subject(call, *steps, handled=handled))


def test_a_proof_sees_what_runs() -> None:
    outer, inner = copies(first, 2)

    async def right(_: object) -> object:
        return await outer(lambda: inner(handler))

    async def skipping(_: object) -> object:
        return await outer(handler)

    async def twice(_: object) -> object:
        await handler()
        return await outer(lambda: inner(handler))

    async def without_result(_: object) -> None:
        await outer(lambda: inner(handler))

    asyncio.run(proved(right, outer, inner, handler))
    for wrong in (skipping, twice, without_result):
        with pytest.raises(AdapterError, match="it should be"):
            asyncio.run(proved(wrong, outer, inner, handler))
    with pytest.raises(AdapterError, match="it should be"):
        asyncio.run(proved(right, inner, outer, handler))
    with pytest.raises(AdapterError, match="handles 1"):
        asyncio.run(proved(right, outer, inner, handler, handled=2))


def test_a_loop_in_which_not_every_call_is_handled_is_no_measurement() -> None:
    class Lazy:
        calls = 0

        def bare(self) -> Subject:
            return subject(self.handle, handler)

        async def handle(self, _: object) -> object:
            return await handler()

        def send(self) -> Subject:
            async def call(_: object) -> object:
                self.calls += 1
                return await handler() if self.calls == 1 else RESULT

            return subject(call, handler)

    with pytest.raises(AdapterError, match=r"send: .* handled 0 times"):
        asyncio.run(measure(Lazy(), ["send"], repeats=1, seconds=0.0005))


def test_copies_have_code_of_their_own() -> None:
    made = copies(handler, 2)
    assert made[0].__code__ is not made[1].__code__
    assert [one.__code__.co_qualname for one in made] == ["handler 1", "handler 2"]
    kinds = classes("Handler", first, 2, Exception)
    assert [kind.__name__ for kind in kinds] == ["Handler1", "Handler2"]
    assert all(issubclass(kind, Exception) for kind in kinds)
    assert kinds[0].handle.__code__ is not kinds[1].handle.__code__


def test_a_set_up_that_fails_says_what_it_said(processes: Processes) -> None:
    with pytest.raises(BenchmarkError, match=r"(?s)nobody:nothing failed:\n.*invalid choice"):
        processes.measure(Setup("nobody", "nothing", ""), {"send"}, SHORT)


# -- what is run -------------------------------------------------------------------------------------------------------


def test_only_chooses_libraries_set_ups_and_rows() -> None:
    assert {setup.library for setup in plan().setups} >= {OWN, "reference"}
    assert {setup.key for setup in plan([OWN]).setups} >= {f"{OWN}:class", f"{OWN}:object"}
    assert [setup.key for setup in plan([f"{OWN}:class"]).setups] == [f"{OWN}:class"]
    assert plan(["send"]).rows == {"send"}
    assert not plan(["send"]).programs
    assert {program.name for program in plan([OWN]).programs} == {FLOOR, OWN}


def test_an_unknown_name_is_refused_with_what_there_is() -> None:
    with pytest.raises(BenchmarkError, match=r"unknown: sned\. There are: .*send"):
        plan(["sned"])


def test_what_is_missing_is_left_out_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: str) -> None: ...

    monkeypatch.setattr("benchmarks.adapters.installed_version", nothing)
    left = plan()
    assert {setup.key for setup in left.setups} >= {f"{OWN}:class", "reference:minimal"}
    assert all(setup.library in {OWN, "reference"} for setup in left.setups)
    assert len([line for line in left.left_out if line.startswith("diator ")]) == 1
    assert "pymediate is not installed (it needs Python >= 3.12): left out" in left.left_out


def test_every_round_runs_everything_in_an_order_of_its_own() -> None:
    told: list[tuple[int, str]] = []
    chosen = Plan(
        tuple(setup for setup in SETUPS if setup.key == f"{OWN}:class"), PROGRAMS[:2], frozenset({"send"}), ()
    )
    results = run(chosen, Method(2, 1, 0.0005, seed=1), lambda number, what: told.append((number, what)))
    rounds = [[what for at, what in told if at == number] for number in (1, 2)]
    assert [sorted(one) for one in rounds] == [sorted(rounds[0])] * 2
    assert len({tuple(one) for one in rounds}) > 1
    (measured,) = results.measured
    assert len(measured.rows["send"].ns) == len(measured.rows["send"].bare) == 2
    assert [len(one.ms) for one in results.started] == [6, 6]
    assert results.started[1].third_party == []


# -- what is told ------------------------------------------------------------------------------------------------------


def fake_results(*, peer_send: float = 500.0) -> Results:
    """A run in which a bare call takes 100 ns, and the rest is chosen."""

    def rows(**ns: float) -> dict[str, Row]:
        return {name: Row([value * 0.9, value, value * 1.1], [100.0, 100.0, 100.0]) for name, value in ns.items()}

    return Results(
        version="9.9.9",
        python="3.11",
        machine={"python": "CPython 3.11.0", "cpu": "<Fast & Cheap>", "cpus": "2", "date": "2030-01-02"},
        method=Method(3, 3, 0.06, 1),
        measured=[
            Measured("reference", "minimal", "the floor", "", rows(send=200, emit_10=1000)),
            Measured(OWN, "class", "usual", "9.9.9", rows(send=300, send_context=900, functions=1000, emit_10=1500)),
            Measured(OWN, "rodi", "RodiContainer", "9.9.9", rows(scope=2000, scope_alone=1500)),
            Measured(OWN, "built-in", "", "9.9.9", rows(passed_on=600, retry=700, logging=1000, timeout=590)),
            Measured("diator", "rodi", "as in its README", "0.1", rows(send=peer_send, functions=2000, emit_10=4000)),
        ],
        started=[Started(FLOOR, [20.0, 21.0]), Started(OWN, [30.0, 31.0]), Started("diator", [40.0, 41.0], ["rodi"])],
        left_out=["mediatr is not installed: left out"],
    )


def test_ratios_are_medians_over_rounds() -> None:
    row = Row([200.0, 330.0, 300.0], [100.0, 110.0, 100.0])
    assert row.median == 300
    assert row.ratio == 3
    assert row.spread == pytest.approx((3 - 2) / 2 / 3)
    assert row.added_to(Row([100.0, 100.0, 100.0], [1.0, 1.0, 1.0])) == 200


@pytest.mark.parametrize(
    ("ratio", "text"), [(2.744, "2.74"), (9.96, "9.96"), (10.52, "10.5"), (109.4, "109"), (4439.9, "4,440")]
)
def test_ratios_have_three_digits(ratio: float, text: str) -> None:
    assert times(ratio) == text


def test_limits_are_held_against_what_was_measured() -> None:
    told = {row[0]: row for table in tables(fake_results()) if "reach" in table.title for row in table.rows}
    assert told["send"] == ("send", "3.5×", "3.00×", "yes")
    assert told["send, context"][-1] == "no"
    assert told["scope per send, rodi"] == ("scope per send, rodi", "+600 ns", "+500 ns", "yes")
    assert told["Logging, level off"] == ("Logging, level off", "+300 ns", "+400 ns", "no")
    assert told["Timeout, unset"][-1] == "yes"
    assert told["first message"][-1] == "yes"


def test_a_third_party_module_at_the_first_message_is_a_limit_missed() -> None:
    results = fake_results()
    results.started[1].third_party.append("anyio")
    told = {row[0]: row for table in tables(results) if "reach" in table.title for row in table.rows}
    assert told["first message"][-1] == "no"
    assert "anyio" in told["first message"][2]


def test_where_others_take_less_is_told() -> None:
    assert behind(fake_results()) == []
    assert behind(fake_results(peer_send=250)) == ["send: diator (rodi) 2.50×, this library 3.00×"]


def test_every_limit_is_of_a_row_that_exists() -> None:
    rows = {case.name for case in (*CASES, *BUILT_IN)} | {STARTUP}
    setups = {setup.name for setup in SETUPS if setup.library == OWN}
    assert {limit.case for limit in LIMITS} <= rows
    assert {limit.setup for limit in LIMITS} <= setups


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_run_is_written_as_json_markdown_and_svg(tmp_path: Path) -> None:
    results = fake_results()
    written = report.write(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_bytes())["version"] == "9.9.9"
    assert Results.from_json((tmp_path / "results.json").read_bytes()) == results
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| **pipeline-mediator (class)** | **3.00 ±10%** |" in page
    assert "mediatr is not installed: left out" in page
    drawn = [path for path in written if path.suffix == ".svg"]
    assert {path.name for path in drawn} == {
        "send.svg",
        "middlewares.svg",
        "emit.svg",
        "scope.svg",
        "built-in.svg",
        "startup.svg",
    }
    for path in drawn:
        assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314 - our own file
        assert f"]({path.name})" in page


def test_a_chart_shows_every_bar_within_its_page() -> None:
    bars = [plots.Bar("<a & b>", 0.5, 0.1, 20_000, "0.5×"), plots.Bar("us", 9000.0, 8000, 9500, "9,000×", "own")]
    for logarithmic in (True, False):
        root = ET.fromstring(plots.svg(plots.Chart("x.svg", "t", "s", [plots.Panel("p", bars)], logarithmic)))  # noqa: S314
        svg = "{http://www.w3.org/2000/svg}"
        assert {"<a & b>", "us", "9,000×"} <= {text.text for text in root.iter(f"{svg}text")}
        drawn = {one.get("class"): one for one in root.iter(f"{svg}rect")}
        assert float(drawn["own"].get("width", 0)) > float(drawn["peer"].get("width", 0)) > 0
        width = float(root.get("width", 0))
        assert all(0 <= float(one.get("x1", 0)) <= float(one.get("x2", 0)) <= width for one in root.iter(f"{svg}line"))


def test_the_readme_gets_the_figures_of_the_newest_version(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for version in ("9.9.9", "9.10.0"):
        kept = fake_results().to_json().replace(b"9.9.9", version.encode())
        target = folder / version / "python-3.11"
        target.mkdir(parents=True)
        (target / "results.json").write_bytes(kept)
    report.update_readme(readme, folder)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "### 9.10.0 on CPython 3.11.0" in text
    assert "9.9.9" not in text
    assert "old" not in text
    assert "(results/9.10.0/python-3.11/send.svg)" in text


def test_a_readme_without_its_marks_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    with pytest.raises(ValueError, match="lost its marks"):
        report.update_readme(readme, tmp_path)
    assert readme.read_text() == "mine"


def test_what_is_kept_can_be_read_and_names_no_machine() -> None:
    kept = list(report.FOLDER.glob("*/*/results.json"))
    for path in kept:
        results = Results.from_json(path.read_bytes())
        assert path.parent == report.folder_of(results)
        assert results.machine.keys() <= {"python", "system", "cpu", "cpus", "date", "load before"}
        assert "/" not in "".join(results.machine.values())


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_quick_run_shows_and_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(tmp_path), "--only", "send", "reference"]
    done = subprocess.run([*command, f"{OWN}:class"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "round 1 of 1" in done.stderr
    assert "pipeline-mediator (class)" in done.stdout
    assert "Times a bare call" in done.stdout
    results = Results.from_json((tmp_path / "results.json").read_bytes())
    assert {one.label for one in results.measured} == {"reference (minimal)", "pipeline-mediator (class)"}
    assert all(one.rows.keys() == {"send"} for one in results.measured)
    assert (tmp_path / "send.svg").is_file()


def test_a_part_of_a_run_overwrites_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []

    def write(_: Results, folder: Path) -> None:
        written.append(folder)

    monkeypatch.setattr(report, "write", write)
    assert main(["--quick", "--only", "reference", "send"]) == 0
    assert not written
    assert "Nothing was written" in capsys.readouterr().out


def test_a_wrong_name_ends_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "sned"]) == 1
    assert "unknown: sned" in capsys.readouterr().err


def test_tables_are_shown_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.show(fake_results())
    shown = capsys.readouterr().out
    assert "* pipeline-mediator (class)" in shown
    assert "mediatr is not installed: left out" in shown
