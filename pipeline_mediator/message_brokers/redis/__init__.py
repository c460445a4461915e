"""Redis: Streams, at least once, and Pub/Sub, at most once."""

from pipeline_mediator.message_brokers.redis.pubsub import RedisMessageBroker
from pipeline_mediator.message_brokers.redis.streams import RedisStreamBroker
from pipeline_mediator.message_brokers.redis.subscription import RedisStreamSubscription

__all__ = ["RedisMessageBroker", "RedisStreamBroker", "RedisStreamSubscription"]
