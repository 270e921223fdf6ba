"""The pages: what they show is run, and what they link to is there."""

import ast
import doctest
import inspect
import pathlib
import re
from typing import Any

import jax
import nbformat
import pytest

import flaxsplit as fs
from tools import notebook, pictures, reference, trust

from .flags import needs_donation, needs_jit, needs_promotion, needs_x32

ROOT = pathlib.Path(__file__).parent.parent
PLACES = ("*.md", "docs/*.md", "docs/combinators/*.md", "stubs/*.md", "benchmarks/results/*/report.md")
PAGES = [page for place in PLACES for page in sorted(ROOT.glob(place))]
MARKS = {
    "explain_step": needs_promotion,
    "jit_step": needs_donation,  # shows a carry that is gone
    "recompilation": needs_promotion,
    "settle_state": needs_promotion,
}
SHOWN = [pytest.param(page, marks=MARKS.get(page.stem, ())) for page in PAGES if "```pycon" in page.read_text()]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: pathlib.Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@needs_jit
@needs_x32
@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_what_a_page_shows_is_what_comes(page: pathlib.Path) -> None:
    config: Any = jax.config
    before = config.jax_traceback_filtering
    config.update("jax_traceback_filtering", "off")  # else JAX adds a note about it to the message
    try:
        found = doctest.testfile(str(page), module_relative=False, optionflags=OPTIONS)
    finally:
        config.update("jax_traceback_filtering", before)
    assert found.attempted >= 5
    assert found.failed == 0


@needs_jit
@pytest.mark.parametrize("page", notebook.PAGES, ids=name)
def test_a_notebook_is_its_page_and_runs(page: pathlib.Path) -> None:
    written = page.with_suffix(".ipynb").read_text()
    assert written == notebook.notebook(page)
    reads: Any = nbformat.reads
    read = reads(written, as_version=nbformat.NO_CONVERT)
    nbformat.validate(read)
    names: dict[str, Any] = {}
    shown = 0
    for cell in read.cells:
        if cell.cell_type != "code":
            continue
        *lines, last = ast.parse(cell.source).body
        ends = isinstance(last, ast.Expr) and cell.outputs
        exec(compile(ast.Module(lines if ends else [*lines, last], []), cell.id, "exec"), names)  # noqa: S102
        if ends:
            shows = cell.outputs[0].data["text/plain"]
            if shows.startswith("Traceback"):
                with pytest.raises(fs.SignatureError) as raised:
                    eval(compile(ast.Expression(last.value), cell.id, "eval"), names)  # noqa: S307
                assert shows.endswith(str(raised.value))
            else:
                found = eval(compile(ast.Expression(last.value), cell.id, "eval"), names)  # noqa: S307
                assert repr(found) == shows
            shown += 1
    assert shown == sum(bool(cell.get("outputs")) for cell in read.cells) >= 5


def test_what_is_told_of_trust_is_stored() -> None:
    assert trust.PAGE.read_text() == trust.page()


@pytest.mark.skipif(not (ROOT / "flaxsplit").exists(), reason="the built wheel is tested, without its sources")
def test_the_reference_is_what_the_docstrings_say() -> None:
    text = reference.PAGE.read_text()
    assert text == reference.page()
    named = re.findall(r"^## \[(\w+)\]", text, re.MULTILINE)
    assert sorted(named) == [name for name, _ in inspect.getmembers(fs, inspect.isfunction) if name[0] != "_"]
    for name in named:
        part = text.split(f"## [{name}]")[1].split("\n## ")[0]
        assert set(inspect.signature(getattr(fs, name)).parameters) <= set(re.findall(r"\w+", part)), name


def test_each_combinator_has_a_page_and_a_picture() -> None:
    pages = {path.stem: path.read_text() for path in pictures.FOLDER.glob("*.md")}
    named = [name for text in pages.values() for name in text.splitlines()[0].removeprefix("# ").split(", ")]
    assert sorted(named) == [name for name, _ in inspect.getmembers(fs, inspect.isfunction) if name[0] != "_"]
    drawn = {path: path.read_text() for path in (*pictures.FOLDER.glob("*.svg"), pictures.LOOP)}
    assert drawn == pictures.pictures()
    assert all(f"]({name}.svg)" in text for name, text in pages.items())
    parts = {name: re.findall(r"^## (\w+)", text, re.MULTILINE) for name, text in pages.items()}
    assert {name: found for name, found in parts.items() if found != ["Example", "As", "Errors"]} == {}


def test_no_code_is_left_out() -> None:
    """Python in a page is a session, which is run above, or named for a test of its own beside it."""
    code = {name(page): re.findall(r"(.*)\n```python", page.read_text()) for page in PAGES}
    assert [page for page, lines in code.items() if not all(line.startswith("<!-- test: ") for line in lines)] == []
    assert {page for page, lines in code.items() if lines} == {"README.md", "docs/nnx.md", "docs/sharding.md"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_is_named_is_there(page: pathlib.Path) -> None:
    folders = "tests|tools|examples|benchmarks|stubs|docs"
    named = re.findall(rf"(?<![\w/.])(?:{folders})/[\w/]+\.\w+", page.read_text())
    assert [each for each in named if not (ROOT / each).exists()] == []
