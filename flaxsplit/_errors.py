"""How flaxsplit speaks of failure: classes, one anatomy for every message, and rows of words apart from the code."""

import dataclasses
import string
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn, Self

import jax

from ._caller import Line, caller
from ._describe import describe, keyed_leaves, kind_of, shorten

SILENT: ContextVar[bool] = ContextVar("silent", default=False)
"""Whether none of our warnings is given: around a call that is traced once more, only to be looked at."""


class Explained(Exception):  # noqa: N818 (what errors and a warning share; neither's name would fit both)
    """Says which call failed, what it required, what came, the likely cause, and the corrected call.

    Attributes:
        where: the function and argument.
        required: what was required.
        leaves: what came instead, line by line, with key paths and never with values; the message shows the first.
        cause: the likely cause.
        fix: the corrected call.
    """

    where: str
    required: str
    leaves: tuple[str, ...]
    cause: str
    fix: str

    def __init__(self, where: str, required: str, leaves: Sequence[str], cause: str, fix: str) -> None:
        super().__init__(where, required, leaves, cause, fix)  # all of it, so that it can be pickled
        self.where, self.required, self.leaves, self.cause, self.fix = where, required, tuple(leaves), cause, fix

    def __str__(self) -> str:
        got = "".join(f"\n    {line}" for line in shorten(self.leaves))
        return f"{self.where}: {self.required}\n  got:{got}\n  likely cause: {self.cause}\n  fix: {self.fix}"


class CollectionError(Explained, ValueError):
    """A collection or path is missing, unknown or there twice, or a filter matches nothing."""


class SignatureError(Explained, TypeError):
    """What was given to a combinator, or what it returned, does not have the form that the combinator takes."""


class StateDriftError(Explained, TypeError):
    """A step would return a carry of another structure, shape or dtype. Raised while tracing."""


class UnsyncedStateError(Explained, ValueError):
    """A state leaf that all lanes of `vmap_stateful`, or all devices of a mesh axis, share came out different."""


class RetraceError(Explained, RuntimeError):
    """A function was traced more often than allowed; the message is the table of what changed."""


class RetraceWarning(Explained, UserWarning):
    """A step is made anew, and JAX compiles it again. Given while tracing."""


class UntouchedStateWarning(Explained, UserWarning):
    """What a call should change stays: no leaf of a mutable collection is written, or no param reaches the loss."""


class DroppedStateWarning(Explained, UserWarning):
    """A loss function lost an update of its state, or a key was drawn from twice. Given while tracing."""


for _class in list(Explained.__subclasses__()):
    _class.__module__ = "flaxsplit"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """One row of words: why a call is refused. A `$name` in a text stands for a value given when it is raised.

    Called, it gives the error. Its methods are the checks, so that each is one expression in a combinator; what came
    is put into words only once a check has failed.
    """

    error: type[Explained]
    where: str
    required: str
    cause: str
    fix: str

    def __call__(self, *lines: str, **values: Any) -> Explained:
        """Gives the error. `lines` say what came; so do values that no text names, as `name: f32[2]`."""
        texts = [self.where, self.required, self.cause, self.fix]
        named = {name for text in texts for name in string.Template(text).get_identifiers()}
        came = [f"{name}: {said(value)}" for name, value in values.items() if name not in named]
        where, required, cause, fix = (string.Template(text).substitute(values) for text in texts)
        return self.error(where, required, [*lines, *came], cause, fix)

    def but(self, **texts: Any) -> Self:
        """The same row with other words."""
        return dataclasses.replace(self, **texts)

    def unless(self, fits: object, *lines: str, **values: Any) -> None:
        """Raises unless the condition holds."""
        if not fits:
            raise self(*lines, **values)

    def unless_all(
        self, fits: Callable[[Any], object], tree: Any, name: str, say: Any = kind_of, **values: Any
    ) -> None:
        """Raises unless the condition holds for each leaf of a tree; names every other by its key path."""
        if not all(map(fits, jax.tree.leaves(tree))):
            leaves = keyed_leaves(tree, name).items()
            raise self(*(f"{path}: {say(leaf)}" for path, leaf in leaves if not fits(leaf)), **values)

    def if_any(self, lines: Iterable[str], **values: Any) -> None:
        """Raises where there is something to say."""
        if came := [*lines]:
            raise self(*came, **values)

    def instead_of(self, error: BaseException, *lines: str, **values: Any) -> NoReturn:
        """Raises in place of another library's error, which stays its cause."""
        raise self(*lines, **values) from error

    def warn(self, *lines: str, **values: Any) -> None:
        """Warns, where the row is of a warning."""
        _warn(self(*lines, **values))


@dataclasses.dataclass(frozen=True)
class Guess:
    """A refusal whose likely cause is looked for only after the check has failed: a function that gives the error."""

    explain: Callable[..., Explained]

    def __call__(self, *args: Any, **values: Any) -> Explained:
        """Gives the error."""
        return self.explain(*args, **values)

    def unless(self, fits: object, *args: Any, **values: Any) -> None:
        """Raises unless the condition holds."""
        if not fits:
            raise self(*args, **values)

    def instead_of(self, error: BaseException, *args: Any, **values: Any) -> NoReturn:
        """Raises in place of another library's error, which stays its cause."""
        raise self(*args, **values) from error

    def warn(self, *args: Any, at: Line | None = None) -> None:
        """Warns, where what it explains is a warning."""
        _warn(self(*args), at)


def _warn(warning: Any, at: Line | None = None) -> None:
    """Warns of a line of the user's own code: the one that is running, if no other is given."""
    if not SILENT.get():
        (at or caller()).warn(warning)


def said(value: Any) -> str:
    """Says what an argument is: a class by its name, an array as `f32[2]`, anything else by its type."""
    return f"the class {value.__name__}" if isinstance(value, type) else describe(value)
