"""Lazy names are known to type checkers, misspelt ones are refused."""

import pipeline_mediator
import pipeline_mediator.middlewares
from pipeline_mediator import Mediatr  # expect-error
from pipeline_mediator.middlewares import RetryMiddlewear  # expect-error

print(pipeline_mediator.Mediator, pipeline_mediator.middlewares.RetryMiddleware)
print(pipeline_mediator.Mediatr)  # expect-error
print(pipeline_mediator.middlewares.RetryMiddlewear)  # expect-error
