"""Counts what mypy and pyright reject, and fails where flaxsplit lets a mistake pass or invents one.

`python tools/types_table.py --write` also writes `docs/types.md`. To be run where flaxsplit and the overlay of `stubs/`
are installed. "Without the overlay" is the same environment once more, with all but the overlay linked into it.
"""

import argparse
import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS, RECIPES = ROOT / "tests" / "typing", ROOT / "examples" / "recipes"
READ = ["tests/typing", "examples/recipes"]
PAGE = ROOT / "docs" / "types.md"
CHECKERS = ("mypy", "pyright")
IGNORES = {
    "mypy": re.compile(r"  # type: ignore\[([\w, -]+)\]"),
    "pyright": re.compile(r"  # pyright: ignore\[([\w, ]+)\]"),
}
ANYTHING = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"
# What pyright says of types that jax leaves open, of right and wrong calls alike: the project switches it off too.
OPEN = re.compile(r"reportUnknown\w+|reportMissingTypeStubs")


class Finding(NamedTuple):
    """One error of one checker."""

    file: str
    line: int
    column: int
    code: str


class Setting(NamedTuple):
    """What a checker reads: an interpreter's packages, with some replaced by `Any`."""

    python: str
    stubs: pathlib.Path | None = None


class Call(NamedTuple):
    """One line of a file of mistakes, with the codes that it says it is rejected with."""

    line: int
    text: str
    codes: dict[str, set[str]]


def copied(folder: pathlib.Path) -> pathlib.Path:
    """Copies the type tests without their ignores, line for line, and the recipes."""
    for each in READ:
        shutil.copytree(ROOT / each, folder / each, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "__init__.py").touch()
    for path in (folder / "tests" / "typing").glob("wrong*.py"):
        text = path.read_text()
        for ignore in IGNORES.values():
            text = ignore.sub("", text)
        path.write_text(text)
    return folder


def without_overlay(folder: pathlib.Path) -> str:
    """Makes an environment with every package of this one but the overlay."""
    packages = pathlib.Path(sysconfig.get_path("purelib"))
    if not (packages / "flax-stubs").exists():
        raise SystemExit("the overlay is not installed: python -m pip install ./stubs")
    venv.create(folder, symlinks=True)
    site = pathlib.Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for entry in packages.iterdir():
        if entry.name != "flax-stubs":
            (site / entry.name).symlink_to(entry)
    return str(folder / "bin" / "python")


def read_as_any(package: str, folder: pathlib.Path) -> pathlib.Path:
    """Makes stubs that say `Any` of whatever the recipes import from a package."""
    modules = {package}
    for path in RECIPES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module)
    for module in sorted(modules):
        if module.split(".")[0] == package:
            stub = folder.joinpath(*module.split("."))
            stub.mkdir(parents=True, exist_ok=True)
            (stub / "__init__.pyi").write_text(ANYTHING)
    return folder


def run_mypy(folder: pathlib.Path, setting: Setting) -> set[Finding]:
    """Runs `mypy --strict` under the settings of the project."""
    options = ["--strict", "--output=json", "--config-file", str(ROOT / "pyproject.toml")]
    options += ["--python-executable", setting.python, f"--cache-dir={tempfile.mkdtemp(dir=folder)}"]
    env = os.environ | {"MYPYPATH": str(setting.stubs or "")}
    command = [sys.executable, "-m", "mypy", *options, *READ]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode > 1 or done.stderr:
        raise SystemExit(done.stdout + done.stderr)
    found = map(json.loads, done.stdout.splitlines())
    return {Finding(f["file"], f["line"], f["column"], f["code"]) for f in found if f["severity"] == "error"}


def run_pyright(folder: pathlib.Path, setting: Setting) -> set[Finding]:
    """Runs pyright in strict mode with nothing switched off."""
    config = {"include": READ, "typeCheckingMode": "strict", "enableTypeIgnoreComments": False}
    if setting.stubs:
        config["stubPath"] = os.path.relpath(setting.stubs, folder)
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", setting.python]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode > 1:
        raise SystemExit(done.stdout + done.stderr)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {
        Finding(
            str(pathlib.Path(f["file"]).resolve().relative_to(folder.resolve())),
            f["range"]["start"]["line"] + 1,
            f["range"]["start"]["character"],
            f.get("rule", "syntax"),
        )
        for f in found
        if f["severity"] == "error"
    }


RUN = {"mypy": run_mypy, "pyright": run_pyright}


