"""Where in the user's own code a call was made: what a warning points at, whatever wrappers are between."""

import pathlib
import sys
import warnings
from typing import Any, NamedTuple

_BETWEEN = {"flaxsplit", "jax", "flax", "optax", "jaxtyping", "typeguard", "beartype", "functools", "contextlib"}


class Line(NamedTuple):
    """A line of code.

    Attributes:
        filename: the path of its file.
        lineno: its number.
        scope: the globals of its module.
    """

    filename: str
    lineno: int
    scope: dict[str, Any]

    def __str__(self) -> str:
        return f"{pathlib.PurePath(self.filename).name}:{self.lineno}"

    def warn(self, warning: Warning) -> None:
        """As `warnings.warn`, of this line: filters match its module, which keeps what it has shown."""
        shown = self.scope.setdefault("__warningregistry__", {})
        warnings.warn_explicit(warning, type(warning), *self[:2], self.scope.get("__name__", ""), shown)


def caller() -> Line:
    """The innermost line that belongs to none of the libraries that call each other here."""
    frame = sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while frame.f_back and is_between(frame.f_globals):
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)


def is_between(scope: dict[str, Any]) -> bool:
    """Whether these are the globals of one of those libraries."""
    return str(scope.get("__name__", "")).partition(".")[0] in _BETWEEN
