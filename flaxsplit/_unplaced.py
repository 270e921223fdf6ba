"""Arguments that nobody placed: beside others on a mesh JAX lays them whole on each device, which computes all of them.

JAX says so in a log of its own and nowhere else. An event of `jax.monitoring` with shardings would replace this module.
"""

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from jax.sharding import Sharding

from ._describe import describe

_LOGGER = logging.getLogger("jax._src.interpreters.pxla")


class _Reader(logging.Filter):
    """Reads each record of a compile while somebody asks; shows those alone that were shown before."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.asking = threading.Lock(), list[dict[str, str]]()
        self.level = self.shown = logging.NOTSET

    def filter(self, record: logging.LogRecord) -> bool:
        """Never raises: a record of another form says nothing."""
        if isinstance(record.args, tuple) and len(record.args) == 3 and (words := _unplaced(*record.args[1:])):
            self.note(plain_name(str(record.args[0])), words)
        return record.levelno >= self.shown

    def note(self, name: str, words: str) -> None:
        """What is said first of a function stays."""
        with self.lock:
            for found in self.asking:
                found.setdefault(name, words)

    def add(self, found: dict[str, str]) -> None:
        """The first who asks has JAX make records of all compiles."""
        with self.lock:
            if not self.asking:
                self.level, self.shown = _LOGGER.level, _LOGGER.getEffectiveLevel()
                _LOGGER.addFilter(self)
                _LOGGER.setLevel(logging.DEBUG)
            self.asking.append(found)

    def remove(self, found: dict[str, str]) -> None:
        """The last who asked leaves the log as it was."""
        with self.lock:
            self.asking = [each for each in self.asking if each is not found]
            if not self.asking:
                _LOGGER.removeFilter(self)
                _LOGGER.setLevel(self.level)


_READER = _Reader()


@contextmanager
def unplaced_into(found: dict[str, str]) -> Generator[None]:
    """Puts into `found`, by function, what each compile has no place for."""
    _READER.add(found)
    try:
        yield
    finally:
        _READER.remove(found)
        for name in [name for name, words in found.items() if not words]:
            del found[name]


def split_inside(name: str) -> None:
    """While tracing: the function splits its batch itself, so that XLA gives each device its rows."""
    _READER.note(name, "")


def plain_name(name: str) -> str:
    """JAX's `jit(step)` as `step`."""
    return name.removeprefix("jit(").removesuffix(")") if name.startswith("jit(") else name


def _unplaced(arguments: Any, places: Any) -> str:
    """The arrays without a place, where others lie on several devices; nothing else."""
    if not isinstance(arguments, (list, tuple)) or not isinstance(places, (list, tuple)):
        return ""
    count = max((place.num_devices for place in places if isinstance(place, Sharding)), default=1)
    found = [
        describe(each)
        for each, place in zip(arguments, places, strict=False)
        if not isinstance(place, Sharding) and getattr(each, "shape", None)
    ]
    return f"{', '.join(found)}: whole on each of {count} devices" if found and count > 1 else ""
