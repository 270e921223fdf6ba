"""`tests/test_docs.py`: the page `docs/reference.md`; `--write` writes it.

Every public function with its signature, its arguments and what it returns and raises, from the docstrings: to be read
without building the site, whose own API page has the types and the errors too.
"""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tools.written import written  # noqa: E402 (found beside this folder)

PAGE = ROOT / "docs" / "reference.md"
TABLE = re.compile(r"^\| \[(`.*`)\]\((.*)\) \| (.*) \|$", re.MULTILINE)
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Warns):\n((?:(?:    .*)?\n?)*)", re.MULTILINE)
ENTRY = re.compile(r"^    (\S[^:\n]*): (.*(?:\n {8}.*)*)", re.MULTILINE)
HEAD = """# Reference

Every function with its signature and its arguments. Each name links to its page."""


def functions() -> dict[str, ast.FunctionDef]:
    """The implementation of every public function, by name; its overloads are not shown."""
    found = {}
    for path in sorted((ROOT / "flaxsplit").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                found[node.name] = node
    return found


def page() -> str:
    """The page, in the order of the table of combinators."""
    known, parts = functions(), [HEAD]
    for names, link, _ in TABLE.findall((ROOT / "docs" / "combinators.md").read_text()):
        for name in re.findall(r"`(\w+)`", names):
            parts += [f"## [{name}]({link})", *described(known[name])]
    return "\n\n".join(parts) + "\n"


def described(node: ast.FunctionDef) -> Iterator[str]:
    """The first line of the docstring, the signature, and a table for each section."""
    text = ast.get_docstring(node) or ""
    yield text.partition("\n")[0]
    yield f"```\n{signature(node)}\n```"
    for title, body in SECTION.findall(text):
        entries = ENTRY.findall(body) if title not in ("Returns", "Yields") else []
        if entries:
            rows = [f"| `{name}` | {line(words)} |" for name, words in entries]
            yield "\n".join([f"| {title.lower()} | |", "|---|---|", *rows])
        else:
            yield f"{title}: {line(body)}"


def line(words: str) -> str:
    """Text of several lines as one, for a cell of a table."""
    return " ".join(words.split()).replace("|", "\\|")


def signature(node: ast.FunctionDef) -> str:
    """The call with its defaults, without types: checkers and the site show those."""
    for each in ast.walk(node.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    return f"{node.name}({ast.unparse(node.args)})"


if __name__ == "__main__":
    sys.exit(written(__doc__, lambda: {PAGE: page()}))
