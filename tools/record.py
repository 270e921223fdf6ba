"""`noxfile.py`: what a run of the tests passed, stored beside what others did.

`record.py 3.12-newest junit.xml results.json`: the key is a session of the noxfile, in whose environment this runs, or
a flag of `make flags`. Tests that were chosen follow: trust.py tells of whole runs only.
"""

import json
import pathlib
import sys
from typing import Any
from xml.etree import ElementTree as ET

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks._measure import about  # noqa: E402 (found beside this folder)


def counts(junit: str) -> dict[str, int]:
    """Tests passed and skipped, as pytest counted them; a run with failures is none to store."""
    suites = list(ET.fromstring(junit).iter("testsuite"))  # noqa: S314 (pytest wrote it, just now)
    tests, skipped, failed, broken = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped", "failures", "errors")
    )
    if failed or broken or tests == skipped:
        raise SystemExit(f"record: not stored, {failed + broken} of {tests} tests failed")
    return {"passed": tests - skipped, "skipped": skipped}


def merged(stored: dict[str, Any], key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entries of all sessions, in order."""
    return dict(sorted((stored | {key: entry}).items()))


def main(key: str, junit: str, results: str, *chosen: str) -> None:
    """Reads, adds, writes."""
    target = "flags FLAGS" if "=" in key else "versions ONLY"
    told = about() | {"command": " ".join([f"make {target}={key}", *chosen])}
    entry = {"about": told, "chosen": list(chosen), **counts(pathlib.Path(junit).read_text())}
    path = pathlib.Path(results)
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(merged(stored, key, entry), indent=1) + "\n")
    print(f"record: {key} stored in {path.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
