"""Errors: the tree, what each says, and that they travel between processes."""

import functools
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

from pipeline_mediator import errors
from pipeline_mediator.errors import (
    BrokerRefusedError,
    BrokerUnavailableError,
    CommitOutcomeUnknownError,
    CommittedButNotPublishedError,
    ConfigurationError,
    DecodeError,
    DuplicateHandlerError,
    EncodeError,
    FrozenMapError,
    HandlerNotFoundError,
    HandlerSignatureError,
    InvalidMessageError,
    MediatorError,
    MessageTooLargeError,
    MissingExtraError,
    MissingUpcasterError,
    OrderError,
    PermanentError,
    ResolutionError,
    TransactionDoomedError,
    UnknownMessageError,
    name_of,
)


class PlaceOrder:
    pass


class PlaceOrderHandler:
    async def handle(self, command: PlaceOrder) -> None: ...


def place_order(command: PlaceOrder) -> None: ...


CLASSES: dict[str, type[Exception]] = {
    name: thing
    for name, thing in vars(errors).items()
    if inspect.isclass(thing) and issubclass(thing, Exception) and thing.__module__ == errors.__name__
}


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in str(errors.__doc__).splitlines():
        if (found := re.match(r"([│├└─ ]*)(\w+Error)\b", line)) is None:
            continue
        depth, name = len(found[1]), found[2]
        while path and path[-1][0] >= depth:
            path.pop()
        drawn[name] = path[-1][1] if path else "Exception"
        path.append((depth, name))

    assert set(drawn) == set(CLASSES)
    assert set(CLASSES) == set(errors.__all__)
    for name, base in drawn.items():
        assert CLASSES[name].__bases__[0].__name__ == base
    assert issubclass(MissingExtraError, ImportError)
    assert issubclass(BrokerRefusedError, PermanentError)


def test_every_error_says_what_it_is_for() -> None:
    for error in CLASSES.values():
        assert issubclass(error, MediatorError)
        assert inspect.getdoc(error)


@pytest.mark.parametrize(
    "permanent", [InvalidMessageError, EncodeError, DecodeError, UnknownMessageError, MessageTooLargeError]
)
def test_what_cannot_get_better_is_permanent(permanent: type[Exception]) -> None:
    assert issubclass(permanent, PermanentError)
    assert not issubclass(BrokerUnavailableError, PermanentError)
    assert not issubclass(ConfigurationError, PermanentError)


