"""`make release`: what still keeps a version from being released; and the README's code as a program.

Then the target builds the sdist and the wheel, checks both, installs the wheel into an empty environment, and runs
there the program that `--readme` writes.
"""

import argparse
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^<!-- test: \w+ -->\n```python\n(.*?)```", re.DOTALL | re.MULTILINE)


def findings(pyproject: str, package: str, changelog: str, readme: str) -> list[str]:
    """What the texts say that a release must not say, line by line."""
    version = tomllib.loads(pyproject)["project"]["version"]
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    entries = {section.partition("]")[0].strip("["): section.partition("\n") for section in sections}
    title, _, text = entries.get(version, ("", "", ""))
    found = []
    if not re.fullmatch(r"\[.*\] - \d{4}-\d\d-\d\d", title):
        found.append(f"CHANGELOG.md: no section '## [{version}] - YYYY-MM-DD'; rename Unreleased")
    elif not re.search(r"^- ", text, re.MULTILINE):
        found.append(f"CHANGELOG.md: nothing under {version}")
    if re.search(r"^- ", entries.get("Unreleased", ("", "", ""))[2], re.MULTILINE):
        found.append("CHANGELOG.md: entries are left under Unreleased")
    if f'__version__ = "{version}"' not in package:
        found.append(f"flaxsplit/__init__.py: __version__ is not {version}")
    if f"version {version}," not in readme:
        found.append(f"README.md: does not say version {version}")
    return found


def program(readme: str) -> str:
    """Every block of the README, in order."""
    return "\n".join([*BLOCK.findall(readme), 'print("the README runs:", sorted(logs))', ""])


def main() -> int:
    """Writes the program where that is asked for; else prints the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=pathlib.Path, metavar="FILE", help="write the README's code")
    target = parser.parse_args().readme
    names = ("pyproject.toml", "flaxsplit/__init__.py", "CHANGELOG.md", "README.md")
    pyproject, package, changelog, readme = ((ROOT / name).read_text() for name in names)
    if target:
        target.write_text(program(readme))
        return 0
    found = findings(pyproject, package, changelog, readme)
    print("\n".join(["release: not ready", *found] if found else ["release: the texts are ready"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
