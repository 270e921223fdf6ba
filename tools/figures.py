"""`tests/test_figures.py`: how the package reads, in figures; `python tools/figures.py` prints them.

Lines of each file and how many of them run, `raise` and long strings in the modules of combinators, lengths of
function bodies. A running line is one of code: no blank line, no comment, no docstring.
"""

import ast
import io
import pathlib
import statistics
import sys
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "flaxsplit"
WORDS = ("__init__.py", "_types.py", "_describe.py", "_errors.py", "_checks.py", "_refusals/")
"""What holds words and their form; everything else is a module of combinators."""
LONG = 40
_SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


class Module(NamedTuple):
    """One file: its name, lines, running lines, `raise` statements, long strings, and lines of each function body."""

    name: str
    lines: int
    running: int
    raises: int
    strings: list[str]
    bodies: list[int]

    @property
    def combines(self) -> bool:
        """Whether it is a module of combinators."""
        return not self.name.startswith(WORDS)


def modules(package: pathlib.Path = PACKAGE) -> list[Module]:
    """Every file of the package."""
    return [_module(path, package) for path in sorted(package.rglob("*.py"))]


def _module(path: pathlib.Path, package: pathlib.Path) -> Module:
    text = path.read_text()
    tree = ast.parse(text)
    docstrings = {id(node) for node in _docstrings(tree)}
    running = _running(text, tree)
    strings = [each for node, each in _strings(tree) if id(node) not in docstrings and len(each) > LONG]
    raises = sum(isinstance(node, ast.Raise) for node in ast.walk(tree))
    bodies = [
        len(running & set(range(_first(node), (node.end_lineno or 0) + 1)))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not _is_stub(node)
    ]
    return Module(str(path.relative_to(package)), len(text.splitlines()), len(running), raises, strings, bodies)


def _running(text: str, tree: ast.Module) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for each in tokens if each.type not in _SKIPPED for line in range(each.start[0], each.end[0] + 1)}
    documented = {line for node in _docstrings(tree) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    return {line for line in lines - documented if line <= len(text.splitlines())}


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Strings that are statements: of modules, classes, functions, and below a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def _strings(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value
        if isinstance(node, ast.JoinedStr):
            parts = (part.value for part in node.values if isinstance(part, ast.Constant))
            yield node, "".join(map(str, parts))


def _first(node: ast.FunctionDef) -> int:
    """The first line of the body behind the docstring."""
    has_docstring = ast.get_docstring(node) is not None
    body = node.body[1:] if has_docstring else node.body
    return body[0].lineno if body else (node.end_lineno or 0) + 1


def _is_stub(node: ast.FunctionDef) -> bool:
    """An overload or a method of a Protocol: `...` and nothing else."""
    last = node.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is ...


def main() -> int:
    """Prints the table."""
    found = modules()
    print(f"{'lines':>6} {'running':>8} {'raise':>6} {'strings':>8}  module")
    for each in found:
        print(f"{each.lines:6d} {each.running:8d} {each.raises:6d} {len(each.strings):8d}  {each.name}")
    bodies = sorted(length for each in found for length in each.bodies)
    print(f"{sum(each.lines for each in found):6d} {sum(each.running for each in found):8d}  in all")
    print(f"function bodies: median {statistics.median(bodies):g}, nine in ten at most {bodies[len(bodies) * 9 // 10]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
