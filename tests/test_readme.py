"""The README's code runs as printed, and its two loops give the same, bit for bit."""

import inspect
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

import flaxsplit as fs

from .flags import needs_x32

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


@needs_x32
def test_before_and_after_are_the_same_bit_for_bit() -> None:
    names: dict[str, Any] = {}
    exec(BLOCKS["model"] + BLOCKS["before"], names)  # noqa: S102 (the README's own code)
    by_hand = {name: names[name] for name in ("params", "state", "loss")}
    exec(BLOCKS["model"] + BLOCKS["after"], names)  # noqa: S102
    carry = names["carry"]
    state = {name: carry.state[name] for name in by_hand["state"]}
    ours = {"params": carry.params, "state": state, "loss": names["loss"]}
    jax.tree.map(np.testing.assert_array_equal, ours, by_hand)
    assert int(carry.step) == 20
    exec(BLOCKS["evaluate"] + BLOCKS["open"], names)  # noqa: S102
    assert names["pred"].shape == (64, 1)
    assert sorted(names["logs"]) == ["loss", "norm"]
    assert int(names["carry"].step) == 21


def test_the_readme_counts_what_one_imports() -> None:
    used = set(re.findall(r"\bfs\.(\w+)", BLOCKS["after"]))
    functions = {name for name, _ in inspect.getmembers(fs, inspect.isfunction) if name[0] != "_"}
    assert used <= functions
    assert f"needs {len(used)} of the {len(functions)} functions" in README


def test_what_the_readme_says_of_compiles_is_in_its_table() -> None:
    """Ours compiles twice only where two programs are meant; the guide's loop as often as it says."""
    rows = [line.strip("| ").split(" | ") for line in README.split("| compiles over 20 steps |")[1].splitlines()[2:16]]
    ours, guide = ({row[0]: int(row[column]) for row in rows if row[column].isdecimal()} for column in (1, 3))
    twice = {name for name, count in ours.items() if count > 1}
    assert twice == {"train/eval alternation", "ragged last batch", "a static flag that changes"}
    assert len(ours) == 14
    assert max(ours.values()) == 2
    assert f"flaxsplit compiles at most {max(ours.values())} times" in README
    assert f"the loop of Flax's guide up to {max(guide.values())} times" in README


def test_the_checkers_line_is_one_that_they_say() -> None:
    (line,) = (line.removeprefix(">>> ") for line in README.splitlines() if line.startswith(">>> apply("))
    wrong = (pathlib.Path(__file__).parent / "typing" / "wrong.py").read_text()
    assert f"{line}  # type: ignore[call-arg]" in wrong


def test_the_readme_names_every_combinator() -> None:
    functions = {name for name, _ in inspect.getmembers(fs, inspect.isfunction) if name[0] != "_"}
    table = (ROOT / "docs" / "combinators.md").read_text()
    assert {name for name in functions if f"`{name}`" not in README or f"`{name}`" not in table} == set()


def test_all_code_is_run() -> None:
    assert BLOCKS.keys() == {"model", "before", "after", "evaluate", "open"}
    assert README.count("```python") == len(BLOCKS)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+(?:Error|Warning)):", README))))
def test_the_readme_names_errors_that_exist(name: str) -> None:
    assert issubclass(getattr(fs, name), Exception)
