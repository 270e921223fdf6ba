"""`make readability`: how the pages read; with `--against FOLDER`, beside an older tree.

textstat counts words and gives the reading grade: the automated readability index, in years of school. It needs no
dictionary. A sentence counts as passive if a participle follows a form of `be`, the rule of write-good. This is a
report, not a gate: plain sentences about hard things have a high grade too.
"""

import argparse
import ast
import importlib
import pathlib
import re
import statistics
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLACES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/combinators/*.md")
CODE = ("flaxsplit/*.py", "examples/recipes/*.py")
FENCE = r"```.*?```|<!--.*?-->|<[^>]+>|^\s*\|[^\n]*\|$|^#+ [^\n]*$|!\[.*?\]\(.*?\)"
IRREGULAR = (
    "built|bound|brought|chosen|done|drawn|found|given|gone|held|kept|known|laid|left|lost|made|met|meant|put|read|run"
    "|said|seen|sent|set|shown|sown|split|taken|thrown|told|written"
)
PASSIVE = re.compile(rf"\b(?:am|are|is|was|were|be|been|being)\s+(?:\w+ly\s+)?(?:\w+ed|{IRREGULAR})\b", re.IGNORECASE)


class Reads(NamedTuple):
    """What a text is like."""

    words: int
    length: float  # words in a sentence, the mean
    longest: int
    passive: float  # share of the sentences
    grade: float


def prose(page: str) -> str:
    """The running text of a page: without code, tables, headings, links' targets."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(FENCE, "\n\n", page, flags=re.DOTALL | re.MULTILINE))
    text = re.sub(r"[*_]{1,2}(\w[^*_]*)[*_]{1,2}", r"\1", re.sub(r"`[^`]*`", "code", text))
    return re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n", text, flags=re.MULTILINE)


def docstrings(source: str) -> str:
    """What a module says of itself and of its public names, without the examples."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and getattr(node, "name", "m")[0] != "_":
            text = re.sub(r"^>>> .*(?:\n(?!\n).*)*", "", ast.get_docstring(node) or "", flags=re.MULTILINE)
            found.append(re.sub(r"^(?: {4}[\w*]+:|\w+:$)", "\n", text, flags=re.MULTILINE))
    return prose("\n\n".join(found))


def sentences(text: str) -> list[str]:
    """The sentences of more than two words."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    parts = (part for block in blocks for part in re.split(r"(?<=[.!?])\s+", block))
    return [part for part in parts if len(part.split()) > 2]


def reads(text: str) -> Reads:
    """The figures of a text."""
    found = sentences(text)
    if not found:
        return Reads(0, 0.0, 0, 0.0, 0.0)
    textstat: Any = importlib.import_module("textstat")  # not where the tests of this file run
    lengths = [textstat.lexicon_count(each) for each in found]
    passive = sum(bool(PASSIVE.search(each)) for each in found) / len(found)
    whole = " ".join(each if each[-1] in ".!?" else f"{each}." for each in found)
    grade = textstat.automated_readability_index(whole)
    return Reads(sum(lengths), statistics.mean(lengths), max(lengths), passive, grade)


def pages(root: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Each page's running text, then that of all docstrings, by what it is called."""
    for place in PLACES:
        for path in sorted(root.glob(place)):
            yield path.relative_to(root).as_posix(), prose(path.read_text())
    for place in CODE:
        yield place, "\n\n".join(docstrings(path.read_text()) for path in sorted(root.glob(place)))


def row(name: str, found: Reads) -> str:
    """A line of the report."""
    return f"{name:38} {found.words:6} {found.length:6.1f} {found.longest:5} {found.passive:8.0%} {found.grade:6.1f}"


def main() -> int:
    """Prints a line for each page, and for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=pathlib.Path, help="an older tree, for a line beside each")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="the N longest sentences")
    given = parser.parse_args()
    print(f"{'page':38} {'words':>6} {'length':>6} {'most':>5} {'passive':>8} {'grade':>6}")
    older = dict(pages(given.against)) if given.against else {}
    texts = dict(pages(ROOT))
    for name, text in texts.items():
        print(row(name, reads(text)))
        if name in older:
            print(row("  before", reads(older[name])))
    print(row("all", reads("\n\n".join(texts.values()))))
    if older:
        print(row("  before", reads("\n\n".join(older.values()))))
    for sentence in sorted(sentences("\n\n".join(texts.values())), key=len, reverse=True)[: given.worst]:
        print(f"- {sentence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
