"""`make types`: counts what four checkers reject; fails where flaxsplit lets a mistake pass or invents one.

`--write` also writes `docs/types.md`, and what the README shows; it needs basedpyright and zuban, too. To be run where
flaxsplit and the overlay of `stubs/` are installed. "Without the overlay" is the same environment once more, with all
but the overlay linked into it.
"""

import argparse
import ast
import pathlib
import re
import shutil
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tools.checkers import READ, REPORTED, RUN, Finding, Setting  # noqa: E402 (found beside this file)

TESTS, RECIPES = ROOT / "tests" / "typing", ROOT / "examples" / "recipes"
PAGE = ROOT / "docs" / "types.md"
CHECKERS = tuple(RUN)
CODED = ("mypy", "pyright")  # each wrong line names their codes; those of the others change from release to release
IGNORES = {
    "mypy": re.compile(r"  # type: ignore\[([\w, -]+)\]"),
    "pyright": re.compile(r"  # pyright: ignore\[([\w, ]+)\]"),
}
ANYTHING = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"
# What pyright says of types that jax leaves open, of right and wrong calls alike: the project switches it off too.
OPEN = re.compile(r"reportUnknown\w+|reportMissingTypeStubs")
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- tools/types_table.py -->\n).*?```(?=\n\n)", re.DOTALL)
SHOWN = "apply(params, state, x, trian=True)"
WANTED = 120
"""How many wrong calls must pass through Flax alone."""

# Where a checker says something else than the line of a type test does, by the line's beginning: a limit of its own, or
# of mypy and pyright. `docs/types.md` has each in small.
NESTED = (
    *("chain(", "keyed", "each_grads_of(", "inner("),
    *(f"assert_type({each}(" for each in ("inner", "outer", "stacked", "fs.jit_step")),
)
LIMITS = {
    "ty": ("mapped(params, state, x)",),  # mypy alone rejects it, and it is right
    "pyrefly": (
        *NESTED,
        "mapped(params, state, x)",
        "fs.with_mutable(Model)",
        "fs.with_optimizer(untyped, tx, has_aux=flag)",  # of mypy and pyright: it is right, too
    ),
}


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
    for path in (folder / "tests" / "typing").glob("*.py"):
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
            for checker in CODED
            if not got[checker] or got[checker] != ours.codes[checker]
        ]
        cells = [said(each[checker]) for each in (flax, got) for checker in CHECKERS]
        rows.append((f"`{ours.text}`", f"`{theirs.text}`", *cells))
    rejected = {checker: sum(row[i - len(CHECKERS)] != "accepts" for row in rows) for i, checker in enumerate(CHECKERS)}
    summary = (
        f"{len(rows)} wrong calls, rejected with flaxsplit by "
        + ", ".join(f"{checker}: {count}" for checker, count in rejected.items())
        + f"; through Flax alone all four accept {silent}; with the overlay installed all reject {overlay} of these."
    )
    if silent < WANTED:
        faults.append(f"only {silent} of the wrong calls are accepted through Flax alone; {WANTED} are wanted")
    sides = ("Flax", "flaxsplit")
    head = ("with flaxsplit", "through Flax alone", *(f"{side}: {each}" for side in sides for each in CHECKERS))
    return Report(table(head, rows), summary, faults)


def shown(typed: dict[str, set[Finding]], bare: dict[str, set[Finding]]) -> str:
    """One wrong call, and what each checker says of it."""
    pairs = zip(calls(TESTS / "wrong.py"), calls(TESTS / "wrong_flax.py"), strict=True)
    ours, theirs = next(pair for pair in pairs if pair[0].text == SHOWN)
    lines = [f">>> {ours.text}"]
    for checker in CHECKERS:
        (said_of_it,) = (f for f in typed[checker] if (f.file, f.line) == ("tests/typing/wrong.py", ours.line))
        code = f"{said_of_it.code}: "
        lines.append(f"{checker + ':':9}{said_of_it.message.removeprefix(code)}  [{said_of_it.code}]")
    lines.append(f">>> {theirs.text}")
    groups: dict[str, list[str]] = {}
    for checker in CHECKERS:
        groups.setdefault(said(codes_at(bare[checker], "tests/typing/wrong_flax.py", theirs.line)), []).append(checker)
    lines += [f"{', '.join(those)}: {words}" for words, those in groups.items()]
    return "\n".join(["```text", *lines, "```"])


def limits(typed: dict[str, set[Finding]]) -> list[str]:
    """Finds where ty or pyrefly sees other lines of the type tests than mypy or pyright, and no limit says so."""
    faults = []
    for checker, known in LIMITS.items():
        met = set()
        for path in sorted(TESTS.glob("*.py")):
            if path.stem == "wrong_flax":
                continue
            rejected = {each.line for each in typed[checker] if each.file == f"tests/typing/{path.name}"}
            for number, line in enumerate(path.read_text().splitlines(), 1):
                is_wrong = any(ignore.search(line) for ignore in IGNORES.values())
                if is_wrong == (number in rejected):
                    continue
                excused = [start for start in known if line.lstrip().startswith(start)]
                met.update(excused)
                if not excused:
                    verb = "accepts" if is_wrong else "rejects"
                    faults.append(f"{path.name}:{number}: {checker} {verb} {line.strip()}")
        faults += [f"LIMITS of {checker}: nothing is met by {each!r}" for each in known if each not in met]
    return faults


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
        for i, checker in enumerate(CHECKERS)
        for own, bare, typed, rest in [totals[4 * i : 4 * i + 4]]
    ]
    return Report(table(("file", *head), rows), f"False errors in {len(rows) - 1} recipes: {'; '.join(words)}.", faults)


TEXT = """# What the type checkers see

Written by `python tools/types_table.py --write`, from runs of mypy {mypy} (`--strict`, and what `pyproject.toml` says
of packages without `py.typed`), pyright {pyright} (strict), ty {ty} and pyrefly {pyrefly}. Python {python}, jax {jax},
flax {flax}, optax {optax}.

## Wrong calls

{wrong_summary}

The files are `tests/typing/wrong.py` and, line for line, `tests/typing/wrong_flax.py`. What pyrefly accepts is nested
(see [What stays](#what-stays)). What pyright's strict mode says
of types that JAX leaves open (`reportUnknown...`) is not counted as a rejection: it says it of right calls too.

{wrong}

Two more checkers, reported and not part of the checks, without the overlay: zuban does not read stubs that cover a part
of a package. A false error is counted as below.

{reported}

## False errors in ordinary training code

{false_summary}

The files are the [recipes](recipes.md), and they are right: they run in the tests. An error is a library's own if it
goes away once that library is read as `Any`. "Others" are what is left with the overlay: JAX's own and optax's. Here
nothing is switched off.

{false}

## What stays

- `with_optimizer(loss_fn, tx, has_aux=flag)`, where `flag` is not a literal: an overload for `bool` would also accept
  `True` with a loss that has no aux. Write two calls: `with_optimizer(..., has_aux=True) if flag else ...`.
- `init_carry(*halves, tx)`, where `halves` is `Any`: the checkers let `*halves` fill every parameter, so `tx` is one
  too many. Write `params, state = halves` first.
- `vmap_stateful(lambda ...)`: for mypy a lambda is an untyped function, and so is the result.
- `functools.partial(fn, ...)`: for mypy it takes any arguments, and so does what a combinator makes of it. The other
  checkers keep the rest of the signature.
- A gradient function written inside the call of another combinator, `vmap_stateful(value_and_grad(loss_fn))`:
  pyright sees its params and its batch as `Any`. Assign it to a name first, and they are kept.
- A step or a stateful function written inside the call of another combinator,
  `with_ema(with_optimizer(loss_fn, tx), decay=0.9)`: pyrefly sees its further arguments as `Any`. Assign it to a name
  first, and they are kept. A minimal example: for `def keep(fn: T) -> T`, with `T` bound to a protocol of any
  arguments, `keep(made(f))` has the arguments of the bound, and `g = made(f); keep(g)` has its own.
- A loss typed `Any`, inside three calls, `jit_step(assert_max_traces(with_optimizer(loss_fn, tx)))`: ty refuses it,
  since it infers no arguments for the step. Annotate the loss, or assign `assert_max_traces(...)` to a name first.
- A class instead of an instance, `with_mutable(Model)`: pyrefly accepts the class of a model as a model. No checker
  reports it if the first field of the class is a dict: then the class can be called like `module.apply`.
- A model whose `__call__` has overloads: mypy and pyright use the first of them.
  `with_mutable(model.apply)` takes any arguments.
- `apply(params, state, x, rngs=...)`: PEP 612 allows no keyword beside those of the model. Use `with_rngs`, which
  draws the keys from the state, or `with_mutable(model.apply)`, which takes any arguments. Give `rngs` a default in a
  function of your own that takes it: `rngs: Any = None`.
- A model with `x: Array` rejects a NumPy array outside a step, as its own `__call__` does, and so does a step written
  by hand. Write `jnp.asarray(x)`, or annotate `x: ArrayLike`. Steps of `with_optimizer` take batches of NumPy arrays.
- A number in the aux, `tuple[Array, int]`, comes out of a compiled step as an array, but the checkers believe the
  annotation of the loss function. Annotate `tuple[Array, ArrayLike]`.
- Params may be any tree that optax knows, since `optax.apply_updates` is annotated to return one. So the checkers
  accept an array, a number or a carry as params: a parameter that rejects the carry would also reject what optax
  returns. At the first call it is an error that names what came.
"""


def measure(folder: pathlib.Path) -> dict[str, dict[str, set[Finding]]]:
    """Runs each checker four times."""
    settings = {
        "typed": Setting(sys.executable),
        "bare": Setting(without_overlay(folder / "bare")),
        "flaxsplit is Any": Setting(sys.executable, read_as_any("flaxsplit", folder / "any_flaxsplit")),
        "flax is Any": Setting(sys.executable, read_as_any("flax", folder / "any_flax")),
    }
    tests = copied(folder / "copy")

    def runs(checker: str) -> list[set[Finding]]:
        return [RUN[checker](tests, setting) for setting in settings.values()]

    with ThreadPoolExecutor(2) as beside:  # mypy and pyright take a core each; the others are done in seconds
        found = zip(*beside.map(runs, CHECKERS), strict=True)
    return {name: dict(zip(CHECKERS, each, strict=True)) for name, each in zip(settings, found, strict=True)}


def reported(folder: pathlib.Path) -> str:
    """What the checkers say that nothing depends on."""
    bare, stubs = without_overlay(folder / "bare"), read_as_any("flaxsplit", folder / "any_flaxsplit")
    tests, wrong, rows = copied(folder / "copy"), calls(TESTS / "wrong.py"), []
    for checker, run in REPORTED.items():
        typed, untyped = run(tests, Setting(bare)), run(tests, Setting(bare, stubs))
        ours = {each for each in typed - untyped if each.file.startswith("examples/") and not OPEN.fullmatch(each.code)}
        passed = [call.text for call in wrong if not codes_at(typed, "tests/typing/wrong.py", call.line)]
        misses = ", ".join(f"`{text}`" for text in passed) or "none"
        rows.append((f"{checker} {version(checker)}", f"{len(wrong) - len(passed)} of {len(wrong)}", len(ours), misses))
    return table(("checker", "wrong calls rejected", "false errors of flaxsplit", "accepts"), rows)


def main() -> int:
    """Measures, says what was found, and returns 1 where flaxsplit is at fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/types.md and the README's block")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        found = measure(pathlib.Path(folder).resolve())
    wrong, false = wrong_calls(found["typed"], found["bare"]), false_errors(found)
    faults = [*wrong.faults, *limits(found["typed"]), *false.faults]
    print(wrong.summary, false.summary, *faults, sep="\n")
    if write:
        versions = {name: version(name) for name in (*CHECKERS, "jax", "flax", "optax")}
        python = ".".join(map(str, sys.version_info[:2]))
        with tempfile.TemporaryDirectory() as folder:
            also = reported(pathlib.Path(folder).resolve())
        block = shown(found["typed"], found["bare"])
        README.write_text(BLOCK.sub(lambda _: block, README.read_text()))
        PAGE.write_text(
            TEXT.format(
                **versions,
                python=python,
                reported=also,
                wrong=wrong.page,
                wrong_summary=wrong.summary,
                false=false.page,
                false_summary=false.summary,
            )
        )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
