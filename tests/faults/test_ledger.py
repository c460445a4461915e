"""The ledger keeps what a process wrote before it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.ledger import Ledger, entries, files


def test_what_was_written_is_read_in_order(tmp_path: Path) -> None:
    with Ledger(tmp_path, "writer-1.1") as ledger:
        ledger.write(send="a", tokens=["a/0"])
        ledger.write(send="a", outcome="committed")
    first, second = entries(tmp_path / "writer-1.1.jsonl")
    assert first == {"send": "a", "tokens": ["a/0"]}
    assert second == {"send": "a", "outcome": "committed"}


def test_each_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    for name in ("relay-1.1", "relay-1.10", "relay-2.1", "writer-1.1"):
        with Ledger(tmp_path, name) as ledger:
            ledger.write(name=name)
    found = [[entry["name"] for entry in entries(file)] for file in files(tmp_path, "relay")]
    assert sorted(found) == [["relay-1.1"], ["relay-1.10"], ["relay-2.1"]]
    with pytest.raises(FileExistsError):
        Ledger(tmp_path, "writer-1.1")


def test_a_line_that_was_cut_off_is_passed_over_and_a_whole_one_is_not(tmp_path: Path) -> None:
    cut_off = tmp_path / "writer-1.1.jsonl"
    cut_off.write_bytes(b'{"send":"a"}\n{"send":"b","tok')
    whole = tmp_path / "writer-1.2.jsonl"
    whole.write_bytes(b'{"send":"c"}')
    assert [entry["send"] for entry in (*entries(cut_off), *entries(whole))] == ["a", "c"]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "writer-1.1.jsonl"
    file.write_bytes(b'{"send":\n{"send":"b"}\n')
    with pytest.raises(ValueError, match="Expecting value"):
        list(entries(file))
