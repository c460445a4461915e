"""The floor: what every asyncio library pays."""

import asyncio

__all__ = ["asyncio"]

answer = 7
