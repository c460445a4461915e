"""Order, nesting and composing of middlewares, what stands in which chain, and the rules about it."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_mediator import (
    Command,
    Context,
    DomainEvent,
    EventMap,
    IntegrationEvent,
    Mediator,
    Middleware,
    Next,
    Pipeline,
    Query,
    RequestMap,
    Route,
    only,
    unless,
)
from pipeline_mediator.chain import compile_chain
from pipeline_mediator.errors import ConfigurationError, OrderError
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.middlewares.retry import RetryMiddleware
from pipeline_mediator.middlewares.timeout import TimeoutMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from pipeline_mediator.pipeline import Inside, Once, Outside, Rule, Without
from tests.fakes import Broker, Database, Recorder, Session


@dataclass(frozen=True)
class Add(Command[int]):
    number: int = 1


@dataclass(frozen=True)
class Count(Query[int]):
    number: int = 1


@dataclass(frozen=True)
class CountAll(Count):
    pass


@dataclass(frozen=True)
class Added(DomainEvent):
    number: int = 1


@dataclass(frozen=True)
class Shipped(IntegrationEvent):
    number: int = 1


async def add(command: Add) -> int:
    return command.number + 1


async def count(query: Count) -> int:
    return query.number


async def hear(event: Any) -> None: ...


async def identity(context: Context, call_next: Next) -> Any:
    return await call_next(context)


def mediator_of(middlewares: Iterable[Middleware], handler: Any = add) -> Mediator:
    return Mediator(
        RequestMap().bind(Add, handler).bind(Count, count).bind(CountAll, count),
        event_map=EventMap().bind(Added, hear).bind(Shipped, hear, at="emit"),
        middlewares=middlewares,
    )


def standing(mediator: Mediator, message_type: type, origin: str = "local") -> list[str]:
    """What stands in the chain of a type, by name, without the terminal."""
    (chain,) = [one for one in mediator.routes.all_of(message_type) if one.route.origin == origin][:1]
    return [link.name for link in chain.links[:-1]]


# -- order -------------------------------------------------------------------------------------------------------------

stacks: st.SearchStrategy[list[Any]] = st.lists(
    st.recursive(st.integers(0, 9), lambda inner: st.lists(inner, max_size=4), max_leaves=12), max_size=6
)


def flat(stack: Iterable[Any]) -> list[int]:
    names: list[int] = []
    for one in stack:
        names += [one] if isinstance(one, int) else flat(one)
    return names


def built(stack: Iterable[Any], log: list[str]) -> Pipeline:
    """A stack of recording middlewares; a list in it becomes a pipeline in the pipeline."""
    return Pipeline(*(Recorder(str(one), log) if isinstance(one, int) else built(one, log) for one in stack))


def walked(middlewares: Iterable[Middleware]) -> Any:
    """Send an Add through these, in an event loop of its own."""
    import asyncio

    return asyncio.run(_send(mediator_of(middlewares)))


async def _send(mediator: Mediator) -> int:
    return await mediator.send(Add(1))


def expected(names: Sequence[int]) -> list[str]:
    return [f"> {name}" for name in names] + [f"< {name}" for name in reversed(names)]


@given(stacks)
def test_the_first_is_the_outermost_and_nesting_is_the_same_as_a_flat_list(stack: list[Any]) -> None:
    log: list[str] = []

    assert walked(built(stack, log)) == 2
    assert log == expected(flat(stack))


@given(stacks, stacks)
def test_adding_is_the_same_as_a_flat_list(one: list[Any], other: list[Any]) -> None:
    names = flat(one) + flat(other)
    log: list[str] = []
    left, right = built(one, log), built(other, log)
    for added in (left + right, list(left) + right, left + list(right), [*left, right]):
        log.clear()
        walked(added)
        assert log == expected(names)


async def test_a_function_an_object_a_method_and_a_partial_are_middlewares() -> None:
    log: list[str] = []

    async def function(context: Context, call_next: Next) -> Any:
        log.append("function")
        return await call_next(context)

    class WithMethod:
        async def method(self, context: Context, call_next: Next) -> Any:
            log.append("method")
            return await call_next(context)

    async def curried(name: str, context: Context, call_next: Next) -> Any:
        log.append(name)
        return await call_next(context)

    middlewares: list[Middleware] = [
        function,
        Recorder("object", log),
        WithMethod().method,
        functools.partial(curried, "partial"),
        lambda context, call_next: call_next(context),
    ]

    assert await mediator_of(middlewares).send(Add(1)) == 2
    assert log == ["function", "> object", "method", "partial", "< object"]


async def test_call_next_may_be_called_again_and_starts_at_the_next_inner_one() -> None:
    log: list[str] = []

    async def twice(context: Context, call_next: Next) -> Any:
        return await call_next(context) + await call_next(context)

    mediator = mediator_of([Recorder("outer", log), twice, Recorder("inner", log), Recorder("innermost", log)])

    assert await mediator.send(Add(1)) == 4
    inner = ["> inner", "> innermost", "< innermost", "< inner"]
    assert log == ["> outer", *inner, *inner, "< outer"]


async def test_what_a_middleware_returns_is_the_result() -> None:
    async def tenfold(context: Context, call_next: Next) -> Any:
        return 10 * await call_next(context)

    assert await mediator_of([tenfold, tenfold]).send(Add(1)) == 200


async def test_a_middleware_that_does_not_call_next_ends_the_chain() -> None:
    log: list[str] = []

    async def cached(context: Context, call_next: Next) -> Any:
        return 42

    mediator = mediator_of([Recorder("outer", log), cached, Recorder("inner", log)])

    assert await mediator.send(Add(1)) == 42
    assert log == ["> outer", "< outer"]


async def test_a_middleware_may_pass_on_another_message_of_the_same_type_and_other_headers() -> None:
    seen: list[dict[str, str]] = []

    async def change(context: Context, call_next: Next) -> Any:
        return await call_next(context.replace(message=Add(41), headers={"tenant": "acme"}))

    async def look(context: Context, call_next: Next) -> Any:
        seen.append(context.headers)
        return await call_next(context)

    assert await mediator_of([look, change, look]).send(Add(1)) == 42
    assert seen == [{}, {"tenant": "acme"}]


async def test_a_middleware_may_not_pass_on_a_message_of_another_type() -> None:
    async def change(context: Context, call_next: Next) -> Any:
        return await call_next(context.replace(message=Count(1)))

    with pytest.raises(ConfigurationError, match="a middleware replaced a Add by a Count"):
        await mediator_of([change]).send(Add(1))


async def test_errors_pass_through_every_middleware_and_may_be_turned_into_a_result() -> None:
    log: list[str] = []
    error = ValueError("no")

    async def fail(command: Add) -> int:
        raise error

    async def rescue(context: Context, call_next: Next) -> Any:
        with contextlib.suppress(ValueError):
            return await call_next(context)
        return -1

    assert await mediator_of([rescue, Recorder("inner", log)], fail).send(Add(1)) == -1
    assert log == ["> inner", "< inner"]
    with pytest.raises(ValueError, match="no") as raised:
        await mediator_of([Recorder("inner", log)], fail).send(Add(1))
    assert raised.value is error


# -- for_route ---------------------------------------------------------------------------------------------------------


class Selecting:
    """Stands where `choose` says, as what it says."""

    def __init__(self, choose: Callable[[Route], Middleware | None]) -> None:
        self.choose = choose

    def for_route(self, route: Route) -> Middleware | None:
        return self.choose(route)

    async def __call__(self, context: Context, call_next: Next) -> Any:
        raise AssertionError("a chain holds what for_route returned")


async def test_for_route_says_what_stands_in_a_chain() -> None:
    log: list[str] = []
    routes: list[Route] = []

    def choose(route: Route) -> Middleware | None:
        routes.append(route)
        return Recorder(route.message_type.__name__, log) if route.message_type is Add else None

    mediator = mediator_of([Selecting(choose)])
    asked = len(routes)
    await mediator.send(Add())
    await mediator.send(Count())
    await mediator.emit(Added())

    assert log == ["> Add", "< Add"]
    assert Route(Add, "request", "local") in routes
    assert Route(Added, "event", "local") in routes
    assert len(routes) == asked
    assert standing(mediator, Add) == ["Selecting"]
    assert standing(mediator, Count) == []


async def test_for_route_may_return_the_middleware_itself() -> None:
    log: list[str] = []

    class Itself(Recorder):
        def for_route(self, route: Route) -> Middleware | None:
            return self if route.kind == "event" else None

    mediator = mediator_of([Itself("itself", log)])
    await mediator.send(Add())
    await mediator.emit(Added())

    assert log == ["> itself", "< itself"]


async def test_a_link_that_ends_the_chain_cuts_off_what_stands_behind_it() -> None:
    log: list[str] = []

    class Ends:
        ends_chain = True
        summary = "here it ends"

        async def __call__(self, context: Context, call_next: Next) -> Any:
            return 99

    mediator = mediator_of(
        [
            Recorder("outer", log),
            Selecting(lambda route: Ends() if route.kind == "request" else None),
            Recorder("in", log),
        ]
    )

    assert await mediator.send(Add()) == 99
    assert log == ["> outer", "< outer"]
    (chain,) = mediator.routes.all_of(Add)
    assert [link.name for link in chain.links] == ["Recorder", "Selecting"]
    assert standing(mediator, Added) == ["Recorder", "Recorder"]


async def test_a_terminal_may_be_called_without_call_next() -> None:
    class Ends:
        ends_chain = True

        async def terminal(self, context: Context) -> Any:
            return context.message.number * 100

        async def __call__(self, context: Context, call_next: Next) -> Any:
            raise AssertionError("there is nothing to call next")

    log: list[str] = []

    assert await mediator_of([Recorder("outer", log), Selecting(lambda _: Ends())]).send(Add(3)) == 300


async def test_an_attribute_called_terminal_alone_makes_no_terminal() -> None:
    class Console:
        terminal = "tty"

        async def __call__(self, context: Context, call_next: Next) -> Any:
            return await call_next(context)

    assert await mediator_of([Console()]).send(Add()) == 2


async def test_the_last_link_has_nothing_to_call() -> None:
    class Ends:
        ends_chain = True

        async def __call__(self, context: Context, call_next: Next) -> Any:
            return await call_next(context)

    with pytest.raises(
        ConfigurationError, match=r"Add \(request\): its last middleware called call_next, but it is the"
    ):
        await mediator_of([Selecting(lambda _: Ends())]).send(Add())


async def core_attempt(context: Context, call_next: Next) -> Any:
    return await call_next(context)


def test_a_chain_without_a_terminal_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"Add \(request\): no terminal stands in its chain, so nothing would hap"
    ):
        compile_chain(Route(Add, "request", "local"), [Recorder("only", [])], core_attempt)


class Roled:
    """A middleware with a role and rules."""

    def __init__(self, role: str | None = None, *rules: Rule) -> None:
        self.role = role
        self.rules = rules

    async def __call__(self, context: Context, call_next: Next) -> Any:
        return await call_next(context)


class Tracing(Recorder):
    def for_route(self, route: Route) -> Middleware:
        return self


class Sends(Tracing):
    ends_chain = True


def test_a_relay_walks_only_what_says_that_it_concerns_it() -> None:
    stack: list[Any] = [
        Recorder("left out", []),
        Tracing("stands", []),
        only(Shipped, Recorder("left out too", [])),
        only(Shipped, Tracing("stands too", [])),
        Sends("ends", []),
    ]
    names = {
        origin: [
            link.name for link in compile_chain(Route(Shipped, "event", origin, "orders"), stack, core_attempt).links
        ]
        for origin in ("local", "broker", "relay")
    }

    assert names == {
        "local": ["Recorder", "Tracing", "Recorder", "Tracing", "Sends"],
        "broker": ["Recorder", "Tracing", "Recorder", "Tracing", "Sends"],
        "relay": ["Tracing", "Tracing", "Sends"],
    }


def test_a_route_reads_well() -> None:
    assert str(Route(Add, "request", "local")) == "Add (request)"
    assert str(Route(Shipped, "event", "broker")) == "Shipped (event from broker)"
    assert str(Route(Shipped, "event", "relay", "orders")) == "Shipped (event from relay to orders)"


# -- rules -------------------------------------------------------------------------------------------------------------


class Lock(Roled):
    pass


class Audit(Roled):
    pass


def violations(*middlewares: Any) -> list[str]:
    """What is wrong with the chain of Add."""
    try:
        mediator_of(middlewares)
    except OrderError as error:
        return [one.removeprefix("Add (request): ") for one in error.violations]
    return []


def test_inside() -> None:
    rule = Inside("lock", "it writes")

    assert violations(Lock("lock"), Audit("audit", rule)) == []
    assert violations(Audit("audit", rule)) == []
    assert violations(Audit("audit", rule), Lock("lock")) == [
        "Audit (position 1) must stand inside Lock (position 2): it writes. Move it behind Lock."
    ]


def test_inside_and_required() -> None:
    rule = Inside("lock", "it writes", required=True)

    assert violations(Lock("lock"), Audit("audit", rule)) == []
    assert violations(Roled("other"), Audit("audit", rule)) == [
        "Audit (position 2) needs a lock middleware around it: it writes. Add one before it."
    ]
    assert violations(Audit("audit", rule), Lock("lock")) == [
        "Audit (position 1) must stand inside Lock (position 2): it writes. Move it behind Lock."
    ]


def test_a_middleware_is_not_its_own_company() -> None:
    required = Inside("lock", "it is the inner one", required=True)

    assert violations(Lock("lock", Without("lock", "two would wait for each other", "Take one out."))) == []
    assert violations(Lock("lock", required)) == [
        "Lock (position 1) needs a lock middleware around it: it is the inner one. Add one before it."
    ]
    assert violations(Lock("lock"), Lock("lock", required)) == []


def test_outside() -> None:
    rule = Outside("lock", "it refuses early")

    assert violations(Audit("audit", rule), Lock("lock")) == []
    assert violations(Audit("audit", rule)) == []
    assert violations(Lock("lock"), Audit("audit", rule)) == [
        "Audit (position 2) must stand outside Lock (position 1): it refuses early. Move it before Lock."
    ]


def test_once() -> None:
    once = Once("it counts")

    assert violations(Lock("lock", once), Roled("other", once)) == []
    assert violations(Lock("lock", once), Roled("other"), Audit("lock"), Lock("lock")) == [
        (
            "a second lock stands inside Lock (position 1), at position 3, position 4: it counts. Remove one, or keep "
            "them apart with only()."
        )
    ]


def test_once_without_a_role_goes_by_the_name() -> None:
    once = Once("it counts")

    assert violations(Lock(None, once), Audit(None, once)) == []
    assert violations(Lock(None, once), Lock(None)) == [
        (
            "a second Lock stands inside Lock (position 1), at position 2: it counts. Remove one, or keep them apart "
            "with only()."
        )
    ]


def test_without() -> None:
    rule = Without("lock", "it waits", "Take one out.")

    assert violations(Audit("audit", rule)) == []
    text = "Audit (position {}) and Lock (position {}) exclude each other: it waits. Take one out."
    assert violations(Audit("audit", rule), Lock("lock")) == [text.format(1, 2)]
    assert violations(Lock("lock"), Audit("audit", rule)) == [text.format(2, 1)]


def test_an_order_error_lists_every_violation_of_a_chain() -> None:
    with pytest.raises(OrderError) as raised:
        mediator_of(
            [
                Lock("lock", Once("it counts"), Inside("timer", "it waits")),
                Audit("audit", Outside("lock", "it refuses early"), Without("lock", "it waits", "Take one out.")),
                Lock("lock"),
                Roled("timer", Inside("clock", "it ticks", required=True)),
            ]
        )

    assert [one.removeprefix("Add (request): ").partition(": ")[0] for one in raised.value.violations] == [
        "a second lock stands inside Lock (position 1), at position 3",
        "Lock (position 1) must stand inside Roled (position 4)",
        "Audit (position 2) must stand outside Lock (position 1)",
        "Audit (position 2) and Lock (position 1) exclude each other",
        "Audit (position 2) and Lock (position 3) exclude each other",
        "Roled (position 4) needs a clock middleware around it",
    ]
    assert str(raised.value).startswith(
        "the middlewares stand in an order that breaks 6 of their rules:\n  - Add (requ"
    )
    assert str(raised.value).count("\n  - ") == 6


def test_the_rules_of_the_specialised_link_count() -> None:
    strict, lenient = Lock("lock", Inside("audit", "it is strict")), Lock("lock")
    specialising = Selecting(lambda route: strict if issubclass(route.message_type, Command) else lenient)

    with pytest.raises(OrderError) as raised:
        mediator_of([specialising, Audit("audit")])

    assert raised.value.violations == (
        (
            "Add (request): Selecting (position 1) must stand inside Audit (position 2): it is strict. Move it behind "
            "Audit."
        ),
    )


def test_a_link_without_rules_of_its_own_has_those_of_what_it_was_made_of() -> None:
    class Specialised:
        async def __call__(self, context: Context, call_next: Next) -> Any: ...

    class Source(Selecting):
        role: ClassVar[str] = "lock"
        rules: ClassVar = (Inside("audit", "it is strict"),)
        summary = "from the source"

    mediator = mediator_of([Source(lambda _: Specialised())])
    (chain,) = mediator.routes.all_of(Add)
    assert (chain.links[0].role, chain.links[0].summary) == ("lock", "from the source")
    assert chain.has("lock")
    assert not chain.has("audit")
    with pytest.raises(OrderError, match=r"Source \(position 1\) must stand inside Audit"):
        mediator_of([Source(lambda _: Specialised()), Audit("audit")])


def test_rules_are_checked_on_chains_so_that_only_makes_a_violation_vanish() -> None:
    inside = Audit("audit", Inside("lock", "it writes"))

    assert violations(only(Query, inside), only(Command, Lock("lock"))) == []
    assert violations(only(Command, inside), only(Command, Lock("lock"))) == [
        "Audit (position 1) must stand inside Lock (position 2): it writes. Move it behind Lock."
    ]


async def test_a_type_that_nobody_bound_is_checked_when_it_is_first_compiled() -> None:
    mediator = mediator_of([only(Shipped2, Audit("audit", Inside("lock", "it writes", required=True)))])

    with pytest.raises(OrderError, match=r"Audit \(position 1\) needs a lock middleware around it"):
        await mediator.emit(Shipped2())


@dataclass(frozen=True)
class Shipped2(Shipped):
    pass


def test_the_real_rules() -> None:
    database = Database()
    transaction = TransactionMiddleware(database.begin)

    assert violations(RetryMiddleware(), TimeoutMiddleware(5), transaction) == []
    assert violations(transaction, RetryMiddleware()) == [
        (
            "RetryMiddleware (position 2) must stand outside TransactionMiddleware (position 1): a transaction that "
            "failed cannot be used again; each attempt needs its own. Move it before TransactionMiddleware."
        )
    ]
    assert len(violations(transaction, transaction)) == 1


def test_what_needs_a_transaction_is_told_that_a_published_message_has_none() -> None:
    audit = Audit("audit", Inside("transaction", "it writes", required=True))
    stack: list[Middleware] = [TransactionMiddleware(Database().begin), audit, PublishMiddleware(Broker())]

    with pytest.raises(OrderError) as raised:
        mediator_of(stack)
    assert raised.value.violations == (
        (
            "Shipped (event to Shipped): Audit (position 1) needs a transaction middleware around it: it writes. What "
            "goes straight to a broker is in no transaction: leave it out of such chains with only(..., when=lambda "
            "route: route.destination is None), or add an OutboxMiddleware."
        ),
    )

    stack[1] = only(audit, when=lambda route: route.destination is None)
    mediator_of(stack)


def test_only_what_needs_a_transaction_in_a_published_message_is_told_so() -> None:
    text = "needs a {} middleware around it: it writes. Add one before it."
    stacks: list[tuple[str, list[Middleware]]] = [("lock", [PublishMiddleware(Broker())]), ("transaction", [])]
    for role, stack in stacks:
        audit = Audit("audit", Inside(role, "it writes", required=True))
        with pytest.raises(OrderError) as raised:
            mediator_of([audit, *stack])
        assert all(one.endswith(text.format(role)) for one in raised.value.violations)


class Stores(Roled):
    """As an outbox does: in the transaction."""


def test_what_is_stored_in_the_transaction_has_one_and_does_not_publish() -> None:
    database = Database()
    direct: list[Middleware] = [TransactionMiddleware(database.begin), PublishMiddleware(Broker(), {Shipped: "orders"})]
    stored: list[Middleware] = [direct[0], Stores("outbox"), direct[1]]

    (_, sent, *_), (_, kept, *_) = (mediator_of(stack).routes.all_of(Shipped) for stack in (direct, stored))

    assert [link.name for link in sent.links] == ["PublishMiddleware"]
    assert sent.publishes
    assert sent.unit_of_work is None
    assert [link.name for link in kept.links] == ["TransactionMiddleware", "Stores", "PublishMiddleware"]
    assert not kept.publishes
    assert kept.unit_of_work == database.begin


# -- only and unless ---------------------------------------------------------------------------------------------------


def test_only_and_unless_by_type_and_its_subclasses() -> None:
    mediator = mediator_of(
        [
            only(Query, Lock()),
            only((Command, DomainEvent), Audit()),
            unless(Count, Recorder("not for counts", [])),
            unless((Command, Query), Roled()),
        ]
    )

    assert standing(mediator, Add) == ["Audit", "Recorder"]
    assert standing(mediator, Count) == ["Lock"]
    assert standing(mediator, CountAll) == ["Lock"]
    assert standing(mediator, Added) == ["Audit", "Recorder", "Roled"]


def test_only_and_unless_by_route() -> None:
    def from_broker(route: Route) -> bool:
        return route.origin == "broker"

    stack = [only(Lock(), Audit(), when=from_broker), unless(Roled(), when=from_broker)]
    mediator = Mediator(event_map=EventMap().bind(Shipped, hear), middlewares=stack)

    assert standing(mediator, Shipped) == ["Roled"]
    assert standing(mediator, Shipped, "broker") == ["Lock", "Audit"]


async def test_only_keeps_the_order_and_nests() -> None:
    log: list[str] = []
    inner = Pipeline(Recorder("1", log), unless(Query, Recorder("2", log)), Recorder("3", log))
    mediator = mediator_of([only((Command, Query), inner), Recorder("4", log)])

    await mediator.send(Add())
    assert log == expected([1, 2, 3, 4])
    log.clear()
    await mediator.send(Count())
    assert log == expected([1, 3, 4])
    log.clear()
    await mediator.emit(Added())
    assert log == expected([4])


async def test_what_stands_in_only_is_asked_for_its_route_too() -> None:
    mediator = mediator_of([only(Command, Selecting(lambda route: None)), only(Command, TimeoutMiddleware(5))])

    assert standing(mediator, Add) == ["TimeoutMiddleware"]
    (chain,) = mediator.routes.all_of(Add)
    assert chain.links[0].summary == "5 s"
    assert chain.links[0].role == "timeout"


class Keep:
    def __init__(self, session: Session) -> None:
        self.session = session

    async def handle(self, command: Add) -> int:
        self.session.rows.append(command)
        return 1


async def test_a_transaction_in_only_seeds_the_scope() -> None:
    database = Database()
    mediator = mediator_of([only(Command, TransactionMiddleware(database.begin))], Keep)

    assert await mediator.send(Add(1)) == 1
    assert await mediator.send(Count(1)) == 1
    assert database.rows == [Add(1)]
    assert database.log == ["begin", "commit"]


async def test_a_broker_in_only_is_opened_and_publishes_what_it_stands_for() -> None:
    orders, rest = Broker("orders"), Broker("rest")
    mediator = Mediator(
        middlewares=[only(Shipped2, PublishMiddleware(orders)), unless(Shipped2, PublishMiddleware(rest))]
    )
    async with mediator:
        await mediator.emit(Shipped())
        await mediator.emit(Shipped2())

    assert (orders.log, rest.log) == (["open orders", "close orders"], ["open rest", "close rest"])
    assert [one.name for one in orders.published] == ["Shipped2"]
    assert [one.name for one in rest.published] == ["Shipped"]


@dataclass(frozen=True)
class Ship(Command[None]):
    number: int = 1


async def test_a_condition_sees_the_whole_route_of_a_remote_command() -> None:
    broker = Broker()
    seen: list[Route] = []

    def condition(route: Route) -> bool:
        seen.append(route)
        return route.kind == "request" and route.destination == "warehouse"

    publish = PublishMiddleware(broker, {Ship: "warehouse", Shipped: "warehouse"})
    mediator = Mediator(middlewares=[only(publish, when=condition)], event_map=EventMap().bind(Shipped, hear))

    await mediator.send(Ship())
    await mediator.emit(Shipped())

    assert [one.name for one in broker.published] == ["Ship"]
    assert Route(Ship, "request", "local", "warehouse") in seen
    assert Route(Shipped, "event", "local", "warehouse") in seen


async def test_a_pipeline_may_be_copied() -> None:
    log: list[str] = []
    pipeline = Pipeline(Recorder("1", log), only(Command, Recorder("2", log)))

    assert await mediator_of(copy.copy(pipeline)).send(Add()) == 2
    assert log == expected([1, 2])
    assert await mediator_of(copy.deepcopy(pipeline)).send(Add()) == 2
    assert log == expected([1, 2])


@pytest.mark.parametrize(
    "wrong", [(), (hear,), (Recorder("a", []), Recorder("b", [])), ((Query, hear),), (Command[int],)]
)
@pytest.mark.parametrize("function", [only, unless])
def test_only_needs_types_or_a_condition(function: Any, wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigurationError, match="take a message type or a tuple of them first, or when=lambda route"):
        function(*wrong)


def test_only_takes_middlewares() -> None:
    wrong: Any = Lock
    with pytest.raises(ConfigurationError, match=r"Lock is no middleware: .*an object of the class, not the class"):
        only(Query, wrong)


# -- composing ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_is_an_immutable_sequence() -> None:
    a, b, c = Lock(), Audit(), Roled()
    pipeline = Pipeline(a, Pipeline(b), c)

    assert list(pipeline) == [a, b, c]
    assert len(pipeline) == 3
    assert pipeline[0] is a
    assert pipeline[-1] is c
    assert b in pipeline
    sliced = pipeline[1:]
    assert isinstance(sliced, Pipeline)
    assert list(sliced) == [b, c]
    assert list(pipeline[::-1]) == [c, b, a]
    assert not hasattr(pipeline, "append")
    assert repr(Pipeline(only(Query, a), b, identity)) == "Pipeline(Lock, Audit, identity)"


def test_before_after_replace_and_without_give_new_pipelines() -> None:
    a, b, c, x, y = Lock(), Audit(), Lock(), Roled(), Roled()
    pipeline = Pipeline(a, b, c)

    assert list(pipeline.before(Lock, x, y)) == [x, y, a, b, c]
    assert list(pipeline.after(Lock, x, y)) == [a, x, y, b, c]
    assert list(pipeline.replace(Lock, x, y)) == [x, y, b, c]
    assert list(pipeline.without(Lock)) == [b]
    assert list(pipeline.before(c, x)) == [a, b, x, c]
    assert list(pipeline.after(c, x)) == [a, b, c, x]
    assert list(pipeline.replace(b, x)) == [a, x, c]
    assert list(pipeline.without(c)) == [a, b]
    assert list(pipeline) == [a, b, c]


def test_an_anchor_may_stand_in_a_pipeline_or_in_only() -> None:
    a, b, x = Lock(), Audit(), Roled()
    nested = Pipeline(Pipeline(a), only(Query, b))

    assert nested.before(Lock, x)[0] is x
    assert nested.before(Audit, x)[1] is x
    assert nested.after(b, x)[2] is x
    assert list(nested.without(Audit)) == [a]


@pytest.mark.parametrize("change", ["before", "after", "replace", "without"])
def test_an_unknown_anchor_is_named_with_what_stands_there(change: str) -> None:
    pipeline = Pipeline(Lock(), only(Query, Audit()), identity)

    with pytest.raises(ConfigurationError) as raised:
        getattr(pipeline, change)(RetryMiddleware)
    assert str(raised.value) == "RetryMiddleware does not stand in this pipeline; in it stand: Lock, Audit, identity"
    with pytest.raises(ConfigurationError, match="Roled does not stand in this pipeline; in it stand: nothing"):
        getattr(Pipeline(), change)(Roled())


@pytest.mark.parametrize(
    ("wrong", "name", "hint"),
    [(Lock, "Lock", " (an object of the class, not the class)"), ("lock", "str object", ""), (None, "None", "")],
)
def test_what_is_no_middleware_is_refused(wrong: Any, name: str, hint: str) -> None:
    for make in (
        lambda: Pipeline(wrong),
        lambda: Pipeline().__add__([wrong]),
        lambda: Pipeline(Lock()).before(Lock, wrong),
        lambda: Mediator(middlewares=[wrong]),
    ):
        with pytest.raises(ConfigurationError) as raised:
            make()
        assert str(raised.value) == (
            f"{name} is no middleware: pass an async function (context, call_next), or an object with such a "
            f"__call__{hint}"
        )


async def test_a_pipeline_may_be_called_as_a_middleware() -> None:
    log: list[str] = []
    inner = Pipeline(
        Recorder("1", log),
        only(Command, Recorder("2", log)),
        unless(Command, Recorder("3", log)),
        Selecting(lambda route: None),
        only(Pipeline(TimeoutMiddleware(5)), when=lambda route: route.message_type is Add),
    )

    async def around(context: Context, call_next: Next) -> Any:
        return await inner(context, call_next)

    assert await mediator_of([around, Recorder("4", log)]).send(Add()) == 2
    assert log == expected([1, 2, 4])


async def test_a_pipeline_that_is_called_knows_the_route() -> None:
    log: list[str] = []
    inner = Pipeline(only(Recorder("event", log), when=lambda route: route.kind == "event"))

    async def around(context: Context, call_next: Next) -> Any:
        return await inner(context, call_next)

    mediator = mediator_of([around])
    await mediator.send(Add())
    assert log == []
    await mediator.emit(Added())
    assert log == ["> event", "< event"]


async def test_a_pipeline_may_be_called_in_a_unit_test() -> None:
    log: list[str] = []

    async def end(context: Context) -> Any:
        return context.message

    result = await Pipeline(Recorder("1", log), only(Query, Recorder("2", log)))(Context(Add(5)), end)

    assert result == Add(5)
    assert log == expected([1])


async def test_what_only_made_may_be_called_in_a_unit_test() -> None:
    log: list[str] = []
    (stands,), (left_out,) = only(Command, Recorder("1", log)), only(Query, Recorder("2", log))

    async def end(context: Context) -> Any:
        return context.message

    assert await stands(Context(Add(5)), end) == Add(5)
    assert await left_out(Context(Add(6)), end) == Add(6)
    assert log == expected([1])
