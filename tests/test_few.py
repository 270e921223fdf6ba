"""What `make test` leaves to other targets is there, and is all that it leaves."""

import importlib
import itertools
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest

from . import few, flags

TESTS = pathlib.Path(__file__).parent


@pytest.mark.parametrize("name", few.FEW)
def test_a_test_that_is_run_in_part_is_there(name: str) -> None:
    file, _, test = name.partition("::")
    assert f"\ndef {test}" in (TESTS / file).read_text()


@pytest.mark.parametrize("name", flags.DOCTESTS)
def test_a_docstring_with_a_mark_is_there(name: str) -> None:
    module, _, function = name.rpartition(".")
    assert ">>>" in getattr(importlib.import_module(module), function).__doc__


@pytest.mark.parametrize("count", [0, 1, 4, 18, 20])
def test_the_cases_that_are_kept_are_spread(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "FEW", {"test_a.py::test_b": count, "test_c.py": 0})
    marked: list[str] = []

    def item(nodeid: str) -> Any:
        return SimpleNamespace(nodeid=nodeid, add_marker=lambda mark: marked.append(f"{nodeid} {mark.name}"))

    names = [f"tests/test_a.py::test_b[a/{i}]" for i in range(18)]
    few.mark([item(name) for name in [*names, "tests/test_a.py::test_other", "tests/test_c.py::test_d"]])
    kept = [i for i, name in enumerate(names) if f"{name} exhaustive" not in marked]
    assert len(kept) == min(count, 18)
    assert {later - earlier for earlier, later in itertools.pairwise(kept)} <= {18 // max(count, 1) + i for i in (0, 1)}
    assert [each for each in marked if "test_b" not in each] == ["tests/test_c.py::test_d exhaustive"]
