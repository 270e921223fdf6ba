"""Writes the table of kinds into `docs/combinators/explain_step.md` with `--write`; without, fails if it is stale."""

import argparse
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "combinators" / "explain_step.md"
sys.path[:0] = [str(ROOT)]

from tests.planted import table  # noqa: E402 (found beside this folder)

BLOCK = re.compile(r"(?<=<!-- kinds: begin -->\n\n).*?(?=\n\n<!-- kinds: end -->)", re.DOTALL)


def current() -> str:
    """The page with the table of today."""
    return BLOCK.sub(lambda _: table(), PAGE.read_text())


def main() -> int:
    """Compares or writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    page = current()
    if parser.parse_args().write:
        PAGE.write_text(page)
    stale = PAGE.read_text() != page
    if stale:
        print("kinds: the table is not of today; run `python tools/kinds.py --write`")
    return stale


if __name__ == "__main__":
    sys.exit(main())
