"""Functions around functions: what one is called, and the signature that is left of it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def name_of(fn: Any) -> str:
    """Names a callable: functions by name, partials by what they wrap, module instances by class."""
    if isinstance(fn, functools.partial):
        return name_of(fn.func)
    return getattr(fn, "__name__", None) or type(fn).__name__


def wraps(fn: Any, leading: tuple[str, ...] = (), replaces: int = 0) -> Callable[[F], F]:
    """As `functools.wraps`, but takes callables without `__name__` and says the new leading arguments.

    `functools.wraps` would copy a module's attributes onto the function, so only the words are carried over.
    """

    def decorate(wrapper: F) -> F:
        wrapper.__name__ = wrapper.__qualname__ = name_of(fn)
        wrapper.__doc__ = getattr(fn, "__doc__", None)
        wrapper.__module__ = getattr(fn, "__module__", None) or wrapper.__module__
        vars(wrapper)["__wrapped__"] = fn
        signature = _signature(fn, leading, replaces)
        if signature is not None:
            vars(wrapper)["__signature__"] = signature
        return wrapper

    return decorate


def _signature(fn: Any, leading: tuple[str, ...], replaces: int) -> inspect.Signature | None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have none
        return None
    kept = list(signature.parameters.values())
    while (
        replaces
        and kept
        and kept[0].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ):
        del kept[0]
        replaces -= 1
    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in leading]
    kept = [p for p in kept if p.name not in leading]
    return signature.replace(parameters=[*first, *kept], return_annotation=inspect.Signature.empty)
