"""A function known again by its code: what the same lines made of the same things is equal, whatever object each is.

JAX takes a step that is made anew for another one. What is kept of a function keeps nothing alive: an array or an
object is itself while it lives, and equal to nothing once it is gone.
"""

import contextlib
import dataclasses
import functools
import itertools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import numpy as np

from ._caller import Line, is_between

_MOST_PARTS, _MOST_FUNCTIONS = 5_000, 256
_PLACES = {"parent", "scope"}
"""Fields that say where a module is, and not what it does."""

_lock, _numbers = threading.Lock(), itertools.count()
_seen: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()
"""Who was traced last, and how many were, for the functions that were traced last: as many as `_MOST_FUNCTIONS`."""


class Traced:
    """One of the functions that a line makes."""

    def __init__(self, fn: Callable[..., Any], line: Line) -> None:
        self._fn, self._line, self._number = fn, line[:2], next(_numbers)

    def again(self, call: Any) -> int:
        """Notes a trace; gives how many functions of this line and code were traced with equal arguments."""
        parts = fingerprint((self._fn, call))
        if parts is None:
            return 1
        with _lock:
            last, count = _seen.pop((self._line, parts), (self._number, 1))
            count += last != self._number
            _seen[self._line, parts] = self._number, count
            if len(_seen) > _MOST_FUNCTIONS:
                _seen.popitem(last=False)
        return count


def fingerprint(value: Any) -> tuple[Hashable, ...] | None:
    """What a value is, with all that it holds or closes over; nothing of what is too large."""
    parts: list[Hashable] = []
    met: dict[int, tuple[int, Any]] = {}
    left = [value]
    while left:
        if len(parts) == _MOST_PARTS:
            return None
        each = left.pop()
        if id(each) in met:  # there twice, or around itself
            parts.append(met[id(each)][0])
            continue
        kind, *held = _opened(each)
        parts.append((kind, len(held)))
        if held:
            met[id(each)] = len(parts), (each, held)
            left += held
    return tuple(parts)


def _opened(value: Any) -> Iterator[Any]:
    """What tells a value from others of its kind, and then the values that it holds."""
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | types.EllipsisType() | np.dtype():
            yield type(value).__name__, value
        case set() | frozenset():
            yield type(value).__name__, frozenset(map(fingerprint, value))
        case types.FunctionType():
            yield value.__code__, value.__code__.co_filename
            yield from (value.__defaults__, value.__kwdefaults__)
            yield from map(_content, value.__closure__ or ())
            if not is_between(value.__globals__):  # what the user's own code calls by a name of its module
                yield from ((name, value.__globals__.get(name)) for name in sorted(_names(value.__code__)))
        case types.MethodType():
            yield from ("method", value.__func__, value.__self__)
        case functools.partial():
            yield from ("partial", value.func, value.args, value.keywords)
        case Mapping():
            yield _Same(type(value))
            yield from value.items()
        case list() | tuple():
            yield _Same(type(value))
            yield from value
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield _Same(type(value))
            fields = (each.name for each in dataclasses.fields(value))
            yield from ((name, getattr(value, name, None)) for name in fields if name not in _PLACES)
        case _:
            yield _Same(value)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is bound later
        return None


def _names(code: types.CodeType) -> set[str]:
    return {*code.co_names}.union(*(_names(each) for each in code.co_consts if isinstance(each, types.CodeType)))


class _Same:
    """An object that is equal to itself alone, while it lives."""

    def __init__(self, value: Any) -> None:
        self._hash = hash((type(value), id(value)))
        self._get: Callable[[], Any] = _nothing
        with contextlib.suppress(TypeError):  # of a type that cannot be asked for later
            self._get = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        mine = self._get()
        return isinstance(other, _Same) and mine is not None and mine is other._get()

    def __hash__(self) -> int:
        return self._hash


def _nothing() -> None:
    return None
