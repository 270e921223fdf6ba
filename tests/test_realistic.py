"""The training files that the type checkers read also run: for two steps, under the warnings of pytest as errors."""

import importlib
import math
import pathlib

import pytest

from .flags import needs_jit, needs_x32

FILES = sorted(path.stem for path in (pathlib.Path(__file__).parent / "typing" / "realistic").glob("*.py"))


def test_there_are_ten() -> None:
    assert len(FILES) == 10


@needs_jit
@needs_x32
@pytest.mark.parametrize("name", FILES)
def test_a_realistic_file_trains(name: str) -> None:
    module = importlib.import_module(f"tests.typing.realistic.{name}")
    assert math.isfinite(module.train(steps=2))
