"""What holds while something is called, in this thread alone, and not after an exception."""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def during(variable: ContextVar[T], value: T) -> Generator[None]:
    """Gives a variable another value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
