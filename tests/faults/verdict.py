"""Compares what was promised, what was committed, what was published and what took effect, message by message."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Batch", "Copy", "Effect", "Fact", "Outcome", "Record", "Send", "Verdict", "judge"]

Outcome = Literal["committed", "rolled back", "unknown"]
"""What the sender was told. Unknown: the commit was not answered, or the sender died before it could write it down."""


@dataclass(frozen=True, slots=True)
class Send:
    """A send as its ledger has it."""

    operation: str
    tokens: tuple[str, ...]
    """Of the events that it emits if it commits."""
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Fact:
    """A committed row of the application, written beside an event."""

    token: str
    operation: str
    account: str | None
    """The event's key."""
    place: int
    """Counted up under a lock on the account's row: the order in which the account's transactions committed."""


@dataclass(frozen=True, slots=True)
class Copy:
    """An entry of the stream; a list of them is in the stream's order."""

    token: str
    message_id: str
    account: str | None
    place: int
    sequence: str


@dataclass(frozen=True, slots=True)
class Effect:
    """A committed row of the consumer's handler; a list of them is in the order in which they were written."""

    message_id: str
    token: str
    account: str | None
    place: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What a relay had taken: the ids of the rows, and those of them that it saw settled as sent."""

    rows: frozenset[int]
    settled: frozenset[int]


@dataclass(slots=True)
class Record:
    """All that is known when a run is over."""

    sends: Sequence[Send] = ()
    operations: frozenset[str] = frozenset()
    """Those whose row is committed."""
    facts: Sequence[Fact] = ()
    copies: Sequence[Copy] = ()
    effects: Sequence[Effect] = ()
    handlings: Counter[str] = field(default_factory=Counter[str])
    """How often a handler began, and how often it failed on purpose."""
    batches: Sequence[Batch] = ()
    dead: Sequence[str] = ()
    """Messages that a relay gave up."""
    undone: Sequence[str] = ()
    """Messages that a consumer gave up."""
    left: Sequence[str] = ()
    """Messages that were still in the outbox, or in a stream."""
    troubles: Sequence[str] = ()
    """What else went wrong: processes that ended by themselves, or did not end when asked."""


@dataclass(slots=True)
class Verdict:
    """The figures of a run, and what is wrong with it: lists of what is concerned, empty if all is well."""

    sends: Counter[str]
    events: int
    """Committed."""
    delivered: int
    """Of those, how many are in the stream at least once."""
    duplicates: int
    """Copies beyond the first."""
    repeatable: int
    """Rows in batches that ended without saying what became of them: at most so many duplicates there may be."""
    effects: int
    handlings: Counter[str]
    wrong: Mapping[str, Sequence[str]] = field(default_factory=dict[str, "list[str]"])

    @property
    def clean(self) -> bool:
        return not any(self.wrong.values())


def judge(record: Record) -> Verdict:
    """Look at everything from every side."""
    first = _first_copies(record.copies)
    return Verdict(
        sends=Counter(send.outcome for send in record.sends),
        events=len(record.facts),
        delivered=sum(fact.token in first for fact in record.facts),
        duplicates=len(record.copies) - len(first),
        repeatable=sum(len(batch.rows - batch.settled) for batch in record.batches),
        effects=len(record.effects),
        handlings=record.handlings,
        wrong={
            "lost": [fact.token for fact in record.facts if fact.token not in first],
            "unexpected": _unexpected(record.facts, record.copies),
            "acknowledged, yet not there": _not_as_told(record, "committed", there=False),
            "rolled back, yet there": _not_as_told(record, "rolled back", there=True),
            "committed in part": _in_part(record),
            "not one id each": _without_one_id(record.copies),
            "inverted within a key": _inverted(first.values()),
            "not as written": _changed(record.facts, first, record.effects),
            "not one effect": _without_one_effect(record.copies, record.effects),
            "effects inverted within a key": _overtaken(record.effects),
            "repeated without a cause": _repeated_without_cause(record.copies, record.batches),
            "given up": list(record.dead),
            "given up by a consumer": list(record.undone),
            "left behind": list(record.left),
            "troubles": list(record.troubles),
        },
    )


def _first_copies(copies: Iterable[Copy]) -> dict[str, Copy]:
    first: dict[str, Copy] = {}
    for copy in copies:
        first.setdefault(copy.token, copy)
    return first


def _unexpected(facts: Iterable[Fact], copies: Iterable[Copy]) -> list[str]:
    """Published, though the transaction never committed, or nobody ever emitted it."""
    committed = {fact.token for fact in facts}
    return [copy.token for copy in copies if copy.token not in committed]


def _not_as_told(record: Record, outcome: Outcome, *, there: bool) -> list[str]:
    told = [send.operation for send in record.sends if send.outcome == outcome]
    return [operation for operation in told if (operation in record.operations) is there]


def _in_part(record: Record) -> list[str]:
    """An operation's row without all of its facts, or facts without it, or of a send that is not in the ledger."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for fact in record.facts:
        found[fact.operation].add(fact.token)
    intended = {send.operation: set(send.tokens) for send in record.sends}
    whole = {one for one in record.operations if one in intended and found.get(one, set()) == intended[one]}
    return sorted((record.operations | found.keys()) - whole)