EXAMPLES: list[tuple[MediatorError, str]] = [
    (MediatorError("text"), "text"),
    (
        DuplicateHandlerError(PlaceOrder, PlaceOrderHandler, place_order),
        (
            "PlaceOrder is already bound to PlaceOrderHandler; a request has exactly one handler, so place_order was "
            "refused. Remove one of the two binds."
        ),
    ),
    (HandlerSignatureError(place_order, PlaceOrder, "why"), "place_order cannot be bound to PlaceOrder: why"),
    (HandlerSignatureError(place_order, None, "why"), "place_order cannot be bound: why"),
    (
        FrozenMapError("this EventMap", PlaceOrder),
        (
            "this EventMap is frozen: a mediator has compiled it, so PlaceOrder cannot be bound any more. Bind every "
            "handler before the Mediator is constructed."
        ),
    ),
    (
        OrderError(["one", "other"]),
        "the middlewares stand in an order that breaks 2 of their rules:\n  - one\n  - other",
    ),
    (ResolutionError(PlaceOrder(), ["one"]), "PlaceOrder cannot provide what 1 parameter needs:\n  - one"),
    (
        ResolutionError(PlaceOrder(), ["one", "other"]),
        "PlaceOrder cannot provide what 2 parameters need:\n  - one\n  - other",
    ),
    (
        MissingExtraError("RodiContainer", "rodi", "rodi"),
        'RodiContainer needs rodi. Install it with: pip install "pipeline-mediator[rodi]"',
    ),
    (HandlerNotFoundError(PlaceOrder, "nobody."), "PlaceOrder: nobody."),
    (HandlerNotFoundError(PlaceOrder, "nobody.", ["A", "B"]), "PlaceOrder: nobody. Did you mean A or B?"),
    (InvalidMessageError(PlaceOrder, "too many"), "PlaceOrder is not valid: too many"),
    (EncodeError(PlaceOrder, "sku", "a set"), "field `sku` of PlaceOrder cannot be encoded: a set"),
    (EncodeError(PlaceOrder, None, "a set"), "PlaceOrder cannot be encoded: a set"),
    (DecodeError("orders.placed", "$.sku", "no text"), "orders.placed cannot be decoded: no text (at $.sku)"),
    (DecodeError(None, "$", "no JSON"), "what arrived cannot be decoded: no JSON (at $)"),
    (
        UnknownMessageError("orders.placed", 2),
        (
            "'orders.placed' in version 2 is not in the codec's catalog. Give its type to the codec, or bind a handler "
            "or a destination to it."
        ),
    ),
    (
        UnknownMessageError("orders.placed", 2, ["'orders.placed' in version 1"]),
        (
            "'orders.placed' in version 2 is not in the codec's catalog. Nearest: 'orders.placed' in version 1. Give "
            "its type to the codec, or bind a handler or a destination to it."
        ),
    ),
    (
        MissingUpcasterError("orders.placed", 1, 2, 3),
        (
            "'orders.placed' in version 1 cannot be read: here it is known in version 3, and nothing turns version 2 "
            "into 3. Register a function that does: @codec.upcaster('orders.placed', 2)."
        ),
    ),
    (
        MessageTooLargeError("orders.placed", 300, 200),
        (
            "orders.placed is 300 bytes encoded, the limit is 200. Send a reference to the content instead of the "
            "content, or raise max_size if the broker takes more."
        ),
    ),
    (
        CommitOutcomeUnknownError(PlaceOrder),
        (
            "the outcome of the commit of PlaceOrder is unknown: no answer to COMMIT came back. Look in the database "
            "before repeating it, or make the message idempotent and let RetryMiddleware name this error."
        ),
    ),
    (
        CommittedButNotPublishedError(1, ["a", 2]),
        (
            "the transaction committed, but 2 of its events did not reach the broker: str, int. Do not send the "
            "request again; publish the events. An outbox stores them in the transaction instead."
        ),
    ),
    (BrokerUnavailableError("gone"), "gone"),
]


@pytest.mark.parametrize(("error", "text"), EXAMPLES)
def test_what_an_error_says(error: MediatorError, text: str) -> None:
    assert str(error) == text


def test_a_doomed_transaction_names_both_messages_and_what_to_do() -> None:
    error = TransactionDoomedError(PlaceOrderHandler, PlaceOrder, "ValueError")

    for part in ("PlaceOrder ", "PlaceOrderHandler", "ValueError", 'nested="savepoint"'):
        assert part in str(error)


@pytest.mark.parametrize(
    "error", [*(error for error, _ in EXAMPLES), TransactionDoomedError(PlaceOrder, PlaceOrder, "E")]
)
def test_an_error_survives_pickling(error: MediatorError) -> None:
    # As from a worker process.
    there: Any = pickle.loads(pickle.dumps(error))  # noqa: S301

    assert type(there) is type(error)
    assert str(there) == str(error)
    assert sorted(vars(there)) == sorted(vars(error))


def test_the_facts_are_attributes() -> None:
    assert OrderError(["one"]).violations == ("one",)
    assert ResolutionError("container", ["one"]).missing == ("one",)
    assert HandlerNotFoundError(PlaceOrder, "nobody", ["A"]).nearest == ("A",)
    extra = MissingExtraError("RodiContainer", "rodi", "di")
    assert (extra.feature, extra.library, extra.extra) == ("RodiContainer", "rodi", "di")
    lost = CommittedButNotPublishedError(7, ["a"])
    assert (lost.result, lost.events) == (7, ("a",))


class WithMethod:
    def method(self) -> None: ...

    def __call__(self) -> None: ...


def local() -> Callable[[], None]:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (PlaceOrder, "PlaceOrder"),
        (PlaceOrder(), "PlaceOrder object"),
        (place_order, "place_order"),
        (WithMethod().method, "WithMethod.method"),
        (local(), "local.<locals>.inner"),
        (functools.partial(place_order), "place_order"),
        (functools.partial(functools.partial(place_order)), "place_order"),
        (functools.partial(WithMethod()), "WithMethod object"),
        (list[int], "list[int]"),
        (int | None, "int | None"),
        (None, "None"),
        (7, "int object"),
    ],
)
def test_a_thing_is_called_what_people_call_it(thing: object, name: str) -> None:
    assert name_of(thing) == name
