"""What is published: each message is answered, and arrives as it was."""

# ruff: noqa: S101, PLR2004, SIM117  # these are tests: assert and numbers are the tools, and blocks show what is open when

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pipeline_mediator.errors import BrokerError
from pipeline_mediator.testing.broker_suite.backing import BrokerCases
from pipeline_mediator.testing.broker_suite.steps import bodies_of, headers_of, outgoing, sending, subscribed, take

if TYPE_CHECKING:
    from pipeline_mediator.testing.broker_suite.backing import Transport

__all__ = ["Publishing"]


class Publishing(BrokerCases):
    """What is published: each message is answered, and arrives as it was."""

    async def test_each_message_of_a_batch_has_an_answer(self, transport: Transport) -> None:
        """With one answer too few or too many, a relay would mark the wrong rows as sent."""
        async with subscribed(transport) as (broker, warehouse):
            for size in (1, 7):
                async with sending(self.features, broker, [outgoing(number) for number in range(size)]) as sent:
                    await take(self.features, warehouse, size)
                assert sent.answers == [None] * size

    async def test_an_empty_batch_has_no_answers(self, transport: Transport) -> None:
        """A relay whose rows all went elsewhere would fail."""
        async with transport.broker() as broker:
            assert list(await broker.publish([])) == []

    @pytest.mark.parametrize("body", [b"", bytes(range(256)), b"\r\n\r\n", "für dich".encode("utf-16")])
    async def test_bytes_arrive_as_they_were(self, transport: Transport, body: bytes) -> None:
        """A transport that takes bodies for text would damage what a codec other than JSON writes."""
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1, body=body)]):
                (delivery,) = await take(self.features, warehouse, 1)
            assert delivery.body == body

    async def test_content_type_arrives(self, transport: Transport) -> None:
        """The codec could not tell a structured event from a payload."""
        self.needs("content_types")
        sent = replace(outgoing(1), content_type="application/cloudevents+json; charset=utf-8")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [sent]):
                (delivery,) = await take(self.features, warehouse, 1)
            assert delivery.content_type == sent.content_type

    async def test_message_id_arrives(self, transport: Transport) -> None:
        """An operator could not find in the logs of the consumer what the producer's say."""
        self.needs("message_ids")
        sent = [outgoing(1, message_id=message_id) for message_id in ("0192-7", "id für dich / 7%")]
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, sent):
                deliveries = await take(self.features, warehouse, 2)
            assert {delivery.message_id for delivery in deliveries} == {"0192-7", "id für dich / 7%"}

    async def test_key_arrives_or_that_there_is_none(self, transport: Transport) -> None:
        """Messages without a key would wait for one another, or those with one overtake each other."""
        self.needs("keys", "keyless")
        sent = [outgoing(1, "a"), outgoing(2), outgoing(3, "schlüssel / 7%")]
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, sent):
                deliveries = await take(self.features, warehouse, 3)
            assert {delivery.body: delivery.key for delivery in deliveries} == {
                b"1": "a",
                b"2": None,
                b"3": "schlüssel / 7%",
            }

    async def test_headers_arrive(self, transport: Transport) -> None:
        """Types, traces and correlation would end at the broker."""
        self.needs("headers")
        headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "dataversion": "2"}
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1, headers=headers)]):
                (delivery,) = await take(self.features, warehouse, 1)
            sent = outgoing(1, headers=headers).headers
            assert sent.items() <= headers_of(delivery).items()

    @pytest.mark.parametrize("text", ["für 東京 🙂", "", " spaces around ", "50% = 100%25", 'a\r\nb: c, "d"'])
    async def test_headers_may_hold_any_text(self, transport: Transport, text: str) -> None:
        """A customer's name in a header would damage it, end the connection, or write a header of its own."""
        self.needs("headers", "any_header")
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1, headers={"customer": text})]):
                (delivery,) = await take(self.features, warehouse, 1)
            assert headers_of(delivery)["customer"] == text

    async def test_large_message_arrives_whole(self, transport: Transport) -> None:
        """A message above the size of a frame or of a packet would be cut."""
        body = bytes(range(256)) * (self.features.large // 256)
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(1, body=body)]):
                (delivery,) = await take(self.features, warehouse, 1)
            assert delivery.body == body

    async def test_many_messages_arrive_once_each(self, transport: Transport) -> None:
        """Something between here and there has a buffer that is too small, or is filled twice."""
        many = self.features.many
        async with subscribed(transport) as (broker, warehouse):
            async with sending(self.features, broker, [outgoing(number) for number in range(many)]):
                deliveries = await take(self.features, warehouse, many)
            assert sorted(map(int, bodies_of(deliveries))) == list(range(many))

    async def test_destinations_are_kept_apart(self, transport: Transport) -> None:
        """A group would handle events that it never asked for."""
        async with subscribed(transport) as (broker, warehouse):
            batch = [outgoing(1, to="returns"), outgoing(2)]
            async with sending(self.features, broker, batch):
                (delivery,) = await take(self.features, warehouse, 1)
            assert (delivery.destination, delivery.body) == ("orders", b"2")

    async def test_a_broker_that_was_not_entered_connects_when_it_is_used(self, transport: Transport) -> None:
        """An application that publishes once, from a script, would have to know about connections."""
        async with subscribed(transport) as (entered, warehouse):
            broker = transport.broker() if self.features.several_clients else entered
            async with broker if broker is entered else sending(self.features, broker, []):
                async with sending(self.features, broker, [outgoing(1)]):
                    await take(self.features, warehouse, 1)
            if broker is not entered:
                async with broker:
                    pass  # so that what it opened by itself is closed

    async def test_a_broker_that_was_left_answers_one_by_one_and_raises_nothing(self, transport: Transport) -> None:
        """A relay that outlives its broker by a moment would end in a traceback, and not know what was sent."""
        broker = transport.broker()
        async with broker:
            pass
        answers = list(await broker.publish([outgoing(1), outgoing(2)]))
        assert len(answers) == 2
        assert [answer for answer in answers if answer is not None and not isinstance(answer, BrokerError)] == []
        async with broker:
            pass
