"""What a user sees: the names, their signatures, and what importing them costs."""

import ast
import importlib.metadata
import inspect
import pathlib
import subprocess
import sys
import tomllib

import pytest

import flaxsplit as fs
from tools import api

CLASSES = {
    "CollectionError": ValueError,
    "SignatureError": TypeError,
    "StateDriftError": TypeError,
    "UnsyncedStateError": ValueError,
    "RetraceError": RuntimeError,
    "RetraceWarning": UserWarning,
    "UntouchedStateWarning": UserWarning,
    "DroppedStateWarning": UserWarning,
    "CompileLog": object,
    "Finding": object,
    "StepReport": object,
}
TYPES = {
    *("Params", "State", "Variables", "Trainable", "LinenModule"),
    *("Stateful", "LossFn", "GradFn", "Step", "JittedStep"),
}
PACKAGE = pathlib.Path(fs.__file__).parent
SIGNATURES = api.signatures()
FUNCTIONS = sorted(SIGNATURES.keys() - CLASSES.keys() - TYPES - {"Carry"})
CHANGELOG = (api.ROOT / "CHANGELOG.md").read_text()


def test_signatures_are_the_contract() -> None:
    stored = api.STORED.read_text()
    assert api.untold(stored, SIGNATURES, api.told(CHANGELOG, fs.__version__)) == [], "say it in CHANGELOG.md, and then"
    assert api.changed(stored, SIGNATURES) == [], "python tools/api.py --write"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_signature_at_run_time_is_the_one_in_the_source(name: str) -> None:
    (written,) = ast.parse(f"def {SIGNATURES[name].splitlines()[-1]}: ...").body
    assert isinstance(written, ast.FunctionDef)
    names = [each.arg for each in ast.walk(written.args) if isinstance(each, ast.arg)]
    assert sorted(names) == sorted(inspect.signature(getattr(fs, name)).parameters)


def test_a_changed_signature_fails_until_the_changelog_says_so() -> None:
    first = "0.1.0"  # with what is unreleased, that section has every name
    told = api.told(CHANGELOG, first)
    stored = api.page("", SIGNATURES, told)
    assert api.changed(stored, SIGNATURES) == api.untold(stored, SIGNATURES, told) == []
    renamed = SIGNATURES | {"with_ema": SIGNATURES["with_ema"].replace("decay:", "rate:")}
    assert api.changed(stored, renamed) == api.untold(stored, renamed, told) == ["with_ema"]
    entry = "## [Unreleased]\n\n- `with_ema` takes `rate`.\n"
    retold = api.told(CHANGELOG.replace("## [Unreleased]\n", entry), first)
    assert api.untold(stored, renamed, retold) == []
    assert api.changed(api.page(stored, renamed, retold), renamed) == []
    assert api.untold("", {"with_gradients": ""}, told) == ["with_gradients"]


@pytest.mark.parametrize("name", CLASSES)
def test_errors_are_children_of_builtins(name: str) -> None:
    assert issubclass(getattr(fs, name), CLASSES[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_docstring_has_an_example_and_what_comes_out(name: str) -> None:
    doc = inspect.getdoc(getattr(fs, name)) or ""
    assert ">>> " in doc
    assert "Law: " in doc
    assert "Returns:" in doc or "Yields:" in doc


_LINES = (
    "_types _describe _wraps _paths _upstream _caller _again _context _errors",
    "_refusals.options _refusals.apart _refusals.run _refusals.upstream _refusals.apply _refusals.linear",
    "_refusals.lanes _refusals.carry _refusals.adopt _refusals.improve _refusals.update _refusals.keep",
    "_refusals.many _refusals.watch _refusals.look _refusals.explain _refusals.nnx",
    "_checks _declared _axes _filters _split _jaxprs _linear _lost _untouched _mutable _rngs _lanes _vmap _settle",
    "_place _drift _carry _adopt _microbatches _gradient _update _finite _ema _scan _unplaced _jit _traces",
    "_values _flow _tally _compiled _tracing _look _find_leaves _find_state _find_work _report _explain",
    "_slots _trainable _nnx",
)
READING_ORDER = [name for line in _LINES for name in line.split()]


def test_modules_import_only_from_those_before_them() -> None:
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("_*.py")}
    modules |= {f"_refusals.{path.stem}": path for path in (PACKAGE / "_refusals").glob("[a-z]*.py")}
    assert sorted(name for name in modules if not name.endswith("__init__")) == sorted(READING_ORDER)
    for i, name in enumerate(READING_ORDER):
        nodes = [node for node in ast.walk(ast.parse(modules[name].read_text())) if isinstance(node, ast.ImportFrom)]
        beside = "_refusals." if name.startswith("_refusals.") else ""
        imported = {beside + (node.module or "") for node in nodes if node.level == 1}
        imported |= {(node.module or "").removeprefix("flaxsplit.") for node in nodes if _is_ours(node)}
        assert imported <= set(READING_ORDER[:i]), name


def _is_ours(node: ast.ImportFrom) -> bool:
    return node.level == 0 and (node.module or "").startswith("flaxsplit.")


def test_the_wheel_holds_the_package_and_nothing_beside_it() -> None:
    project = PACKAGE.parent / "pyproject.toml"
    if project.exists():
        wheel = tomllib.loads(project.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
        assert wheel == {"packages": ["flaxsplit"]}
    else:  # where the built wheel is tested: `make versions`
        files = importlib.metadata.files("flaxsplit") or []
        assert {file.parts[0] for file in files} == {
            "flaxsplit",
            f"flaxsplit-{importlib.metadata.version('flaxsplit')}.dist-info",
        }


def test_the_nnx_part_is_imported_when_it_is_asked_for() -> None:
    code = """
import sys
import flaxsplit
print("flax.nnx" in sys.modules)
from flaxsplit import from_nnx
print("flax.nnx" in sys.modules, from_nnx is flaxsplit.from_nnx)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
    with pytest.raises(AttributeError, match="module 'flaxsplit' has no attribute 'to_jax'"):
        getattr(fs, "to_jax")  # noqa: B009 (checkers know that there is none)


def test_what_reads_jaxprs_is_imported_when_it_is_asked_for() -> None:
    code = """
import sys
import flaxsplit
print("flaxsplit._explain" in sys.modules, "flaxsplit._report" in sys.modules)
print(flaxsplit.explain_step.__module__, flaxsplit.StepReport.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "flaxsplit._explain", "flaxsplit._report"]


def test_import_needs_only_the_five_libraries() -> None:
    optional = ["orbax", "equinox", "haiku", "rich", "sklearn", "matplotlib", "hypothesis", "pytest", "beartype"]
    code = f"""
import sys
import jax, flax, optax, jaxtyping, typeguard
before = set(sys.modules)
import flaxsplit
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({optional!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
