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

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


@needs_x32
def test_before_and_after_are_the_same_bit_for_bit() -> None:
    names: dict[str, Any] = {}
    exec(BLOCKS["model"] + BLOCKS["before"], names)  # noqa: S102 (the README's own code)
    by_hand = {name: names[name] for name in ("params", "state", "loss")}
    exec(BLOCKS["after"], names)  # noqa: S102
    ours = {"params": names["carry"].params, "state": names["carry"].state, "loss": names["loss"]}
    jax.tree.map(np.testing.assert_array_equal, ours, by_hand)
    assert int(names["carry"].step) == 20


def test_the_readme_names_every_combinator() -> None:
    functions = {name for name, _ in inspect.getmembers(fs, inspect.isfunction) if name[0] != "_"}
    missing = {name for name in functions if f"`{name}`" not in README}
    assert missing == set()


def test_all_code_is_run() -> None:
    assert BLOCKS.keys() == {"model", "before", "after"}
    assert README.count("```python") == len(BLOCKS)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+(?:Error|Warning)):", README))))
def test_the_readme_names_errors_that_exist(name: str) -> None:
    assert issubclass(getattr(fs, name), Exception)
