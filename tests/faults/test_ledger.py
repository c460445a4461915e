"""The ledger keeps what a process wrote before it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.ledger import Ledger, entries


def test_what_was_written_is_read_in_order(tmp_path: Path) -> None:
    with Ledger(tmp_path, "writer-1.1") as ledger:
        ledger.write(send="a", tokens=["a/0"])
        ledger.write(send="a", outcome="committed")
    with Ledger(tmp_path, "relay-1.1") as other:
        other.write(batch=0, rows=[1])
    assert list(entries(tmp_path, "writer")) == [
        {"send": "a", "tokens": ["a/0"]},
        {"send": "a", "outcome": "committed"},
    ]


def test_a_line_that_was_cut_off_is_passed_over_and_a_whole_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "writer-1.1.jsonl").write_bytes(b'{"send":"a"}\n{"send":"b","tok')
    (tmp_path / "writer-1.2.jsonl").write_bytes(b'{"send":"c"}')
    assert [entry["send"] for entry in entries(tmp_path, "writer")] == ["a", "c"]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "writer-1.1.jsonl").write_bytes(b'{"send":\n{"send":"b"}\n')
    with pytest.raises(ValueError, match="Expecting value"):
        list(entries(tmp_path, "writer"))


def test_no_two_processes_share_a_file(tmp_path: Path) -> None:
    with Ledger(tmp_path, "writer-1.1"), pytest.raises(FileExistsError):
        Ledger(tmp_path, "writer-1.1")
