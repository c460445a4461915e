"""The application's validators, before anything is tried or written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeGuard, cast

from pipeline_mediator.errors import ConfigurationError, InvalidMessageError, name_of
from pipeline_mediator.pipeline import Outside

if TYPE_CHECKING:
    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.pipeline import Next, Rule

__all__ = ["ValidationMiddleware", "Validator"]

Validator: TypeAlias = Callable[[Any], Awaitable[None] | None]
"""Looks at a message and raises to refuse it; a plain or an async function. It returns nothing."""


class ValidationMiddleware:
    """Refuses messages that their validators do not like, with `InvalidMessageError`.

        def has_quantity(command: PlaceOrder) -> None:
            if command.quantity < 1:
                raise ValueError("quantity must be at least 1")

        ValidationMiddleware({PlaceOrder: has_quantity, Command: [check_tenant, check_limits]})
        ValidationMiddleware(check_everything)

    All validators of a message's type and of its bases run, those of the bases first, until one raises. Where there is
    none, the middleware is left out. Whatever a validator raises says that the message is not valid, now and for ever:
    it is neither retried nor redelivered. So a validator looks at the message alone; what has to ask a database, which
    may be away for a moment, belongs into the handler.

    `reason` is the first argument of the validator's error, the whole error its `__cause__`. Of a pydantic or msgspec
    error only the place and the kind of the mistake are told: their texts quote the input.

    Raises `ConfigurationError` for a mapping that is not from types to functions, and for a validator that returns
    something: `return message.quantity > 0` would refuse nothing.
    """

    role: ClassVar[str] = "validation"
    rules: ClassVar[tuple[Rule, ...]] = (
        Outside("retry", "a message that is not valid does not become so by trying again"),
        Outside("transaction", "a refused message must not open a transaction"),
    )

    # Mapping's key is invariant: with `type` for Any, a dict[type[PlaceOrder], ...] in a variable would be refused.
    def __init__(self, validators: Mapping[Any, Validator | Sequence[Validator]] | Validator) -> None:
        by_type: Mapping[Any, Any] = (
            cast("Any", validators) if isinstance(validators, Mapping) else {object: validators}
        )
        self._validators: dict[Any, tuple[Validator, ...]] = {
            kind: _checked(kind, given) for kind, given in by_type.items()
        }

    def for_route(self, route: Route) -> _Validated | None:
        """The validators of this message type; what the relay publishes was validated when it was emitted."""
        if route.origin == "relay":
            return None
        bases = reversed(route.message_type.__mro__)
        validators = tuple(one for base in bases for one in self._validators.get(base, ()))
        return _Validated(route.message_type, validators) if validators else None

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Validate the message; a mediator compiles `for_route` instead."""
        validated = None if context.route is None else self.for_route(context.route)
        return await (call_next(context) if validated is None else validated(context, call_next))


class _Validated:
    """The validators of one message type."""

    def __init__(self, message_type: type, validators: tuple[Validator, ...]) -> None:
        self._type = message_type
        self._validators = validators
        self.summary = ", ".join(name_of(one) for one in validators)

    async def __call__(self, context: Context, call_next: Next) -> Any:
        for validator in self._validators:
            try:
                answer: object = validator(context.message)
                if answer is not None and isawaitable(answer):
                    answer = await answer
            except InvalidMessageError:
                raise
            except Exception as error:
                raise InvalidMessageError(self._type, _reason(error)) from error
            if answer is not None:
                raise ConfigurationError(
                    f"the validator {name_of(validator)} returned a {type(answer).__name__} for {self._type.__name__}: "
                    "a validator returns nothing, and raises to refuse a message"
                )
        return await call_next(context)


def _checked(kind: object, given: Validator | Sequence[Validator]) -> tuple[Validator, ...]:
    if not isinstance(kind, type):
        raise ConfigurationError(
            f"ValidationMiddleware: {kind!r} is no message type, so nothing would be validated by it"
        )
    validators: tuple[Validator, ...] = tuple(given) if _are_several(given) else (cast("Validator", given),)
    for validator in validators:
        if not callable(validator) or isinstance(validator, type):
            raise ConfigurationError(
                f"ValidationMiddleware: {name_of(validator)} (for {kind.__name__}) is no validator: pass a function "
                "that takes the message and raises to refuse it"
            )
    return validators


def _are_several(given: object) -> TypeGuard[Sequence[Validator]]:
    return isinstance(given, Sequence)


def _reason(error: Exception) -> str:
    library = type(error).__module__.partition(".")[0]
    if library in {"pydantic", "pydantic_core", "msgspec"}:
        from pipeline_mediator.payload_faults import what_pydantic_says

        where, problem = what_pydantic_says(error)
        return f"{where.removeprefix('$').removeprefix('.') or 'the message'}: {problem}"
    # Not str(error): attrs puts the value, and validators of others put whole objects, behind the text.
    text = error.args[0] if error.args and isinstance(error.args[0], str) else ""
    if not text:
        return type(error).__name__
    return text if isinstance(error, ValueError | AssertionError) else f"{type(error).__name__}: {text}"
