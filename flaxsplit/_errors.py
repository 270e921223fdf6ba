"""How flaxsplit speaks of failure: five classes, each a builtin's child, and one anatomy for every message."""

from collections.abc import Iterable, Sequence

from ._describe import shorten


class _Explained(Exception):
    """Keeps what a message names as attributes, so that a program can read it too.

    Attributes:
        leaves: every offending leaf or difference, in words, also where the message shows only the first.
    """

    leaves: tuple[str, ...] = ()

    def __init__(self, message: str, leaves: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.leaves = tuple(leaves)


class CollectionError(_Explained, ValueError):
    """A collection or path is missing, unknown or there twice, or a filter matches nothing."""


class SignatureError(_Explained, TypeError):
    """What was given to a combinator, or what it returned, does not have the form that the combinator takes."""


class StateDriftError(_Explained, TypeError):
    """A step would return a carry of another structure, shape or dtype. Raised while tracing."""


class UnsyncedStateError(_Explained, ValueError):
    """`vmap_stateful`: a state leaf that all lanes share came out different per lane."""


class RetraceError(_Explained, RuntimeError):
    """A function was traced more often than allowed; the message is the table of what changed."""


class UntouchedStateWarning(UserWarning):
    """Collections were mutable and no leaf of any was written."""


for _class in (
    CollectionError,
    SignatureError,
    StateDriftError,
    UnsyncedStateError,
    RetraceError,
    UntouchedStateWarning,
):
    _class.__module__ = "flaxsplit"


def explain(where: str, required: str, got: Sequence[str], *, cause: str, fix: str) -> str:
    """Builds a message: which call, what it required, what came, the likely cause, the corrected call."""
    came = "".join(f"\n    {line}" for line in shorten(list(got)))
    return f"{where}: {required}\n  got:{came}\n  likely cause: {cause}\n  fix: {fix}"
