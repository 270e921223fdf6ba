"""`tests/test_public_api.py`: the public signatures, as the source has them, in `tests/api.txt`; `--write` writes it.

A signature is written anew only where CHANGELOG.md says something new of its name: each stands there with a digest of
the entries, under Unreleased and the current version, that named it when it was written.
"""

import argparse
import ast
import hashlib
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import TypeGuard

ROOT = pathlib.Path(__file__).resolve().parent.parent
STORED = ROOT / "tests" / "api.txt"
sys.path[:0] = [str(ROOT)]

import flaxsplit as fs  # noqa: E402 (found beside this folder, where it is not installed)

BLOCK = re.compile(r"^# (\w+) told ([0-9a-f]{8})\n(.*?)(?=^# |\Z)", re.DOTALL | re.MULTILINE)


def definitions(package: pathlib.Path) -> dict[str, list[ast.stmt]]:
    """Every function, class and alias of a type at the top of a module, overloads included, by name."""
    found: dict[str, list[ast.stmt]] = {}
    for path in sorted(package.glob("_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.setdefault(node.name, []).append(node)
            elif is_alias(node):
                found.setdefault(ast.unparse(node.target), []).append(node)
    return found


def is_alias(node: ast.stmt) -> TypeGuard[ast.AnnAssign]:
    """Tells `Params: TypeAlias = dict[str, Any]`."""
    return isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias"


def lines_of(node: ast.stmt, found: dict[str, list[ast.stmt]], indent: str = "") -> Iterator[str]:
    """What a caller sees of a definition: signatures, bases, fields and methods, those of private bases too."""
    if isinstance(node, ast.FunctionDef):
        decorators = [f"@{name} " for name in map(ast.unparse, node.decorator_list) if name in ("overload", "property")]
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield f"{indent}{''.join(decorators)}{node.name}({ast.unparse(node.args)}){returns}"
    elif isinstance(node, ast.ClassDef):
        yield f"{indent}class {node.name}({', '.join(map(ast.unparse, node.bases))})"
        for base in map(ast.unparse, node.bases):
            for each in found.get(base, ()):
                yield from lines_of(each, found, f"{indent}  ")
        for each in node.body:
            if not isinstance(each, ast.FunctionDef) or each.name in ("__init__", "__call__") or each.name[0] != "_":
                yield from lines_of(each, found, f"{indent}  ")
    elif is_alias(node):
        yield f"{indent}{ast.unparse(node)}"
    elif isinstance(node, ast.AnnAssign):
        yield f"{indent}{ast.unparse(node.target)}: {ast.unparse(node.annotation)}" + (" = ..." if node.value else "")


def signatures() -> dict[str, str]:
    """The text of every public name."""
    found = definitions(pathlib.Path(fs.__file__).parent)
    public = [name for name in dir(fs) if name[0] != "_"]
    return {name: "".join(f"{line}\n" for node in found[name] for line in lines_of(node, found)) for name in public}


def told(changelog: str, version: str) -> dict[str, str]:
    """A digest, for each name in backticks, of the entries under Unreleased and the current version that have it."""
    entries: dict[str, list[str]] = {}
    for section in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        if section.startswith(("[Unreleased]", f"[{version}]")):
            for entry in re.split(r"^- ", section, flags=re.MULTILINE)[1:]:
                for name in set(re.findall(r"`(\w+)", entry)):
                    entries.setdefault(name, []).append(" ".join(entry.split()))
    return {name: hashlib.sha256("\n".join(sorted(each)).encode()).hexdigest()[:8] for name, each in entries.items()}


def stored(text: str) -> dict[str, tuple[str, str]]:
    """Each name's digest and signature, as `tests/api.txt` has them."""
    return {name: (digest, signature) for name, digest, signature in BLOCK.findall(text)}


def changed(before: str, now: dict[str, str]) -> list[str]:
    """Names that came, went or have another signature."""
    old = {name: signature for name, (_, signature) in stored(before).items()}
    return sorted(name for name in old.keys() | now.keys() if old.get(name) != now.get(name))


def untold(before: str, now: dict[str, str], news: dict[str, str]) -> list[str]:
    """Changed names of which the changelog says nothing, or what it said before."""
    old = stored(before)
    return [name for name in changed(before, now) if news.get(name) in (None, old.get(name, ("", ""))[0])]


def page(before: str, now: dict[str, str], news: dict[str, str]) -> str:
    """The file anew; what did not change keeps its digest."""
    renewed = set(changed(before, now))
    old = stored(before)
    digests = {name: news[name] if name in renewed else old[name][0] for name in now}
    return "".join(f"# {name} told {digests[name]}\n{now[name]}" for name in sorted(now))


def main() -> int:
    """Compares or writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tests/api.txt")
    write = parser.parse_args().write
    before = STORED.read_text() if STORED.exists() else ""
    now, news = signatures(), told((ROOT / "CHANGELOG.md").read_text(), fs.__version__)
    names = changed(before, now)
    if silent := untold(before, now, news):
        print(f"api: changed, and CHANGELOG.md says nothing new of it: {', '.join(silent)}")
        return 1
    if write:
        STORED.write_text(page(before, now, news))
    elif names:
        print(f"api: changed: {', '.join(names)}; run `python tools/api.py --write`")
        return 1
    print(f"api: {len(now)} public names, each as in tests/api.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