def _without_one_id(copies: Iterable[Copy]) -> list[str]:
    ids: defaultdict[str, set[str]] = defaultdict(set)
    tokens: defaultdict[str, set[str]] = defaultdict(set)
    for copy in copies:
        ids[copy.token].add(copy.message_id)
        tokens[copy.message_id].add(copy.token)
    return [token for token, known in ids.items() if len(known) > 1 or any(len(tokens[one]) > 1 for one in known)]


def _inverted(first: Iterable[Copy]) -> list[str]:
    """First copies that stand behind one that was committed after them, or that claim to have been stored after it."""
    latest: dict[str, tuple[int, str]] = {}
    wrong: list[str] = []
    for copy in first:
        if copy.account is None:
            continue
        place, sequence = latest.get(copy.account, (0, ""))
        if copy.place <= place or copy.sequence <= sequence:
            wrong.append(copy.token)
        latest[copy.account] = (max(place, copy.place), max(sequence, copy.sequence))
    return wrong


def _changed(facts: Iterable[Fact], first: Mapping[str, Copy], effects: Iterable[Effect]) -> list[str]:
    """On their way to the stream, or from there to the handler."""
    known = {fact.token: (fact.account, fact.place) for fact in facts}
    seen: list[Copy | Effect] = [*first.values(), *effects]
    return [one.token for one in seen if one.token in known and known[one.token] != (one.account, one.place)]


def _overtaken(effects: Iterable[Effect]) -> list[str]:
    """Written after the effect of a message that was committed after theirs."""
    latest: dict[str, int] = {}
    wrong: list[str] = []
    for effect in effects:
        if effect.account is not None:
            if effect.place < latest.get(effect.account, 0):
                wrong.append(effect.token)
            latest[effect.account] = max(effect.place, latest.get(effect.account, 0))
    return wrong


def _without_one_effect(copies: Iterable[Copy], effects: Iterable[Effect]) -> list[str]:
    counted = Counter(effect.message_id for effect in effects)
    published = {copy.message_id for copy in copies}
    return sorted(one for one in published | counted.keys() if counted[one] != 1 or one not in published)


def _repeated_without_cause(copies: Iterable[Copy], batches: Iterable[Batch]) -> list[str]:
    """More copies than there were batches with the row in them that ended without saying what became of it, and one."""
    taken = Counter(row for batch in batches for row in batch.rows - batch.settled)
    counted = Counter(copy.token for copy in copies)
    rows = {copy.token: int(copy.sequence) for copy in copies}
    return [token for token, times in counted.items() if times - 1 > taken[rows[token]]]
