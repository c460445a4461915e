"""The application of these tests: an outbox and two subscriptions, of which one keeps dead letters."""

SHOP = """
    import sys
    from datetime import UTC, datetime

    from pipeline_mediator import EventMap, IntegrationEvent, Mediator, Pipeline, message
    from pipeline_mediator.consumer import Consumer
    from pipeline_mediator.message_brokers import MemoryBroker
    from pipeline_mediator.message_brokers.protocol import DeadDelivery, Delivery
    from pipeline_mediator.middlewares import PublishMiddleware
    from pipeline_mediator.outbox import OutboxRelay
    from pipeline_mediator.outbox.protocol import StoredMessage
    from tests.outbox.memory_store import MemoryStore

    print("a line that the application prints when it is imported")

    @message("orders.placed")
    class OrderPlaced(IntegrationEvent):
        pass

    events = EventMap()

    @events.handler
    async def ship(event: OrderPlaced) -> None:
        pass

    class Outbox:
        role = "outbox"
        summary = ""
        rules = ()
        store = MemoryStore()

        def for_route(self, route):
            return None

        async def __call__(self, context, call_next):
            return await call_next(context)

    HEADERS = {"cloudEvents:type": "orders.placed"}

    class Letters:
        def __init__(self, *bodies):
            self.kept = {
                f"d-{number}": DeadDelivery(
                    f"d-{number}",
                    Delivery("orders", body, "application/json", HEADERS, f"m-{number}", None, 5, "warehouse"),
                    "OutOfStockError: none left",
                    datetime(2024, 2, 29, 12, tzinfo=UTC),
                )
                for number, body in enumerate(bodies, 1)
            }
            self.retried = []
            self.breaks_after = None

        async def count(self):
            return len(self.kept)

        async def list(self, limit, /, *, after=None):
            later = [one for one in self.kept.values() if after is None or int(one.id[2:]) > int(after[2:])]
            return later[:limit]

        def _take(self, ids):
            if self.breaks_after is not None:
                if not self.breaks_after:
                    raise OSError("the line is dead: redis://ada:secret@host/0")
                self.breaks_after -= 1
            return [one for one in ids if self.kept.pop(one, None)]

        async def retry(self, ids, /):
            taken = self._take(ids)
            self.retried += taken
            return len(taken)

        async def drop(self, ids, /):
            return len(self._take(ids))

    class Subscription:
        def __init__(self, name, dead_letters):
            self.name = name
            self.dead_letters = dead_letters

    store = Outbox.store
    letters = Letters(b'{"sku": "book"}', bytes([0, 255]))
    bare = Mediator()
    mediator = Mediator(
        event_map=events, middlewares=Pipeline(Outbox(), PublishMiddleware(MemoryBroker(), {OrderPlaced: "orders"}))
    )

    async def fill(number):
        headers = {"type": "orders.placed", "authority": "amqp://ada:secret@host", "x\\x1b": "y"}
        text = '{"sku": "b\\u00fcch\\u001b"}'
        messages = [
            StoredMessage(f"m{n}", "orders.placed", 1, "orders", "application/json", text.encode(), headers, f"k{n}")
            for n in range(1, number + 1)
        ]
        await store.add(None, messages)
        for row in store.rows.values():
            row.state, row.failures, row.last_error = "dead", 3, "BrokerRefusedError: \\x1b[31mno, by redis://:pw@h/0"

    async def create_mediator():
        await fill(3)
        return mediator

    async def create_big():
        await fill(250)
        return mediator

    async def create_relay():
        await fill(1)
        return OutboxRelay(mediator)

    async def create_unbroken():
        return mediator

    async def create_broken():
        store.broken = ConnectionRefusedError("no database at postgresql://ada:secret@host/shop, and more\\nand more")
        return mediator

    async def create_consumer():
        await fill(1)
        return Consumer(mediator, Subscription("warehouse", letters), Subscription("live", None))

    async def create_lonely():
        return Consumer(bare, Subscription("warehouse", letters))

    async def create_silent():
        return Consumer(bare, Subscription("live", None))

    async def create_namesake():
        await fill(1)
        return Consumer(mediator, Subscription("outbox", letters))

    async def create_crowded():
        return Consumer(bare, Subscription("warehouse", Letters(*[b"{}"] * 250)))

    async def create_breaking():
        crowded = Letters(*[b"{}"] * 250)
        crowded.breaks_after = 2
        return Consumer(bare, Subscription("warehouse", crowded))
"""
