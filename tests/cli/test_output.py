"""How far a command is, on a terminal and elsewhere; tables for people and for pipes."""

from __future__ import annotations

import sys
from io import StringIO

import pytest

from pipeline_mediator.cli.output import nothing_else_on_stdout, print_document, print_table, progress


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_each_tenth_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("retried", 100) as advance:
        for _ in range(20):
            advance(5)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [f"retried: {done} of 100" for done in range(10, 100, 10)]


def test_what_takes_one_step_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("retried", 3) as advance:
        advance(3)
    with progress("retried", 0):
        pass
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("retried", 3) as advance:
        advance(2)
    assert "retried" in terminal.getvalue()
    assert "2/3" in terminal.getvalue()
    assert "\x1b" in terminal.getvalue()


def test_in_a_pipe_no_value_is_cut_or_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "because " * 100
    print_table(["id", "reason"], [["1", reason], ["2", None]])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"1    {reason}".strip() in lines
    assert "2" in lines


def test_a_document_is_in_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    print_document({"name": "b\u00fcch\u202e\x9b"})
    assert capsys.readouterr().out == '{\n  "name": "b\\u00fcch\\u202e\\u009b"\n}\n'


def test_what_others_print_meanwhile_goes_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_else_on_stdout(enforced=True):
        print("beside")  # noqa: T201 - somebody else does
    with nothing_else_on_stdout(enforced=False):
        print("before")  # noqa: T201
    assert capsys.readouterr() == ("before\n", "beside\n")
