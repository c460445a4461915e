"""Dead letters, wherever they are kept: in an outbox's table or by the broker of a subscription."""

from __future__ import annotations

from base64 import b64encode
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.cli.wording import first_line, without_credentials
from pipeline_mediator.errors import MediatorError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
    from datetime import datetime

    from pipeline_mediator.cli.target import Application
    from pipeline_mediator.message_brokers.protocol import DeadDelivery, DeadLetterQueue
    from pipeline_mediator.outbox.protocol import DeadLetter, OutboxStore

__all__ = ["Letter", "Place", "outbox_of", "pages_of", "place_named", "places_of", "reading"]

_PAGE: Final = 100
"""How many are read, or acted upon, at a time."""

_OUTBOX: Final = "outbox"
_LARGEST_ID: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that was given up; the same facts wherever it is kept."""

    id: str
    """What its place knows it by."""
    message_id: str | None
    name: str | None
    """The wire name of its type, as the message says it."""
    version: int | None
    destination: str
    key: str | None
    attempts: int
    reason: str
    stored_at: datetime | None
    """When an outbox took it in."""
    died_at: datetime | None
    """When a subscription gave it up, if its broker says."""
    content_type: str | None
    headers: Mapping[str, str]
    body: bytes

    def facts(self) -> dict[str, Any]:
        """Without headers and payload, as they stand in a JSON document."""
        return {
            "id": self.id,
            "message_id": self.message_id,
            "name": self.name,
            "version": self.version,
            "destination": self.destination,
            "key": self.key,
            "attempts": self.attempts,
            "reason": without_credentials(self.reason),
            "stored_at": None if self.stored_at is None else self.stored_at.isoformat(),
            "died_at": None if self.died_at is None else self.died_at.isoformat(),
        }

    def payload(self) -> tuple[str, str]:
        """The body and how it is written here: "utf-8", or "base64" for what is no text."""
        try:
            return self.body.decode(), "utf-8"
        except UnicodeDecodeError:
            return b64encode(self.body).decode(), "base64"


class Place(Protocol):
    """Where dead letters are kept. Raises nothing but `MediatorError`s."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def kind(self) -> str:
        """Either "outbox" or "subscription"."""
        ...

    async def count(self) -> int:
        """How many there are."""
        ...

    async def page(self, limit: int, after: str | None) -> Sequence[Letter]:
        """At most `limit`, oldest first, beginning behind the id `after`."""
        ...

    async def find(self, letter_ids: Sequence[str]) -> dict[str, Letter]:
        """Those that are there."""
        ...

    async def retry(self, letter_ids: Sequence[str]) -> int:
        """Have them published, or delivered, again; how many there were."""
        ...

    async def drop(self, letter_ids: Sequence[str]) -> int:
        """Delete them for good; how many there were."""
        ...


def outbox_of(application: Application) -> OutboxPlace:
    """Where its outbox keeps them. Raises `CommandError` for an application without outbox."""
    store = application.outbox
    if store is None:
        raise CommandError(f"{application.target}: no OutboxMiddleware stands in the pipeline of this mediator")
    return OutboxPlace(store)


def places_of(application: Application) -> list[Place]:
    """Every place, the outbox first. Raises `CommandError` if there is none."""
    found: list[Place] = [] if application.outbox is None else [outbox_of(application)]
    for subscription in application.subscriptions:
        if subscription.dead_letters is not None:
            name = _unlike([one.name for one in found], subscription.name)
            found.append(SubscriptionPlace(name, subscription.dead_letters))
    if not found:
        raise CommandError(
            f"{application.target}: there is no outbox, and no subscription whose broker keeps dead letters; name what "
            "makes the Consumer, to see those of its subscriptions"
        )
    return found


def place_named(places: Sequence[Place], name: str | None) -> Place:
    """The one that is meant; None will do where there is only one. Raises `CommandError`."""
    if name is None and len(places) == 1:
        return places[0]
    for place in places:
        if place.name == name:
            return place
    known = ", ".join(place.name for place in places)
    if name is None:
        raise CommandError(f"there are several places: say which one by --place, of {known}")
    raise CommandError(f"there is no place {name!r} that keeps dead letters; there is {known}")


