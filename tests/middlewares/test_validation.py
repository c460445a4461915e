"""Validation: whose validators run, what becomes of what they raise, and where the middleware may stand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import anyio
import msgspec
import pydantic
import pytest

from pipeline_mediator import Command, Context, DomainEvent, EventMap, Mediator, Query, RequestMap, Route
from pipeline_mediator.errors import ConfigurationError, InvalidMessageError, OrderError, PermanentError
from pipeline_mediator.middlewares.validation import ValidationMiddleware, Validator
from pipeline_mediator.pipeline import Next

SECRET = "4111-1111-1111-1111"


@dataclass(frozen=True)
class Payment(Command[str]):
    amount: int
    card: str = SECRET


@dataclass(frozen=True)
class Refund(Payment):
    pass


@dataclass(frozen=True)
class GetBalance(Query[int]):
    account: str


@dataclass(frozen=True)
class Paid(DomainEvent):
    amount: int


async def pay(payment: Payment) -> str:
    return f"paid {payment.amount}"


async def get_balance(query: GetBalance) -> int:
    return 7


def amount_is_positive(payment: Payment) -> None:
    if payment.amount < 1:
        raise ValueError("amount must be at least 1")


async def amount_is_not_huge(payment: Payment) -> None:
    await anyio.lowlevel.checkpoint()
    if payment.amount > 1000:
        raise ValueError("amount must be at most 1000")


def mediator_with(validation: ValidationMiddleware, *inner: Any) -> Mediator:
    requests = RequestMap().bind(Payment, pay).bind(Refund, pay).bind(GetBalance, get_balance)
    return Mediator(requests, middlewares=[validation, *inner])


async def test_a_message_that_its_validators_like_is_handled() -> None:
    mediator = mediator_with(ValidationMiddleware({Payment: [amount_is_positive, amount_is_not_huge]}))
    assert await mediator.send(Payment(5)) == "paid 5"


@pytest.mark.parametrize(
    ("amount", "reason"),
    [(0, "amount must be at least 1"), (1001, "amount must be at most 1000")],
    ids=["plain", "async"],
)
async def test_what_a_validator_raises_refuses_the_message(amount: int, reason: str) -> None:
    reached: list[object] = []

    async def record(context: Context, call_next: Next) -> Any:
        reached.append(context.message)
        return await call_next(context)

    mediator = mediator_with(ValidationMiddleware({Payment: [amount_is_positive, amount_is_not_huge]}), record)
    with pytest.raises(InvalidMessageError) as caught:
        await mediator.send(Payment(amount))
    assert isinstance(caught.value, PermanentError)
    assert caught.value.message_type is Payment
    assert caught.value.reason == reason
    assert str(caught.value) == f"Payment is not valid: {reason}"
    assert isinstance(caught.value.__cause__, ValueError)
    assert reached == []


async def test_validators_of_bases_run_first_and_those_of_other_types_do_not() -> None:
    seen: list[str] = []

    def recorder(name: str) -> Callable[[object], None]:
        return lambda message: seen.append(name)

    validators: dict[type, Validator | list[Validator]] = {
        Refund: recorder("Refund"),
        Payment: [recorder("Payment 1"), recorder("Payment 2")],
        Command: recorder("Command"),
        Query: recorder("Query"),
    }
    mediator = mediator_with(ValidationMiddleware(validators))
    await mediator.send(Refund(1))
    assert seen == ["Command", "Payment 1", "Payment 2", "Refund"]


async def test_the_first_refusal_stops() -> None:
    def never(payment: Payment) -> None:
        pytest.fail("called after a refusal")

    with pytest.raises(InvalidMessageError, match="at least 1"):
        await mediator_with(ValidationMiddleware({Payment: [amount_is_positive, never]})).send(Payment(0))


async def test_one_function_sees_every_message_events_too() -> None:
    seen: list[type] = []

    def remember(message: object) -> None:
        seen.append(type(message))

    validation = ValidationMiddleware(remember)
    mediator = Mediator(RequestMap().bind(Payment, pay), event_map=EventMap(), middlewares=[validation])
    await mediator.send(Payment(1))
    await mediator.emit(Paid(1))
    assert seen == [Payment, Paid]


async def test_it_is_left_out_where_there_is_no_validator() -> None:
    mediator = mediator_with(ValidationMiddleware({Payment: amount_is_positive}))
    assert "Validation" not in mediator.describe(GetBalance)
    assert "ValidationMiddleware  amount_is_positive" in mediator.describe(Payment)
    assert await mediator.send(GetBalance("a")) == 7


def test_it_concerns_what_came_from_a_broker_but_not_what_the_relay_publishes() -> None:
    validation = ValidationMiddleware(lambda message: None)
    assert validation.for_route(Route(Payment, "request", "broker")) is not None
    assert validation.for_route(Route(Payment, "request", "relay", "payments")) is None


async def test_a_refusal_of_its_own_making_passes_as_it_is() -> None:
    refusal = InvalidMessageError(Payment, "the card has expired")

    def refuse(payment: Payment) -> None:
        raise refusal

    with pytest.raises(InvalidMessageError) as caught:
        await mediator_with(ValidationMiddleware({Payment: refuse})).send(Payment(1))
    assert caught.value is refusal


class _Model(pydantic.BaseModel):
    card: int


class _Struct(msgspec.Struct):
    card: int


def of_another_kind(payment: Payment) -> None:
    raise LookupError("no such currency")


def message_behind_the_text(payment: Payment) -> None:
    raise ValueError("too much", payment)


def message_instead_of_a_text(payment: Payment) -> None:
    raise ValueError(payment)


def without_a_text(payment: Payment) -> None:
    raise ValueError


def with_a_mistake(payment: Any) -> None:
    payment.no_such_field()


def by_pydantic(payment: Payment) -> None:
    _Model.model_validate({"card": payment.card})


def by_msgspec(payment: Payment) -> None:
    msgspec.convert({"card": payment.card}, _Struct)


@pytest.mark.parametrize(
    ("validator", "reason"),
    [
        (of_another_kind, "LookupError: no such currency"),
        (message_behind_the_text, "too much"),
        (message_instead_of_a_text, "ValueError"),
        (without_a_text, "ValueError"),
        (with_a_mistake, "AttributeError: 'Payment' object has no attribute 'no_such_field'"),
        (by_pydantic, "card: int_parsing"),
        (by_msgspec, "card: Expected `int`, got `str`"),
    ],
)
async def test_the_reason_does_not_quote_the_message(validator: Validator, reason: str) -> None:
    with pytest.raises(InvalidMessageError) as caught:
        await mediator_with(ValidationMiddleware({Payment: validator})).send(Payment(1))
    assert caught.value.reason == reason
    assert SECRET not in str(caught.value)


async def test_a_validator_that_answers_instead_of_raising_is_a_mistake_and_lets_nothing_pass() -> None:
    def is_positive(payment: Payment) -> Any:
        return payment.amount > 0

    async def is_positive_later(payment: Payment) -> Any:
        return payment.amount > 0

    for validator in (is_positive, is_positive_later):
        with pytest.raises(ConfigurationError, match=f"{validator.__name__} returned a bool for Payment"):
            await mediator_with(ValidationMiddleware({Payment: validator})).send(Payment(1))


@pytest.mark.parametrize(
    ("validators", "problem"),
    [
        ({"Payment": amount_is_positive}, "'Payment' is no message type"),
        ({Payment: None}, r"None.* \(for Payment\) is no validator"),
        ({Payment: [amount_is_positive, "x"]}, r"str.* \(for Payment\) is no validator"),
        ({Payment: Payment}, r"Payment \(for Payment\) is no validator"),
        (42, r"int.* \(for object\) is no validator"),
    ],
)
def test_what_is_no_validator_is_refused_at_once(validators: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        ValidationMiddleware(validators)


class _Stub:
    def __init__(self, role: str) -> None:
        self.role = role

    async def __call__(self, context: Context, call_next: Next) -> Any:
        return await call_next(context)


@pytest.mark.parametrize("role", ["retry", "transaction"])
def test_it_stands_outside_retry_and_transaction(role: str) -> None:
    validation = ValidationMiddleware({Payment: amount_is_positive})
    with pytest.raises(OrderError, match=r"ValidationMiddleware .* must stand outside _Stub"):
        Mediator(RequestMap().bind(Payment, pay), middlewares=[_Stub(role), validation])
    Mediator(RequestMap().bind(Payment, pay), middlewares=[validation, _Stub(role)])


async def test_called_by_hand_it_validates_what_has_a_route() -> None:
    validation = ValidationMiddleware({Payment: amount_is_positive})

    async def end(context: Context) -> str:
        return "end"

    assert await validation(Context(Payment(0)), end) == "end"
    assert await validation(Context(Payment(1), Route(Payment, "request", "local")), end) == "end"
    with pytest.raises(InvalidMessageError):
        await validation(Context(Payment(0), Route(Payment, "request", "local")), end)


async def test_a_refusal_keeps_no_context_alive() -> None:
    contexts: list[weakref.ref[Context]] = []

    class Remember:
        role: ClassVar[str] = "remember"

        async def __call__(self, context: Context, call_next: Next) -> Any:
            contexts.append(weakref.ref(context))
            return await call_next(context)

    validators: Mapping[type, Any] = {Payment: amount_is_positive}
    mediator = Mediator(RequestMap().bind(Payment, pay), middlewares=[Remember(), ValidationMiddleware(validators)])
    gc.disable()
    try:
        with pytest.raises(InvalidMessageError):
            await mediator.send(Payment(0))
        assert [one() for one in contexts] == [None]
    finally:
        gc.enable()
