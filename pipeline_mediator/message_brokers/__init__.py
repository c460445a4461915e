"""Brokers that a Publish middleware can hand messages to; each is loaded when it is asked for."""

from typing import TYPE_CHECKING

__all__ = [
    "Ack",
    "AzureMessageBroker",
    "BrokerFeatures",
    "Dead",
    "DeadDelivery",
    "DeadLetterQueue",
    "Delivery",
    "FastStreamBroker",
    "Later",
    "MemoryBroker",
    "MemorySubscription",
    "MessageBroker",
    "Outcome",
    "Outgoing",
    "RedisMessageBroker",
    "RedisStreamBroker",
    "Subscription",
    "Undecodable",
]

if TYPE_CHECKING:
    from pipeline_mediator.message_brokers.azure import AzureMessageBroker
    from pipeline_mediator.message_brokers.faststream import FastStreamBroker
    from pipeline_mediator.message_brokers.memory import MemoryBroker, MemorySubscription
    from pipeline_mediator.message_brokers.protocol import (
        Ack,
        BrokerFeatures,
        Dead,
        DeadDelivery,
        DeadLetterQueue,
        Delivery,
        Later,
        MessageBroker,
        Outcome,
        Outgoing,
        Subscription,
        Undecodable,
    )
    from pipeline_mediator.message_brokers.redis import RedisMessageBroker, RedisStreamBroker
else:
    from pipeline_mediator.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "azure": ("AzureMessageBroker",),
            "faststream": ("FastStreamBroker",),
            "memory": ("MemoryBroker", "MemorySubscription"),
            "protocol": (
                "Ack",
                "BrokerFeatures",
                "Dead",
                "DeadDelivery",
                "DeadLetterQueue",
                "Delivery",
                "Later",
                "MessageBroker",
                "Outcome",
                "Outgoing",
                "Subscription",
                "Undecodable",
            ),
            "redis": ("RedisMessageBroker", "RedisStreamBroker"),
        },
    )
