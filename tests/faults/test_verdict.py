"""The classifier notices whatever is done to recorded evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults.verdict import Batch, Copy, Effect, Fact, Record, Send, judge


def recorded() -> Record:
    """Six commands on two accounts: five committed, of one the sender was not told; one rolled back."""
    sends: list[Send] = []
    facts: list[Fact] = []
    copies: list[Copy] = []
    places = {"a": 0, "b": 0}
    for n, accounts in enumerate(["a", "ab", "", "b", "a"]):
        tokens: list[str] = []
        for account in (*accounts, None):
            token = f"w.{n}/{len(tokens)}"
            tokens.append(token)
            if account is not None:
                places[account] += 1
            place = len(tokens) if account is None else places[account]
            facts.append(Fact(token, f"w.{n}", account, place))
            copies.append(Copy(token, f"id-{token}", account, place, f"{len(copies) + 1:010d}"))
        sends.append(Send(f"w.{n}", tuple(tokens), "unknown" if n == 3 else "committed"))
    sends.append(Send("w.5", ("w.5/0",), "rolled back"))
    return Record(
        sends=sends,
        operations=frozenset(f"w.{n}" for n in range(5)),
        facts=facts,
        copies=copies,
        effects=[effect_of(copy) for copy in copies],
        batches=[Batch(frozenset({1, 2, 3}), frozenset({1, 2, 3})), Batch(frozenset({4, 5}), frozenset())],
    )


def effect_of(copy: Copy) -> Effect:
    return Effect(copy.message_id, copy.token, copy.account, copy.place)


def test_a_run_without_fault_is_clean() -> None:
    verdict = judge(recorded())
    assert verdict.clean, verdict.wrong
    assert (verdict.events, verdict.delivered, verdict.duplicates, verdict.effects) == (10, 10, 0, 10)
    assert verdict.sends == {"committed": 4, "unknown": 1, "rolled back": 1}


def test_a_send_of_which_nobody_knows_may_have_happened_or_not() -> None:
    record = recorded()
    record.operations -= {"w.3"}
    record.facts = [fact for fact in record.facts if fact.operation != "w.3"]
    record.copies = [copy for copy in record.copies if not copy.token.startswith("w.3/")]
    record.effects = [effect_of(copy) for copy in record.copies]
    assert judge(record).clean


def test_a_copy_of_what_was_in_a_batch_that_was_cut_off_is_a_duplicate_and_no_fault() -> None:
    record = recorded()
    record.copies = [*record.copies, record.copies[3]]
    verdict = judge(record)
    assert verdict.clean, verdict.wrong
    assert (verdict.duplicates, verdict.delivered, verdict.repeatable) == (1, 10, 2)


def lose_an_event(record: Record) -> None:
    record.copies = record.copies[1:]


def lose_the_last_event(record: Record) -> None:
    record.copies = record.copies[:-1]


def invent_an_event(record: Record) -> None:
    record.copies = [*record.copies, Copy("w.9/0", "id-w.9/0", None, 1, "0000000099")]


def publish_what_was_rolled_back(record: Record) -> None:
    record.copies = [*record.copies, Copy("w.5/0", "id-w.5/0", None, 1, "0000000099")]


def repeat_an_event(record: Record) -> None:
    record.copies = [*record.copies, record.copies[0]]


def repeat_an_event_more_often_than_it_was_taken(record: Record) -> None:
    record.copies = [*record.copies, record.copies[3], record.copies[3]]


def repeat_an_event_under_another_id(record: Record) -> None:
    record.copies = [*record.copies, replace(record.copies[3], message_id="another")]


def give_two_events_one_id(record: Record) -> None:
    first, second, *rest = record.copies
    record.copies = [first, replace(second, message_id=first.message_id), *rest]


def invert_two_events_of_a_key(record: Record) -> None:
    """Places and sequence as they were: it is the order in the stream that is wrong."""
    first, second = [n for n, copy in enumerate(record.copies) if copy.account == "b"]
    copies = list(record.copies)
    copies[first], copies[second] = copies[second], copies[first]
    record.copies = copies


def store_two_events_of_a_key_against_their_commits(record: Record) -> None:
    first, second = [n for n, copy in enumerate(record.copies) if copy.account == "b"]
    copies = list(record.copies)
    sequences = copies[second].sequence, copies[first].sequence
    copies[first], copies[second] = (
        replace(copies[first], sequence=sequences[0]),
        replace(copies[second], sequence=sequences[1]),
    )
    record.copies = copies


def change_an_event(record: Record) -> None:
    record.copies = [replace(record.copies[0], account="b", place=1), *record.copies[1:]]


def forget_what_was_acknowledged(record: Record) -> None:
    """The database lost it: no row, and no event."""
    record.operations -= {"w.0"}
    record.facts = [fact for fact in record.facts if fact.operation != "w.0"]
    record.copies = [copy for copy in record.copies if not copy.token.startswith("w.0/")]


def commit_what_was_rolled_back(record: Record) -> None:
    record.operations |= {"w.5"}
    record.facts = [*record.facts, Fact("w.5/0", "w.5", None, 1)]
    record.copies = [*record.copies, Copy("w.5/0", "id-w.5/0", None, 1, "0000000099")]


def commit_a_part(record: Record) -> None:
    """Of the one whose sender was not told."""
    token = "w.3/1"
    record.facts = [fact for fact in record.facts if fact.token != token]
    record.copies = [copy for copy in record.copies if copy.token != token]


def commit_what_nobody_sent(record: Record) -> None:
    record.operations |= {"w.9"}


def lose_an_effect(record: Record) -> None:
    record.effects = record.effects[1:]


def repeat_an_effect(record: Record) -> None:
    record.effects = [*record.effects, record.effects[0]]


def invent_an_effect(record: Record) -> None:
    record.effects = [*record.effects, Effect("id-of-nothing", "w.9/0", None, 1)]


def invert_two_effects_of_a_key(record: Record) -> None:
    first, second = [n for n, effect in enumerate(record.effects) if effect.account == "b"]
    effects = list(record.effects)
    effects[first], effects[second] = effects[second], effects[first]
    record.effects = effects


def hand_over_something_else(record: Record) -> None:
    record.effects = [replace(record.effects[0], place=7), *record.effects[1:]]


def give_a_delivery_up(record: Record) -> None:
    record.undone = ["id-w.0/0: refused"]


def give_a_message_up(record: Record) -> None:
    record.dead = ["id-w.0/0: refused"]


def leave_a_message_in_the_outbox(record: Record) -> None:
    record.left = ["1 pending"]


def let_a_process_end(record: Record) -> None:
    record.troubles = ["relay-1 ended by itself with 1"]


TAMPERINGS: dict[str, list[Callable[[Record], None]]] = {
    "lost": [lose_an_event, lose_the_last_event],
    "unexpected": [invent_an_event, publish_what_was_rolled_back],
    "repeated without a cause": [repeat_an_event, repeat_an_event_more_often_than_it_was_taken],
    "not one id each": [repeat_an_event_under_another_id, give_two_events_one_id],
    "inverted within a key": [invert_two_events_of_a_key, store_two_events_of_a_key_against_their_commits],
    "not as written": [change_an_event, hand_over_something_else],
    "acknowledged, yet not there": [forget_what_was_acknowledged],
    "rolled back, yet there": [commit_what_was_rolled_back],
    "committed in part": [commit_a_part, commit_what_nobody_sent],
    "not one effect": [lose_an_effect, repeat_an_effect, invent_an_effect],
    "effects inverted within a key": [invert_two_effects_of_a_key],
    "given up": [give_a_message_up],
    "given up by a consumer": [give_a_delivery_up],
    "left behind": [leave_a_message_in_the_outbox],
    "troubles": [let_a_process_end],
}


@pytest.mark.parametrize(
    ("finding", "tamper"),
    [(finding, tamper) for finding, tampers in TAMPERINGS.items() for tamper in tampers],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_it_is_noticed(finding: str, tamper: Callable[[Record], None]) -> None:
    record = recorded()
    tamper(record)
    verdict = judge(record)
    assert verdict.wrong[finding]
    assert not verdict.clean


def test_every_finding_has_a_tampering() -> None:
    assert TAMPERINGS.keys() == judge(recorded()).wrong.keys()
