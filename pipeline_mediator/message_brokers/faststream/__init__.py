"""Whatever FastStream talks to: Kafka, RabbitMQ, NATS."""

from pipeline_mediator.message_brokers.faststream.broker import FastStreamBroker
from pipeline_mediator.message_brokers.faststream.subscription import FastStreamSubscription

__all__ = ["FastStreamBroker", "FastStreamSubscription"]
