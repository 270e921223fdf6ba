"""What a user sees: the names, their signatures, and what importing them costs."""

import ast
import importlib.metadata
import inspect
import pathlib
import subprocess
import sys
import tomllib
from typing import Any

import pytest

import flaxsplit as fs

SIGNATURES = {
    "split_params": "(variables, *, trainable=None)",
    "merge_state": "(params, state)",
    "with_mutable": "(fn, *, method=None, mutable=Ellipsis, capture=())",
    "with_rngs": "(fn, *, axis_name=None)",
    "rng_state": "(**keys)",
    "vmap_stateful": "(fn, *, in_axes=0, out_axes=0, axis_name='batch', params_axes=None, state_axes=None, "
    "split_rngs=True, axis_size=None, spmd_axis_name=None)",
    "settle_state": "(fn, params, state, /, *args, **kwargs)",
    "init_carry": "(params, state, tx)",
    "with_optimizer": "(loss_fn, tx, *, has_aux=False, microbatches=1, axis_name=None)",
    "with_ema": "(step, *, decay)",
    "scan_steps": "(step, *, unroll=1)",
    "stack_batches": "(batches, size)",
    "jit_step": "(step, *, like=None, donate=True)",
    "adopt_carry": "(restored, like)",
    "assert_max_traces": "(fn, max_traces=1)",
    "compile_log": "()",
    "from_nnx": "(module, *, trainable=<class 'flax.nnx.variablelib.Param'>, method=None)",
    "to_nnx": "(module, params, state)",
    "Carry": "(step, params, state, opt_state)",
}
CLASSES = {
    "CollectionError": ValueError,
    "SignatureError": TypeError,
    "StateDriftError": TypeError,
    "UnsyncedStateError": ValueError,
    "RetraceError": RuntimeError,
    "UntouchedStateWarning": UserWarning,
    "CompileLog": object,
}
PACKAGE = pathlib.Path(fs.__file__).parent


def bare(fn: Any) -> str:
    """A signature without annotations."""
    signature = inspect.signature(fn)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def test_the_public_names_are_these() -> None:
    public = {name for name in dir(fs) if not name.startswith("_")}
    assert public == SIGNATURES.keys() | CLASSES.keys()


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_contract(name: str) -> None:
    assert bare(getattr(fs, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", CLASSES)
def test_errors_are_children_of_builtins(name: str) -> None:
    assert issubclass(getattr(fs, name), CLASSES[name])


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_public_docstring_has_an_example_and_what_comes_out(name: str) -> None:
    doc = inspect.getdoc(getattr(fs, name)) or ""
    if name != "Carry":
        assert ">>> " in doc
        assert "Law: " in doc
        assert "Returns:" in doc or "Yields:" in doc


def test_modules_import_only_from_those_before_them() -> None:
    order = ["_types", "_describe", "_errors", "_checks", "_filters", "_split", "_mutable", "_rngs", "_vmap", "_settle"]
    order += ["_place", "_carry", "_step", "_traces", "_nnx"]
    assert sorted(p.stem for p in PACKAGE.glob("_*.py") if p.stem != "__init__") == sorted(order)
    for i, name in enumerate(order):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
        assert imported <= set(order[:i]), name


def test_the_wheel_holds_the_package_and_nothing_beside_it() -> None:
    project = PACKAGE.parent / "pyproject.toml"
    if project.exists():
        wheel = tomllib.loads(project.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
        assert wheel == {"packages": ["flaxsplit"]}
    else:  # where the built wheel is tested: `make newest`
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
