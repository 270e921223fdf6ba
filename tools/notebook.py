"""Writes `docs/tutorial.ipynb` with `--write`; without, fails where the notebook is not what would be written.

It is the tutorial: its text becomes cells of Markdown, its sessions cells of code, each up to what shows something.
"""

import argparse
import doctest
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")
ITSELF = " It is [a notebook](tutorial.ipynb) too."
SESSION = re.compile(r"```pycon\n(.*?)```\n", re.DOTALL)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook() -> str:
    """The page as a notebook of format 4.5, with the results that the page shows."""
    found = list(cells(PAGE.read_text().replace(ITSELF, "")))
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


def main() -> int:
    """Compares or writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/tutorial.ipynb")
    if parser.parse_args().write:
        NOTEBOOK.write_text(notebook())
    elif not NOTEBOOK.exists() or NOTEBOOK.read_text() != notebook():
        print("notebook: docs/tutorial.ipynb is not what the tutorial says; run `python tools/notebook.py --write`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
