"""What the type checkers read is complete; `make types` runs them."""

import ast
import pathlib

import pytest

import flaxsplit as fs

TYPING = pathlib.Path(__file__).parent / "typing"
PUBLIC = sorted(name for name in dir(fs) if not name.startswith("_"))


def names_of_flaxsplit(path: pathlib.Path) -> set[str]:
    """Every `fs.name` of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fs"
    }


USED = {name for path in TYPING.glob("*.py") for name in names_of_flaxsplit(path)}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_type_tests(name: str) -> None:
    assert name in USED


def test_the_type_tests_use_only_public_names() -> None:
    assert USED | set(PUBLIC) == set(PUBLIC)