class OutboxPlace:
    """The table of an outbox."""

    name = kind = _OUTBOX

    def __init__(self, store: OutboxStore) -> None:
        self.store = store

    async def count(self) -> int:
        """See `Place.count`."""
        with reading("the outbox"):
            return (await self.store.health()).dead

    async def page(self, limit: int, after: str | None) -> Sequence[Letter]:
        """See `Place.page`."""
        behind = 0 if after is None else _numbers([after])[0]
        with reading("the outbox"):
            return [_of_outbox(one) for one in await self.store.dead_letters(limit, after=behind)]

    async def find(self, letter_ids: Sequence[str]) -> dict[str, Letter]:
        """See `Place.find`."""
        found: dict[str, Letter] = {}
        for number in _numbers(letter_ids):
            with reading("the outbox"):
                letters = await self.store.dead_letters(1, after=number - 1)
            found.update({str(one.id): _of_outbox(one) for one in letters if one.id == number})
        return found

    async def retry(self, letter_ids: Sequence[str]) -> int:
        """See `Place.retry`."""
        numbers = _numbers(letter_ids)
        with reading("the outbox"):
            return await self.store.retry(numbers)

    async def drop(self, letter_ids: Sequence[str]) -> int:
        """See `Place.drop`."""
        numbers = _numbers(letter_ids)
        with reading("the outbox"):
            return await self.store.purge(numbers)


class SubscriptionPlace:
    """What a broker keeps for one subscription."""

    kind = "subscription"

    def __init__(self, name: str, queue: DeadLetterQueue) -> None:
        self.name = name
        self._queue = queue

    async def count(self) -> int:
        """See `Place.count`."""
        with _asking(self.name):
            return await self._queue.count()

    async def page(self, limit: int, after: str | None) -> Sequence[Letter]:
        """See `Place.page`."""
        with _asking(self.name):
            return [_of_subscription(one) for one in await self._queue.list(limit, after=after)]

    async def find(self, letter_ids: Sequence[str]) -> dict[str, Letter]:
        """See `Place.find`. A broker's queue can only be read from its head."""
        wanted, found = set(letter_ids), dict[str, Letter]()
        async for page in pages_of(self, await self.count()):
            found.update({one.id: one for one in page if one.id in wanted})
            if len(found) == len(wanted):
                break
        return found

    async def retry(self, letter_ids: Sequence[str]) -> int:
        """See `Place.retry`."""
        with _asking(self.name):
            return await self._queue.retry(letter_ids)

    async def drop(self, letter_ids: Sequence[str]) -> int:
        """See `Place.drop`."""
        with _asking(self.name):
            return await self._queue.drop(letter_ids)


async def pages_of(place: Place, limit: int, after: str | None = None) -> AsyncGenerator[Sequence[Letter]]:
    """The first `limit` of them, page by page; what dies meanwhile is not run after."""
    while limit > 0:
        page = await place.page(min(limit, _PAGE), after)
        if not page:
            return
        # Before it is handed out: whoever gets it may take them away.
        limit, after = limit - len(page), page[-1].id
        yield page


@contextmanager
def reading(place: str) -> Generator[None]:
    """What a driver raises becomes one line."""
    try:
        yield
    except MediatorError:
        raise
    except Exception as error:
        raise CommandError(f"{place} cannot be read: {first_line(error)}") from error


@contextmanager
def _asking(place: str) -> Generator[None]:
    """Likewise; what is no id of that place is for its broker to know."""
    with reading(place):
        try:
            yield
        except ValueError as error:
            raise CommandError(f"{place}: {error}") from error


def _numbers(letter_ids: Sequence[str]) -> list[int]:
    for letter_id in letter_ids:
        if not (letter_id.isascii() and letter_id.isdecimal() and 0 < int(letter_id) <= _LARGEST_ID):
            raise CommandError(f"{letter_id!r} is no id of the outbox: those are numbers above 0, as `list` shows them")
    return [int(letter_id) for letter_id in letter_ids]


def _unlike(names: Sequence[str], name: str) -> str:
    """The name, with a number where another place has it: two brokers may have groups of one name."""
    number = 1
    unlike = name
    while unlike in names:
        number += 1
        unlike = f"{name}#{number}"
    return unlike


def _of_outbox(letter: DeadLetter) -> Letter:
    message = letter.message
    return Letter(
        id=str(letter.id),
        message_id=message.message_id,
        name=message.name,
        version=message.version,
        destination=message.destination,
        key=message.key,
        attempts=letter.failures,
        reason=letter.error,
        stored_at=letter.created_at,
        died_at=None,
        content_type=message.content_type,
        headers=message.headers,
        body=message.body,
    )


def _of_subscription(letter: DeadDelivery) -> Letter:
    delivery = letter.delivery
    return Letter(
        id=letter.id,
        message_id=delivery.message_id,
        name=_type_in(delivery.headers),
        version=None,
        destination=delivery.destination,
        key=delivery.key,
        attempts=delivery.attempt,
        reason=letter.reason,
        stored_at=None,
        died_at=letter.died_at,
        content_type=delivery.content_type,
        headers=delivery.headers,
        body=delivery.body,
    )


def _type_in(headers: Mapping[str, str]) -> str | None:
    """The CloudEvents attribute, which some transports mark with a prefix; not looked for within bodies."""
    for name in ("type", "ce-type", "ce_type", "cloudEvents:type", "cloudEvents_type"):
        if name in headers:
            return headers[name]
    return None
