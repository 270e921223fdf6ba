"""`tests/test_explain.py`: the table of kinds in `docs/combinators/explain_step.md`; `--write` writes it."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "combinators" / "explain_step.md"
sys.path[:0] = [str(ROOT)]

from tests.planted import table  # noqa: E402 (found beside this folder)
from tools.written import written  # noqa: E402 (found beside this folder)

BLOCK = re.compile(r"(?<=<!-- kinds: begin -->\n\n).*?(?=\n\n<!-- kinds: end -->)", re.DOTALL)


def current() -> str:
    """The page with the table of today."""
    return BLOCK.sub(lambda _: table(), PAGE.read_text())


if __name__ == "__main__":
    sys.exit(written(__doc__, lambda: {PAGE: current()}))
