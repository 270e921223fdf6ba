"""How flaxsplit speaks of failure: five classes, each a builtin's child, and one anatomy for every message."""

from collections.abc import Sequence

from ._describe import shorten


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


class UntouchedStateWarning(Explained, UserWarning):
    """Collections were mutable and no leaf of any was written."""


for _class in list(Explained.__subclasses__()):
    _class.__module__ = "flaxsplit"
