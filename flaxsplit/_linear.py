"""State is linear: the calls that a loss function makes are noted, so that what they wrote can be looked for.

Noting a call costs one look at a variable. Calls in another trace than the loss function's own are not noted: which
branch of a `jax.lax.cond` counts is known at run time alone, and `jax.checkpoint` hands on what it is given.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

from ._caller import Line, caller
from ._context import during
from ._types import StatefulT, Tree
from ._upstream import current_trace
from ._wraps import name_of


class Call(NamedTuple):
    """One call of a stateful function, as a loss function made it."""

    fn: Callable[..., Any]
    line: Line
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    new_state: Tree

    def __str__(self) -> str:
        return f"{name_of(self.fn)} at {self.line}"


class _Watch(NamedTuple):
    trace: Any
    calls: list[Call]


_WATCH: ContextVar[_Watch | None] = ContextVar("watch", default=None)


def watched(loss_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, list[Call]]:
    """Calls a loss function; gives its result and the calls that it made."""
    watch = _Watch(current_trace(), [])
    with during(_WATCH, watch):
        return loss_fn(*args, **kwargs), watch.calls


def noted(fn: StatefulT) -> StatefulT:
    """Notes each call that a loss function makes of a stateful function; the calls in there are its own matter.

    `wraps`, around it, gives it the name and the signature of what it calls.
    """

    def noting(*args: Any, **kwargs: Any) -> Any:
        watch = _WATCH.get()
        if watch is None or len(args) < 2 or watch.trace != current_trace():
            return fn(*args, **kwargs)
        with during(_WATCH, None):
            out, new_state = fn(*args, **kwargs)
        watch.calls.append(Call(noting, caller(), args, kwargs, new_state))
        return out, new_state

    return cast(StatefulT, noting)
