"""`make mutants`: the package changed in one place at a time, by cosmic-ray; runs the tests that reach the place.

A mutant that none of them fails on has survived. Then a test is missing, or `tests/survivors.toml` says why the change
is none that anybody could see. What came out is stored in `tests/results/mutants.json`, from which `tools/trust.py`
tells; a mutant that is stored is tried again by `--again` only. Which tests reach which line, and how long each takes,
is learned by running those of `make test` once with coverage, into `build/mutants`; `--fresh` learns it anew.
"""

import argparse
import ast
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK, STORED = ROOT / "build" / "mutants", ROOT / "tests" / "results" / "mutants.json"
sys.path[:0] = [str(ROOT)]

# Of the eleven operators that cosmic-ray puts in the place of another one; of comparisons the negation, and what
# differs where both sides are equal.
OPERATORS = re.compile(
    r"core/(AddNot|ExceptionReplacer|NumberReplacer|RemoveDecorator|ZeroIterationForLoop|ReplaceBreakWithContinue"
    r"|ReplaceContinueWithBreak|ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceTrueWithFalse|ReplaceFalseWithTrue"
    r"|ReplaceUnaryOperator_(Delete_Not|Delete_USub)"
    r"|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Div|Mod_Mul|Pow_Mul|BitOr_BitAnd|BitAnd_BitOr)"
    r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Lt_Gt|Gt_Lt))"
)
# Coverage does not see what a test does in a process of its own: the tests, by a part of a mutant's name.
ELSEWHERE = {
    "_checks.py:": ["tests/test_checks.py"],
    "@checked": ["tests/test_checks.py"],
}
# What the tests import beside the package, once for all of them.
PRELOAD = [
    *("jax", "jax.experimental.multihost_utils", "flax.linen", "flax.nnx", "flax.training.train_state", "optax"),
    *("pytest", "hypothesis.extra.numpy", "hypothesis.stateful", "typeguard", "beartype", "orbax.checkpoint"),
]
OPPOSITES: dict[type, Any] = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}


class Mutant(NamedTuple):
    """One change: the module, the function, the line before and after, and which of those that read alike."""

    module: str
    function: str
    before: str
    after: str
    occurrence: int = 0

    @property
    def name(self) -> str:
        """What it is stored under; stays where lines above it come or go."""
        again = f" ({self.occurrence + 1})" if self.occurrence else ""
        return f"{self.module}:{self.function}: {self.before} -> {self.after}{again}"


class Change(NamedTuple):
    """A mutant, the module's text with it, and the lines of the statement that it is in."""

    mutant: Mutant
    code: str
    lines: range


