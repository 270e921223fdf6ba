"""`tests/test_docs.py`: `docs/tutorial.ipynb` and `docs/open_step.ipynb`; `--write` writes them.

Each is the page of that name. Text becomes cells of Markdown. Sessions become cells of code, each up to what shows
something.
"""

import doctest
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tools.written import written  # noqa: E402 (found beside this folder)

PAGES = [ROOT / "docs" / name for name in ("tutorial.md", "open_step.md")]
ITSELF = re.compile(r" It is \[a notebook\]\(\w+.ipynb\) too\.")
SESSION = re.compile(r"```pycon\n(.*?)```\n", re.DOTALL)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(page: pathlib.Path) -> str:
    """The page as a notebook of format 4.5, with the results that the page shows."""
    found = list(cells(ITSELF.sub("", page.read_text())))
    for i, cell in enumerate(found):
        cell["id"] = f"cell-{i}"
    whole = {"cells": found, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def cells(page: str) -> Iterator[dict[str, Any]]:
    """Text and code in turn."""
    for i, part in enumerate(SESSION.split(page)):
        if i % 2 == 0:
            if part.strip():
                yield {"cell_type": "markdown", "metadata": {}, "source": part.strip()}
            continue
        source = ""
        examples = doctest.DocTestParser().get_examples(part)
        for example in examples:
            source += example.source
            if example.want or example is examples[-1]:
                yield code(source.rstrip(), example.want.rstrip())
                source = ""


def code(source: str, shown: str) -> dict[str, Any]:
    """A cell, run already where it shows something."""
    data = {"text/plain": shown}
    result = {"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": None}
    outputs = [result] if shown else []
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": outputs, "execution_count": None}


if __name__ == "__main__":
    sys.exit(written(__doc__, lambda: {page.with_suffix(".ipynb"): notebook(page) for page in PAGES}))
