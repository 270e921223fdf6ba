"""Arguments of another form: the rows that many combinators share."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flaxsplit._describe import ABSENT, Difference, describe, is_numeric, shorten
from flaxsplit._errors import Explained, Guess, Refusal, SignatureError

_ELSE = "something else was passed, or the arguments are in another order"


def form(where: str, required: str, fix: str) -> Refusal:
    """The row of an argument that must have a certain form."""
    return Refusal(SignatureError, where, required, _ELSE, fix)


def function(where: str, name: str, fix: str) -> Refusal:
    """The row of an argument that must be a function."""
    return form(where, f"{name} must be a function, and no module or class", fix)


TX = form("$where", "tx must be an optax transformation: it has init and update", "$where, where tx = optax.adam(1e-3)")
AXIS_NAME = form("$where", "$option must be the name of an axis, or a tuple of names", "$option='batch'")


def parameters(fn: Any) -> Mapping[str, Any]:
    """The parameters of a function by name; of some builtins nobody knows them."""
    try:
        return inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return {}


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


def mesh_in_type(leaf: Any) -> str:
    """Says the mesh that is part of a leaf's type, as where axes are Explicit; nothing for none."""
    sharding: Any = getattr(jax.typeof(leaf), "sharding", None) if is_numeric(leaf) else None
    return _mesh(getattr(sharding, "mesh", None))


def _mesh(placement: Any) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in getattr(placement, "shape", {}).items())
    return axes and f"mesh({axes})"


def place_of(placement: Any) -> str:
    """Says a mesh or a sharding by its axes and devices; the words of JAX differ by version."""
    mesh = _mesh(placement)
    devices = list(placement.devices.flat if mesh else placement.device_set)
    names = ", ".join(shorten(sorted(f"{device.platform}:{device.id}" for device in devices), 4))
    return f"{mesh} of {names}" if mesh else names


_SOWN = re.compile(r"state\['([^']+)'\].*\[\d+\]$")


def sown_in(changed: Sequence[Difference]) -> str | None:
    """The collection whose tuples grew, if that is all that changed: a model sowed into a collection of the state."""
    found = [_SOWN.search(each.path) if each.before == ABSENT else None for each in changed]
    names = {each[1] if each else None for each in found}
    return names.pop() if len(names) == 1 else None


@Guess
def COUNT(where: str, count: Any) -> Explained:  # noqa: N802 (a row as the others are)
    """A number of parts, steps or lanes."""
    came = f"{describe(count)}: {count!r}" if isinstance(count, int | float) else describe(count)
    cause = "zero, a negative number, a fraction, or no number"
    return SignatureError(where, "a whole number of at least 1", [came], cause, where.replace("...", "4"))


LISTED = "a list was returned, where a tuple is due"
DONATED = Refusal(
    SignatureError,
    "$where",
    "step must leave the carry that it is given: it is read again afterwards",
    "step was compiled by jit_step, which donates its carry, before it was wrapped; or this carry was passed twice",
    "jit_step($where): to compile comes last",
)


@Guess
def SHAPES(declared: Sequence[Any], where: str) -> Explained:  # noqa: N802
    """An array of another shape or dtype than its annotation says, after those that have a name of a size with it."""
    kinds = [f"{each.hint.dtype.__name__}[..., {each.hint.dim_str!r}]" for each in declared]
    came = [f"{each.path}: {describe(each.leaf)}, declared {kind}" for each, kind in zip(declared, kinds, strict=True)]
    required = "arrays must be as their annotations say, with one size for each name"
    cause = "another array was passed, an axis is missing, or one is too many"
    fix = "the arrays that are declared; or in the annotation another name, where sizes may differ"
    return SignatureError(where, required, came, cause, fix)


@Guess
def TWO(result: Any, where: str, form: str, many: str = "") -> Explained:  # noqa: N802
    """What must return two things; `many` mends what returns more."""
    came = f"a tuple of {len(result)}" if type(result) is tuple else describe(result)
    cause = LISTED if isinstance(result, list) else "a result is missing"
    fix = form
    if type(result) is tuple and len(result) > 2:
        cause, fix = "a result is too many: what else is returned goes into one of the two", many or form
    return SignatureError(where, f"must return two things: {form}", [came], cause, fix)
