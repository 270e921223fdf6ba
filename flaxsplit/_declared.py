"""Shapes that users declare with jaxtyping, looked at where `FLAXSPLIT_TYPECHECKER` asks for it.

A name is one size within one call of the function that declares it, as in jaxtyping. `batch` is one size in a call of
a loss function and in the calls of models that it makes. Off, nothing is wrapped; on, what is jitted is looked at while
it is traced.
"""

import functools
import inspect
import typing
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import jax
import jaxtyping

from ._checks import TYPECHECKER
from ._context import during
from ._describe import is_array
from ._refusals.options import SHAPES
from ._types import StatefulT

SHARED = "batch"
_SIZE: Any = jaxtyping.Shaped[Any, SHARED]
_OUTER: ContextVar[tuple["Declared", ...]] = ContextVar("outer", default=())


class Declared(NamedTuple):
    """An array, and what is said of it: `Float[Array, "batch dim"]`, read as any array of such a shape and dtype."""

    path: str
    hint: Any
    leaf: Any

    @property
    def names(self) -> list[str]:
        """Its axes."""
        return cast(str, self.hint.dim_str).split()

    def fits(self) -> bool:
        """Whether it is as declared; its sizes count for what is looked at after it."""
        try:
            return isinstance(self.leaf, self.hint.dtype[Any, self.hint.dim_str])
        except jaxtyping.AnnotationError:  # a sum of sizes of which one is not known
            return True

    def share(self) -> None:
        """As `fits`, for the one axis that is shared."""
        if len(self.names) == len(self.leaf.shape):  # else one of them stands for several axes
            size = self.leaf.shape[self.names.index(SHARED)]
            isinstance(jax.ShapeDtypeStruct((size,), bool), _SIZE)


def declaring(fn: StatefulT, where: str, model: Any = None, leading: int = 0) -> StatefulT:
    """The function, its arguments and its result compared with what it declares: it itself, or the model behind it.

    `leading` arguments of the model stand where params and state do: `self`, or the variables.
    """
    of = fn if model is None else model
    hints = _hints_of(of) if TYPECHECKER else {}
    if not any(_says_shapes(hint) for hint in hints.values()):
        return fn
    signature, hidden = inspect.signature(of), 0 if model is None else 2

    @functools.wraps(fn)
    def comparing(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind_partial(*[None] * leading, *args[hidden:], **kwargs).arguments
        except TypeError:  # fn says what is wrong with the call
            return fn(*args, **kwargs)
        given = [each for name, value in bound.items() for each in _arrays_in(name, hints.get(name), value)]
        _compare(where, given)
        shared = tuple(each for each in given if SHARED in each.names)
        with during(_OUTER, shared or _OUTER.get()):
            result = fn(*args, **kwargs)
        _compare(where, [*given, *_arrays_in("out", hints.get("return"), result[0] if hidden else result)])
        return result

    return cast(StatefulT, comparing)


def _compare(where: str, given: list[Declared]) -> None:
    outer = _OUTER.get()
    with jaxtyping.jaxtyped("context"):
        for each in outer:
            each.share()
        for i, each in enumerate(given):
            if not each.fits():
                known = [*(other for other in outer if SHARED in each.names), *given[:i]]
                beside = [other for other in known if not set(other.names).isdisjoint(each.names)]
                SHAPES.unless(False, [*beside, each], where)


def _hints_of(of: Any) -> dict[str, Any]:
    fn: Any = of if inspect.isroutine(of) else type(of).__call__
    try:
        return typing.get_type_hints(fn)
    except (NameError, TypeError, AttributeError):  # a name that is known to checkers alone; a callable without any
        return {}


def _is_shape(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray) and "{" not in cast(Any, hint).dim_str


def _says_shapes(hint: Any, within: tuple[Any, ...] = ()) -> bool:
    """Looks into what a hint is made of; a class may be a field of itself, as a Linen module's parent is."""
    parts = () if hint in within else (*typing.get_args(hint), *_fields_of(hint).values())
    return _is_shape(hint) or any(_says_shapes(part, (*within, hint)) for part in parts)


def _fields_of(hint: Any) -> dict[str, Any]:
    """What a named tuple, a dataclass or a `TypedDict` has."""
    is_record = hasattr(hint, "_fields") or hasattr(hint, "__dataclass_fields__") or typing.is_typeddict(hint)
    return _hints_of_class(hint) if isinstance(hint, type) and is_record else {}


def _hints_of_class(kind: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return {}


def _arrays_in(path: str, hint: Any, value: Any) -> Iterator[Declared]:
    """The arrays of a value of which something is said, by path."""
    args = typing.get_args(hint)
    if _is_shape(hint):
        yield from [Declared(path, hint, value)] if is_array(value) else []
    elif fields := _fields_of(hint):
        for name, each in fields.items():
            if isinstance(value, Mapping) and name in value:
                yield from _arrays_in(f"{path}[{name!r}]", each, value[name])
            elif not isinstance(value, Mapping) and hasattr(value, name):
                yield from _arrays_in(f"{path}.{name}", each, getattr(value, name))
    elif isinstance(value, Mapping) and len(args) == 2:
        for name, each in value.items():
            yield from _arrays_in(f"{path}[{name!r}]", args[1], each)
    elif isinstance(value, tuple | list) and typing.get_origin(hint) in (tuple, list):
        parts = args[:1] * len(value) if args[1:] in ((), (...,)) else args
        for i, (part, each) in enumerate(zip(parts, value, strict=False)):
            yield from _arrays_in(f"{path}[{i}]", part, each)
    elif len(shapes := [each for each in args if _is_shape(each)]) == 1:  # of a union, with None or a number
        yield from _arrays_in(path, shapes[0], value)
