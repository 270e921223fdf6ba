"""Where in the user's own code a call was made: what a warning points at, whatever wrappers are between."""

import pathlib
import sys
from typing import Any, NamedTuple

_BETWEEN = {"flaxsplit", "jax", "flax", "optax", "jaxtyping", "typeguard", "beartype", "functools", "contextlib"}


class Line(NamedTuple):
    """A line of code, as `warnings.warn_explicit` takes it.

    Attributes:
        filename: the path of its file.
        lineno: its number.
        module: the name of its module, which filters of warnings match.
        registry: which warnings this module has shown, so that each is shown once.
    """

    filename: str
    lineno: int
    module: str
    registry: dict[Any, Any]

    def __str__(self) -> str:
        return f"{pathlib.PurePath(self.filename).name}:{self.lineno}"


def caller() -> Line:
    """The innermost line that belongs to none of the libraries that call each other here."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    scope = frame.f_globals
    registry = scope.setdefault("__warningregistry__", {})
    return Line(frame.f_code.co_filename, frame.f_lineno, scope.get("__name__", ""), registry)
