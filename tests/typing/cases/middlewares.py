"""What a middleware is, and how `only` and `unless` are called."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, assert_type

from pipeline_mediator import Command, Context, IntegrationEvent, Mediator, Middleware, Next, Pipeline, Query, Route
from pipeline_mediator import only, unless
from pipeline_mediator.middlewares import HandleMiddleware


@dataclass(frozen=True)
class FindOrder(Query[int]):
    sku: str


async def plain(context: Context, call_next: Next) -> Any:
    return await call_next(context)


async def other_names(ctx: Context, proceed: Callable[[Context], Awaitable[Any]]) -> object:
    return await proceed(ctx)


def not_async(context: Context, call_next: Next, /) -> Awaitable[Any]:
    return call_next(context)


class Cache:
    def __init__(self, seconds: float) -> None: ...

    def for_route(self, route: Route) -> Cache | None:
        return self if route.origin == "local" else None

    async def __call__(self, context: Context, call_next: Next) -> Any:
        return await call_next(context)


async def takes_no_next(context: Context) -> Any: ...
async def takes_a_message(message: FindOrder, call_next: Next) -> Any: ...


def returns_no_awaitable(context: Context, call_next: Next) -> int:
    return 1


stack: list[Middleware] = [plain, other_names, not_async, Cache(30)]
assert_type(Pipeline(plain, Cache(30)) + stack, Pipeline)
assert_type(Pipeline(*stack).before(Cache, plain).after(plain, Cache(1)).replace(Cache, plain).without(plain), Pipeline)
assert_type(Pipeline(plain)[0], Middleware)
assert_type(Pipeline(plain)[:1], Pipeline)
Pipeline(Pipeline(plain), only(Query, Cache(30)))
Mediator(middlewares=[plain, Cache(30)])
Mediator(middlewares=Pipeline(plain, Cache(30)))
nested: Middleware = Pipeline(plain)

Pipeline(takes_no_next)  # expect-error
Pipeline(takes_a_message)  # expect-error
Pipeline(returns_no_awaitable)  # expect-error
Pipeline(Cache)  # expect-error
Mediator(middlewares=[takes_no_next])  # expect-error
Mediator(middlewares=plain)  # expect-error
Mediator(middlewares=[HandleMiddleware])  # expect-error


def by_origin(route: Route) -> bool:
    return route.origin == "broker"


assert_type(only(Command, plain, Cache(30)), Pipeline)
assert_type(only((Command, Query), plain), Pipeline)
assert_type(only(plain, Cache(30), when=lambda route: route.origin == "broker"), Pipeline)
assert_type(only(plain, when=by_origin), Pipeline)
assert_type(unless(Command, plain), Pipeline)
assert_type(unless((FindOrder, IntegrationEvent), plain, Cache(30)), Pipeline)
assert_type(unless(plain, when=lambda route: route.destination is None), Pipeline)

only(plain)  # expect-error
only("FindOrder", plain)  # expect-error
only(Command, takes_no_next)  # expect-error
only(takes_no_next, when=by_origin)  # expect-error
only(plain, when=lambda route: route.sender == "broker")  # expect-error
only(Command, plain, when=by_origin)  # expect-error
unless(plain)  # expect-error
unless((Command, "FindOrder"), plain)  # expect-error
unless(plain, when="broker")  # expect-error


async def in_a_middleware(context: Context, call_next: Next) -> Any:
    assert_type(context.headers, dict[str, str])
    assert_type(context.message_id, str)
    assert_type(context.replace(message=FindOrder("book")), Context)
    context.note("cache hit", age=3)
    context.after_commit(lambda: None)
    context.headers["tenant"] = 1  # expect-error
    context.message_id = "1"  # expect-error
    context.tenant = "acme"  # expect-error
    await call_next()  # expect-error
    return await call_next(context)
