"""`tools/trust.py` and all others that make pages or pictures: with `--write` they write them, without they compare."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Mapping


def written(doc: str | None, texts: Callable[[], Mapping[pathlib.Path, str]]) -> int:
    """Writes the files or compares them; returns what the shell is told. `doc` is what the tool says of itself."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the files")
    write, files = parser.parse_args().write, texts()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale if write else ():
        path.write_text(files[path])
    if stale:
        names = ", ".join(path.name for path in stale)
        print(f"written: {names}" if write else f"not of today: {names}; run `python {sys.argv[0]} --write`")
    return int(bool(stale and not write))
