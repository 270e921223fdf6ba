"""A run that fits into some minutes: the most valuable cases first, each stored as soon as it is measured.

Before each case the plan is asked whether there is time for it, by what a case of its kind took or is expected to take.
So a run ends in time, or later by the one case that took longer than expected.
"""

import importlib
import pathlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from . import _measure as m


class Item(NamedTuple):
    """A claim, or those of its cases that begin so; and the seconds that one case is expected to take."""

    claim: str
    cases: str
    seconds: float


ORDER = (
    Item("throughput", "ResNet-50", 150),
    Item("throughput", "transformer", 110),
    Item("recompilation", "", 8),
    Item("dispatch", "", 12),
    Item("scan", "", 10),
    Item("memory", "", 8),
    Item("vmap", "", 15),
    Item("throughput", "", 60),
    Item("accumulation", "", 20),
    Item("mesh", "", 20),
    Item("nnx", "", 25),
    Item("imports", "", 30),
    Item("startup", "", 60),
    Item("nonfinite", "", 20),
    Item("explain", "", 60),
    Item("checks", "", 60),
    Item("tracing", "", 40),
)


class Plan:
    """What was asked for, what is stored already, and how much time is left."""

    def __init__(
        self, minutes: float, folder: pathlib.Path, claims: list[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.clock = folder, clock
        self.end = clock() + 60 * minutes
        self.items = [item for item in ORDER if item.claim in claims]
        self.left: list[str] = []
        self.results: dict[str, m.Result] = {}

    def resume(self) -> None:
        """Takes over what is stored of this commit, on this device, with these versions; leaves anything else out."""
        for claim in {item.claim for item in self.items}:
            path = self.folder / f"{claim}.json"
            stored = m.load(path) if path.exists() else None
            if stored and stored.cases and all(stored.about[name] == m.about()[name] for name in SAME):
                self.results[claim] = stored

    def run(self, effort: m.Effort, tell: m.Tell) -> Iterator[str]:
        """Measures item by item; yields each claim and case that was stored. What cannot be imported shows at once."""
        for item in self.items:
            importlib.import_module(f".{item.claim}", __package__)
        smoke = effort.name == "smoke"  # proves that each claim runs: each has its share of the time
        for i, item in enumerate(self.items):
            now = self.clock()
            end = now + (self.end - now) / (len(self.items) - i) if smoke else self.end
            yield from self._item(item, end, effort, tell)

    def _item(self, item: Item, end: float, effort: m.Effort, tell: m.Tell) -> Iterator[str]:
        module = importlib.import_module(f".{item.claim}", __package__)
        statement = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
        result = self.results.setdefault(item.claim, m.Result(item.claim, statement, [], effort.name))
        rows: list[m.Row] = []
        begun: list[tuple[str, float]] = []
        expected = min(SMOKE, max(0.0, end - self.clock())) if effort.name == "smoke" else item.seconds

        def finish() -> None:
            nonlocal expected
            if begun:
                case, since = begun.pop()
                expected = self.clock() - since
                result.rows.extend(rows)
                result.cases.append(case)
                rows.clear()
                m.store(result, self.folder)

        def wants(case: str) -> bool:
            finish()
            if not case.startswith(item.cases) or case in result.cases:
                return False
            if self.clock() + expected > end:
                self.left.append(f"{item.claim}: {case}")
                return False
            begun.append((case, self.clock()))
            return True

        asked = replace(effort, wants=wants, planned=True)
        for row in module.measure(asked, lambda words: tell(f"{item.claim}: {words}")):
            rows += [row]  # kept until its case is finished: then all rows of it are stored at once
        finish()
        yield from (f"{item.claim}: {case}" for case in result.cases if case.startswith(item.cases))


SMOKE = 5.0
"""The seconds that a case of the smallest sizes is expected to take, of whatever claim."""

SAME = ("commit", "device", "versions", "python")
"""What must be the same for a run to go on where another one stopped."""