def calls(path: pathlib.Path) -> list[Call]:
    """Reads the mistakes of a file: every statement of every function called `wrong_...`."""
    lines = path.read_text().splitlines()
    found = []
    for function in ast.parse("\n".join(lines)).body:
        if isinstance(function, ast.FunctionDef) and function.name.startswith("wrong_"):
            for statement in function.body:
                line = lines[statement.lineno - 1]
                said = {checker: ignore.findall(line) for checker, ignore in IGNORES.items()}
                codes = {
                    checker: {code for each in found_in for code in each.split(", ")}
                    for checker, found_in in said.items()
                }
                found.append(Call(statement.lineno, ast.unparse(statement), codes))
    return found


def codes_at(found: set[Finding], file: str, line: int) -> set[str]:
    """Returns the codes of a line's errors, but for what is said of types left open."""
    return {each.code for each in found if (each.file, each.line) == (file, line) and not OPEN.fullmatch(each.code)}


def said(codes: set[str]) -> str:
    """Returns a table's cell."""
    return ", ".join(f"`{code}`" for code in sorted(codes)) or "accepts"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines: list[Sequence[object]] = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


class Report(NamedTuple):
    """The page, one line for the terminal, and what must not be."""

    page: str
    summary: str
    faults: list[str]


def wrong_calls(typed: dict[str, set[Finding]], bare: dict[str, set[Finding]]) -> Report:
    """Compares each wrong call with the same mistake through Flax alone, and with what the line says of itself."""
    rows, faults, silent, overlay = [], [], 0, 0
    for ours, theirs in zip(calls(TESTS / "wrong.py"), calls(TESTS / "wrong_flax.py"), strict=True):
        got = {checker: codes_at(typed[checker], "tests/typing/wrong.py", ours.line) for checker in CHECKERS}
        flax = {checker: codes_at(bare[checker], "tests/typing/wrong_flax.py", theirs.line) for checker in CHECKERS}
        mended = [codes_at(typed[checker], "tests/typing/wrong_flax.py", theirs.line) for checker in CHECKERS]
        silent += not any(flax.values())
        overlay += all(mended)
        faults += [
            f"wrong.py:{ours.line}: {checker} gave {said(got[checker])}, the line says {said(ours.codes[checker])}"
            for checker in CHECKERS
            if not got[checker] or got[checker] != ours.codes[checker]
        ]
        cells = [said(each[checker]) for each in (flax, got) for checker in CHECKERS]
        rows.append((f"`{ours.text}`", f"`{theirs.text}`", *cells))
    rejected = {checker: sum(row[-2 + CHECKERS.index(checker)] != "accepts" for row in rows) for checker in CHECKERS}
    summary = (
        f"{len(rows)} wrong calls: mypy rejects {rejected['mypy']} and pyright {rejected['pyright']} with flaxsplit; "
        f"through Flax alone both accept {silent}; with the overlay installed both reject {overlay} of these."
    )
    if silent < 40:
        faults.append(f"only {silent} of the wrong calls are accepted through Flax alone; 40 are wanted")
    head = (
        "with flaxsplit",
        "through Flax alone",
        "Flax: mypy",
        "Flax: pyright",
        "flaxsplit: mypy",
        "flaxsplit: pyright",
    )
    return Report(table(head, rows), summary, faults)


def false_errors(found: dict[str, dict[str, set[Finding]]]) -> Report:
    """Counts the errors in the training files that go away once a library is read as `Any`: these are its own."""
    rows = []
    faults = [
        f"{checker} rejects a wrong call although flaxsplit is Any: it was not read as Any, and nothing was counted"
        for checker in CHECKERS
        if any(
            codes_at(found["flaxsplit is Any"][checker], "tests/typing/wrong.py", call.line)
            for call in calls(TESTS / "wrong.py")
        )
    ]
    totals = [0] * (4 * len(CHECKERS))
    for path in sorted(RECIPES.glob("*.py")):
        file = f"examples/recipes/{path.name}"
        counts = []
        for checker in CHECKERS:
            runs = {name: {each for each in run[checker] if each.file == file} for name, run in found.items()}
            ours = runs["typed"] - runs["flaxsplit is Any"]
            faults += [f"{each.file}:{each.line}:{each.column}: {each.code} ({checker})" for each in sorted(ours)]
            bare, typed = runs["bare"] - runs["flax is Any"], runs["typed"] - runs["flax is Any"]
            counts += [len(ours), len(bare), len(typed), len(runs["typed"] - ours - typed)]
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        rows.append((f"`{path.stem}`", *counts))
    rows.append(("all", *totals))
    head = [
        f"{checker}: {column}" for checker in CHECKERS for column in ("flaxsplit", "Flax", "Flax, overlay", "others")
    ]
    words = [
        f"{checker}: flaxsplit {own}, Flax {bare}, Flax with the overlay {typed}, others {rest}"
        for checker, (own, bare, typed, rest) in zip(CHECKERS, (totals[:4], totals[4:]), strict=True)
    ]
    return Report(table(("file", *head), rows), f"False errors in {len(rows) - 1} recipes: {'; '.join(words)}.", faults)


