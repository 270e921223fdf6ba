"""The recipes run as printed, with warnings as errors, and hold what they assert."""

import ast
import pathlib
import re
import runpy

import pytest

from . import nnx_models
from .flags import needs_jit, needs_x32

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.py"))


@pytest.mark.exhaustive
@needs_jit
@needs_x32
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem == "nnx_module" and not nnx_models.NEW:
        pytest.skip("before flax 0.11 nnx.Optimizer.update took the gradients alone")
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(r"\d", capsys.readouterr().out)  # it says what it measured


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_a_title_and_asserts(path: pathlib.Path) -> None:
    tree = ast.parse(path.read_text())
    title, _, prose = (ast.get_docstring(tree) or "").partition("\n\n")
    assert re.fullmatch(r".{3,60}\.", title)
    assert prose
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree)) or "assert_allclose" in path.read_text()


def test_every_recipe_is_listed() -> None:
    listed = re.findall(r"\(\.\./examples/recipes/(\w+)\.py\)", (ROOT / "docs" / "recipes.md").read_text())
    assert sorted(listed) == [path.stem for path in RECIPES]
