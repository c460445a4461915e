"""What is done to dead letters: listed, shown, retried, deleted; page by page, with progress."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_mediator.cli.calls import Answer
from pipeline_mediator.cli.errors import FOUND, CommandError
from pipeline_mediator.cli.letters import pages_of
from pipeline_mediator.cli.output import note, print_facts, print_table, progress
from pipeline_mediator.cli.wording import escaped, without_credentials

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence

    from pipeline_mediator.cli.letters import Letter, Place

__all__ = ["Chosen", "dropped", "facts_of", "print_place", "retried", "shown"]

_STEP = 100
"""Ids that are acted upon at a time."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which dead letters are meant: some by their ids, or all, the oldest first, at most `limit`.

    Raises `CommandError` for neither, and for both.
    """

    ids: Sequence[str]
    every: bool
    limit: int | None = None

    def __post_init__(self) -> None:
        if bool(self.ids) == self.every:
            raise CommandError("say which: the ids, as `list` shows them, or --all")
        if self.limit is not None and not self.every:
            raise CommandError("--limit belongs to --all")

    async def count(self, place: Place) -> int:
        """How many are meant."""
        if not self.every:
            return len(dict.fromkeys(self.ids))
        there = await place.count()
        return there if self.limit is None else min(there, self.limit)

    async def steps(self, place: Place, count: int) -> AsyncGenerator[list[str]]:
        """Their ids, some at a time."""
        if self.every:
            async for page in pages_of(place, count):
                yield [letter.id for letter in page]
            return
        ids = list(dict.fromkeys(self.ids))
        for start in range(0, len(ids), _STEP):
            yield ids[start : start + _STEP]


async def facts_of(place: Place, limit: int, after: str | None) -> dict[str, Any]:
    """What `list` tells of one place."""
    letters = [letter async for page in pages_of(place, limit, after) for letter in page]
    return {
        "place": place.name,
        "kind": place.kind,
        "count": await place.count(),
        "letters": [letter.facts() for letter in letters],
    }


def print_place(facts: dict[str, Any]) -> None:
    """The same, for people."""
    letters: list[dict[str, Any]] = facts["letters"]
    if letters:
        columns = ("id", "message_id", "name", "destination", "key", "attempts", "died_at", "reason")
        # Not every place knows everything.
        known = [column for column in columns if any(letter[column] is not None for letter in letters)]
        rows = [[letter[column] for column in known] for letter in letters]
        print_table([column.replace("_", " ") for column in known], rows, title=facts["place"])
    note(f"{facts['place']}: {len(letters)} of {facts['count']} dead letters")


async def shown(place: Place, letter_ids: Sequence[str], *, payload: bool) -> Answer:
    """Everything about some of them; the payload only if it is asked for."""
    wanted = list(dict.fromkeys(letter_ids))
    found = await place.find(wanted)
    missing = [one for one in wanted if one not in found]
    letters = [_in_full(found[one], payload=payload) for one in wanted if one in found]

    def show() -> None:
        for number, letter in enumerate(letters):
            if number:
                print()
            _print_in_full(letter)
        for one in missing:
            note(f"{place.name}: there is no dead letter {one}")

    return Answer({"place": place.name, "letters": letters, "missing": missing}, show, FOUND if missing else 0)


async def retried(place: Place, chosen: Chosen) -> Answer:
    """Have them published, or delivered, again."""
    total = await chosen.count(place)
    return await _act(place, chosen, total, place.retry, "retried")


async def dropped(place: Place, chosen: Chosen, *, confirmed: bool, done: str) -> Answer:
    """Delete them for good, after somebody said so; `done` is what the command calls that."""
    total = await chosen.count(place)
    if total and not confirmed and not _confirm(f"Delete {_letters(total)} of {place.name} for good?"):
        return Answer({"place": place.name, "asked": total, done: 0}, lambda: note("nothing was deleted"), code=FOUND)
    return await _act(place, chosen, total, place.drop, done)


async def _act(
    place: Place, chosen: Chosen, total: int, act: Callable[[Sequence[str]], Awaitable[int]], done: str
) -> Answer:
    number = 0
    try:
        with progress(f"{place.name}: {done}", total) as advance:
            async for letter_ids in chosen.steps(place, total):
                number += await act(letter_ids)
                advance(len(letter_ids))
    except BaseException:
        note(f"{place.name}: {number} of {total} were {done} before it stopped")
        raise
    # Of all, others may have taken some away meanwhile; an id that is not there is a mistake.
    code = FOUND if number < total and not chosen.every else 0
    return Answer(
        {"place": place.name, "asked": total, done: number},
        lambda: print(f"{place.name}: {number} of {_letters(total)} {done}"),
        code,
    )


def _print_in_full(letter: dict[str, Any]) -> None:
    apart = {"headers", "payload", "payload_encoding"}
    print_facts({name.replace("_", " "): value for name, value in letter.items() if name not in apart})
    print("headers")
    print_facts(dict(sorted(letter["headers"].items())), indent=2)
    if "payload" in letter:
        print(f"payload ({letter['payload_encoding']})")
        print(escaped(letter["payload"], lines=True))


def _in_full(letter: Letter, *, payload: bool) -> dict[str, Any]:
    facts = letter.facts() | {"content_type": letter.content_type, "size": len(letter.body)}
    facts["headers"] = {name: without_credentials(value) for name, value in letter.headers.items()}
    if payload:
        facts["payload"], facts["payload_encoding"] = letter.payload()
    return facts


def _letters(number: int) -> str:
    return f"{number} dead letter{'' if number == 1 else 's'}"


def _confirm(question: str) -> bool:
    """Ask on stderr. Raises `CommandError` where nobody answers."""
    with _interrupted_at_once():
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
    if not answer:
        print(file=sys.stderr)
        raise CommandError("nobody answered, and nothing was deleted; --yes needs no answer")
    return answer.strip().lower() in {"y", "yes"}


@contextmanager
def _interrupted_at_once() -> Generator[None]:
    """The event loop would only note a Ctrl-C, and go on waiting for the line."""
    noted = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, noted)
