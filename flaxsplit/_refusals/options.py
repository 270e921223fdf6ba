"""Arguments of another form: the rows that many combinators share."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from flaxsplit._describe import describe
from flaxsplit._errors import Explained, Guess, Refusal, SignatureError

_ELSE = "something else was passed, or the arguments are in another order"


def form(where: str, required: str, fix: str) -> Refusal:
    """The row of an argument that must have a certain form."""
    return Refusal(SignatureError, where, required, _ELSE, fix)


def function(where: str, name: str, fix: str) -> Refusal:
    """The row of an argument that must be a function."""
    return form(where, f"{name} must be a function, and no module or class", fix)


TX = form("$where", "tx must be an optax transformation: it has init and update", "tx = optax.adam(1e-3)")
AXIS_NAME = form("$where", "$option must be the name of an axis, or a tuple of names", "$option='batch'")


def unbound(fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Why a call does not fit the signature, empty where it does or where there is none; and the arguments by name."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return "", []
    try:
        signature.bind(*args, **kwargs)
    except TypeError as why:
        return str(why), [*signature.parameters]
    return "", [*signature.parameters]


@Guess
def COUNT(where: str, count: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """A number of parts, steps or lanes."""
    came = f"{describe(count)}: {count!r}" if isinstance(count, int | float) else describe(count)
    cause = "zero, a negative number, a fraction, or no number"
    return SignatureError(where, "a whole number of at least 1", [came], cause, where.replace("...", "4"))


DONATED = Refusal(
    SignatureError,
    "$where",
    "step must leave the carry that it is given: it is read again afterwards",
    "step was compiled by jit_step, which donates its carry, before it was wrapped; or this carry was passed twice",
    "jit_step($where): to compile comes last",
)


@Guess
def TWO(result: Any, where: str, form: str) -> Explained:  # noqa: N802
    """What must return two things."""
    came = f"a tuple of {len(result)}" if type(result) is tuple else describe(result)
    return SignatureError(where, f"must return two things: {form}", [came], "a result is missing", form)