def changes(modules: Iterable[pathlib.Path]) -> Iterator[Change]:
    """Every mutant of these modules that a test could tell from them, and from each other."""
    from cosmic_ray.plugins import operator_names

    seen: Counter[Mutant] = Counter()
    for path in modules:
        code = path.read_text()
        tree, known = ast.parse(code), {skeleton(code), None}
        for name in filter(OPERATORS.fullmatch, operator_names()):
            number = 0
            while mutated := mutated_at(code, name, number):
                number += 1
                if (bare := skeleton(mutated)) in known:
                    continue
                known.add(bare)
                old, new = code.splitlines(), mutated.splitlines()
                at = next(i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
                gone = name == "core/RemoveDecorator"  # which leaves an empty line, or none
                while not old[at].strip():
                    at += 1
                lines, function = enclosing(tree, at + 1)
                mutant = Mutant(path.name, function, old[at].strip(), "" if gone else new[at].strip())
                yield Change(mutant._replace(occurrence=seen[mutant]), mutated, lines)
                seen[mutant] += 1


def mutated_at(code: str, name: str, number: int) -> str | None:
    """The module with one operator used at its so many-th place; as it was where cosmic-ray cannot, None at the end."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    try:
        return mutate_code(code, get_operator(name)(), number) or None
    except AttributeError:  # an exception with a dot in its name, which cosmic-ray 8.7 takes for one word
        return code


def skeleton(code: str) -> str | None:
    """What of a module runs, without what only type checkers read; None where it is no Python."""
    try:
        return ast.dump(Bare().visit(ast.parse(code)))
    except SyntaxError:
        return None


class Bare(ast.NodeTransformer):
    """Takes annotations, aliases of types, overloads and protocols away, and one of two ways to say the same."""

    def visit_Module(self, node: ast.Module) -> Any:
        """Of functions of one name the last, whatever became of an overload."""
        last = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
        node.body = [each for each in node.body if not isinstance(each, ast.FunctionDef) or last[each.name] is each]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> Any:
        """An argument by its name."""
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        """An alias of a type is nothing, another name its value."""
        if "Alias" in ast.unparse(node.annotation):
            return None
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        """`Names = str | list[str]` is an alias too."""
        name = ast.unparse(node.targets[0])
        is_alias = name[0].isupper() and not name.isupper() and isinstance(node.value, ast.Subscript | ast.BinOp)
        return None if is_alias else self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        """`not a == b` is `a != b`, and `not not a` is `a`."""
        self.generic_visit(node)
        inner = node.operand
        if isinstance(node.op, ast.Not) and isinstance(inner, ast.UnaryOp) and isinstance(inner.op, ast.Not):
            return inner.operand
        if isinstance(node.op, ast.Not) and isinstance(inner, ast.Compare) and type(inner.ops[0]) in OPPOSITES:
            return ast.Compare(inner.left, [OPPOSITES[type(inner.ops[0])](), *inner.ops[1:]], inner.comparators)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        """`zip(..., strict=True)` says what is so already."""
        node.keywords = [each for each in node.keywords if each.arg != "strict"]
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        """TYPE_CHECKING is false."""
        return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        """A protocol is for checkers."""
        return None if any("Protocol" in ast.unparse(base) for base in node.bases) else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """An overload too."""
        if any(ast.unparse(each).endswith("overload") for each in node.decorator_list):
            return None
        node.returns = None
        return self.generic_visit(node)


def enclosing(tree: ast.Module, line: int) -> tuple[range, str]:
    """The lines of the innermost statement around a line, but for its body, and the function around it."""
    lines, function = range(line, line + 1), "module"
    for node in ast.walk(tree):  # outer nodes come first
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            lines = range(node.lineno, body[0].lineno if body and body[0].lineno > line else (node.end_lineno or 0) + 1)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                function = node.name
    return lines, function


def learn() -> None:
    """Runs the tests that answer in minutes once, with coverage: no others fit into the seconds of a mutant."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    (WORK / "coveragerc").write_text("[run]\nsource = flaxsplit\nparallel = true\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", f"--junitxml={WORK}/times.xml"]
    command += ["-m", "not slow and not exhaustive", f"--cov-config={WORK}/coveragerc"]
    command += ["--cov", "--cov-context=test", "--cov-report="]
    environment = {**os.environ, "COVERAGE_FILE": str(WORK / ".coverage"), "FUZZ_SECONDS": "4"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


class Reach:
    """Which tests reach a line, and how long each takes."""

    def __init__(self) -> None:
        from coverage import CoverageData

        self.seconds: dict[str, float] = {}
        for case in ET.parse(WORK / "times.xml").iter("testcase"):  # noqa: S314 (pytest wrote it)
            self.seconds[f"{case.attrib['classname'].split('.')[-1]}::{case.attrib['name']}"] = float(
                case.attrib["time"]
            )
        data = CoverageData(str(WORK / ".coverage"))
        data.read()
        self.lines = {pathlib.Path(name).name: data.contexts_by_lineno(name) for name in data.measured_files()}

    def took(self, test: str) -> float:
        """Seconds; what is not known, such as a test of another name by now, comes last."""
        file, _, name = test.partition("::")
        return self.seconds.get(f"{pathlib.Path(file).stem}::{name.split('::')[-1]}", 60.0)

    def tests(self, change: Change, budget: float, killers: Counter[str]) -> list[list[str]]:
        """The quickest that reach the change, for so many seconds; where it runs at import, the quickest of all.

        First those that killed mutants of the same function, and the module's own; and in batches, since all that is
        collected is imported.
        """
        own = f"tests/test{change.mutant.module}"
        contexts = self.lines.get(change.mutant.module, {})
        found = {name.partition("|")[0] for line in change.lines for name in contexts.get(line, ())} - {""}
        beside = [test for part, tests in ELSEWHERE.items() if part in change.mutant.name for test in tests]
        if not found:
            found = {name.partition("|")[0] for each in contexts.values() for name in each} - {""}
            beside.append("tests/test_public_api.py")
        chosen, left = list[str](), budget
        for test in sorted(found, key=lambda test: (-killers[test], not test.startswith(own), self.took(test), test)):
            left -= self.took(test)
            if chosen and left < 0:
                break
            chosen.append(test)
        return [batch for batch in (chosen[:6], chosen[6:30], chosen[30:], beside) if batch]


def run(folder: str, tests: list[str], told: str) -> None:
    """Runs tests in a copy of the tree, in a process of its own; exits as pytest does."""
    import pytest

    os.chdir(folder)
    sys.path[:0] = [folder]
    os.environ |= {"CI": "1", "FUZZ_SECONDS": "4"}

    class Teller:
        """Writes down what fails."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                with pathlib.Path(told).open("a") as file:
                    file.write(f"{report.nodeid}\n")

        pytest_collectreport = pytest_runtest_logreport

    out = os.open(f"{told}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:pytest_cov", "--tb=line"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # the fork server has hypothesis already
    os._exit(int(pytest.main([*options, *tests], plugins=[Teller()])))


def outcome(change: Change, batches: list[list[str]], folder: pathlib.Path, seconds: float) -> str:
    """What came of a mutant: the test that killed it, or `survived`."""
    target = folder / "flaxsplit" / change.mutant.module
    original = target.read_text()
    target.write_text(change.code)
    try:
        killers = (killer(tests, folder, seconds) for tests in batches)
        return next((f"killed by {each}" for each in killers if each), "survived")
    finally:
        target.write_text(original)


def killer(tests: list[str], folder: pathlib.Path, seconds: float) -> str | None:
    """The first of some tests that fails."""
    told = folder / "failed"
    told.unlink(missing_ok=True)
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(str(folder), tests, str(told)))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "the time-out"
    if process.exitcode and not told.exists():
        raise SystemExit(f"mutants: exit {process.exitcode}, no test failed:\n{told.with_suffix('.log').read_text()}")
    return told.read_text().splitlines()[0] if process.exitcode else None


def copies(count: int) -> SimpleQueue[pathlib.Path]:
    """Folders with what git would track, to change the package in."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = SimpleQueue[pathlib.Path]()
    for i in range(count):
        folder = WORK / f"copy{i}"
        shutil.rmtree(folder, ignore_errors=True)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        folders.put(folder)
    return folders


def store(stored: dict[str, str], modules: list[pathlib.Path], known: set[str]) -> None:
    """Keeps what is of today's package, and says what it was run on."""
    from benchmarks._measure import about

    others = tuple(f"{path.name}:" for path in (ROOT / "flaxsplit").glob("*.py") if path not in modules)
    kept = {name: each for name, each in sorted(stored.items()) if name in known or name.startswith(others)}
    STORED.write_text(json.dumps({"about": about() | {"command": "make mutants"}, "mutants": kept}, indent=1) + "\n")


def main() -> int:
    """Tries what is asked for, and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="such as _vmap.py; all by default")
    parser.add_argument("--fresh", action="store_true", help="learn anew which tests reach which line")
    parser.add_argument("--again", choices=["survivors", "all"], help="try these too, though they are stored")
    parser.add_argument("--budget", type=float, default=20, help="seconds of tests for each; a survivor may want more")
    parser.add_argument("--tests", nargs="+", help="these tests and no others")
    parser.add_argument("--list", action="store_true", help="name the mutants only")
    args = parser.parse_args()
    modules = [path for path in sorted((ROOT / "flaxsplit").glob("*.py")) if path.name in (args.modules or path.name)]
    every = list(changes(modules))
    stored: dict[str, str] = json.loads(STORED.read_text())["mutants"] if STORED.exists() else {}
    again = {"survivors": ("", "survived"), "all": None, None: ("",)}[args.again]
    due = [each for each in every if again is None or stored.get(each.mutant.name, "") in again]
    if args.list:
        print(*(each.mutant.name for each in due), sep="\n")
        return 0
    if args.fresh or not (WORK / "times.xml").exists():
        learn()
    # Most mutants compile what was compiled before.
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(WORK / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_PLATFORMS": "cpu"}
    multiprocessing.set_forkserver_preload(PRELOAD)
    reach, folders, began = Reach(), copies(2), time.monotonic()
    killers = {each.mutant.function: Counter[str]() for each in due}

    def attempt(change: Change) -> tuple[Change, str]:
        folder, known = folders.get(), killers[change.mutant.function]
        try:
            batches = [args.tests] if args.tests else reach.tests(change, args.budget, known)
            came = outcome(change, batches, folder, 120 + 2 * args.budget)
            known[came.removeprefix("killed by ")] += 1
            return change, came
        finally:
            folders.put(folder)

    with ThreadPoolExecutor(2) as pool:
        for i, (change, came) in enumerate(pool.map(attempt, due), 1):
            stored[change.mutant.name] = came
            spent = time.monotonic() - began
            print(f"[{i}/{len(due)} {spent:.0f} s] {came[:60]:60}  {change.mutant.name}", flush=True)
            store(stored, modules, {each.mutant.name for each in every})
    quick = sorted({each.removeprefix("killed by ") for each in stored.values() if "::" in each})
    if not args.tests and (wrong := killer(quick, folders.get(), 3600)):
        raise SystemExit(f"mutants: {wrong} fails without any, so what it killed is not known")
    lived = sum(each == "survived" for each in stored.values())
    print(f"mutants: {len(every)}, of which {lived} survived; see tests/survivors.toml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