TEXT = """# What the type checkers see

Written by `python tools/types_table.py --write`, from runs of mypy {mypy} (`--strict`) and pyright {pyright} (strict)
on Python {python}, jax {jax}, flax {flax}, optax {optax}.

## Wrong calls

{wrong_summary}

The files are `tests/typing/wrong.py` and, line for line, `tests/typing/wrong_flax.py`. What pyright's strict mode says
of types that JAX leaves open (`reportUnknown...`) is not counted as a rejection: it says it of right calls too.

{wrong}

## False errors in ordinary training code

{false_summary}

The files are the [recipes](recipes.md), and they are right: they run in the tests. An error is a library's own if it
goes away once that library is read as `Any`. "Others" are what is left with the overlay: JAX's own and optax's. Here
nothing is switched off.

{false}

## What stays

- `with_optimizer(loss_fn, tx, has_aux=flag)`, where `flag` is no literal: an overload for `bool` would take `True` as
  well, and with it a loss without aux. Two calls say it: `with_optimizer(..., has_aux=True) if flag else ...`.
- `init_carry(*halves, tx)`, where `halves` is `Any`: the checkers let `*halves` fill every parameter, and find `tx` to
  be one too many. `params, state = halves` comes first.
- `vmap_stateful(lambda ...)`: to mypy a lambda is an untyped function, and so is what comes out, where it is called.
- `functools.partial(fn, ...)` is a function of any arguments to mypy, and so is what a combinator makes of it. pyright
  and ty keep what is left of the signature.
- A gradient function that is written inside the call of another combinator, `vmap_stateful(value_and_grad(loss_fn))`:
  pyright takes its params and its batch for `Any`. Given a name first, it keeps them.
- A model whose `__call__` has overloads is seen through the first of them.
- `apply(params, state, x, rngs=...)`: PEP 612 allows no keyword beside those of the model. `with_rngs` draws the keys
  from the state; a function of your own that takes `rngs` gives them a default: `rngs: Any = None`.
- A model that says `x: Array` refuses a NumPy array where it is called outside a step, as its own `__call__` does.
  `jnp.asarray(x)` says it, or `x: ArrayLike` in the model. A compiled step takes batches of NumPy arrays as they are.
- Params may be any tree that optax knows, since `optax.apply_updates` is typed as returning one: so the checkers let an
  array, a number or a carry pass for them. At the first call it is an error that says what came.
"""


def measure(folder: pathlib.Path) -> dict[str, dict[str, set[Finding]]]:
    """Runs both checkers four times."""
    settings = {
        "typed": Setting(sys.executable),
        "bare": Setting(without_overlay(folder / "bare")),
        "flaxsplit is Any": Setting(sys.executable, read_as_any("flaxsplit", folder / "any_flaxsplit")),
        "flax is Any": Setting(sys.executable, read_as_any("flax", folder / "any_flax")),
    }
    tests = copied(folder / "copy")

    def runs(checker: str) -> list[set[Finding]]:
        return [RUN[checker](tests, setting) for setting in settings.values()]

    with ThreadPoolExecutor() as beside:  # each takes one core
        found = zip(*beside.map(runs, CHECKERS), strict=True)
    return {name: dict(zip(CHECKERS, each, strict=True)) for name, each in zip(settings, found, strict=True)}


def main() -> int:
    """Measures, says what was found, and returns 1 where flaxsplit is at fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/types.md")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        found = measure(pathlib.Path(folder).resolve())
    wrong, false = wrong_calls(found["typed"], found["bare"]), false_errors(found)
    print(wrong.summary, false.summary, *wrong.faults, *false.faults, sep="\n")
    if write:
        versions = {name: version(name) for name in ("mypy", "pyright", "jax", "flax", "optax")}
        python = ".".join(map(str, sys.version_info[:2]))
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(
            TEXT.format(
                **versions,
                python=python,
                wrong=wrong.page,
                wrong_summary=wrong.summary,
                false=false.page,
                false_summary=false.summary,
            )
        )
    return int(bool(wrong.faults or false.faults))


if __name__ == "__main__":
    sys.exit(main())
