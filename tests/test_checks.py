"""Signatures checked at run time: off by default and then not there at all, on with one variable, by either checker."""

import inspect
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import flaxsplit as fs
from flaxsplit import _checks

ROOT = pathlib.Path(__file__).parent.parent

# One wrong argument for each public function that takes any: most are what only a type checker can see.
WRONG = {
    "split_params": "fs.split_params([('params', {})])",
    "merge_state": "fs.merge_state({'w': 1.0}, [])",
    "with_mutable": "fs.with_mutable(nn.Dense(1), capture=3)",
    "with_rngs": "fs.with_rngs('apply')",
    "rng_state": "fs.rng_state(dropout='key')",
    "vmap_stateful": "fs.vmap_stateful(fn, axis_size='8')",
    "settle_state": "fs.settle_state(3, {}, {})",
    "init_carry": "fs.init_carry({'w': jnp.ones(2)}, [], tx)",
    "value_and_grad": "fs.value_and_grad(loss_fn, has_aux='no')",
    "apply_gradients": "fs.apply_gradients(tx, {}, {}, {})",
    "with_optimizer": "fs.with_optimizer(loss_fn, tx, has_aux='no')",
    "skip_nonfinite": "fs.skip_nonfinite(step, moving=3)",
    "with_ema": "fs.with_ema('step', decay=0.9)",
    "scan_steps": "fs.scan_steps(step, unroll='2')",
    "stack_batches": "fs.stack_batches(3, 2)",
    "jit_step": "fs.jit_step(step, donate='yes')",
    "adopt_carry": "fs.adopt_carry('carry', {'w': jnp.ones(())})",
    "explain_step": "fs.explain_step(3, jnp.ones(2), jnp.ones(2))",
    "assert_max_traces": "fs.assert_max_traces(step, '1')",
    "from_nnx": "fs.from_nnx(linear, method=3)",
    "to_nnx": "fs.to_nnx(linear, {}, [])",
}
RIGHT = {
    "split_params": "fs.split_params({'params': {'w': jnp.ones(2)}}, trainable=['w', lambda path, leaf: True])",
    "merge_state": "fs.merge_state({'w': 1.0}, {})",
    "with_mutable": "fs.with_mutable(nn.Dense(1), capture=['intermediates'])",
    "with_rngs": "fs.with_rngs(functools.partial(fn))",
    "rng_state": "fs.rng_state(dropout=jax.random.key(0), legacy=jax.random.PRNGKey(0))",
    "vmap_stateful": "fs.vmap_stateful(fn, axis_size=8, in_axes=(0, None))",
    "settle_state": "fs.settle_state(fn, {}, {}, jnp.ones(2))",
    "init_carry": "fs.init_carry({'w': jnp.ones(2)}, {}, tx)",
    "value_and_grad": "fs.value_and_grad(loss_fn, axis_name=('a', 'b'))",
    "apply_gradients": "fs.apply_gradients(tx, fs.init_carry({}, {}, tx), {}, {}, value=0.0)",
    "with_optimizer": "fs.with_optimizer(jax.jit(loss_fn), tx, axis_name='batch')",
    "skip_nonfinite": "fs.skip_nonfinite(step, moving=['step'])",
    "with_ema": "fs.with_ema(step, decay=lambda count: 0.9)",
    "scan_steps": "fs.scan_steps(jax.jit(step), unroll=2)",
    "stack_batches": "list(fs.stack_batches(iter([jnp.ones(2)]), 2))",
    "jit_step": "fs.jit_step(step, donate=False)",
    "adopt_carry": "fs.adopt_carry({'w': 1.0}, {'w': jnp.ones(())})",
    "explain_step": "fs.explain_step(jax.jit(step), {'w': jnp.ones(2)}, 3)",
    "assert_max_traces": "fs.assert_max_traces(nn.Dense(1), 2)",
    "from_nnx": "fs.from_nnx(linear, method=nnx.Linear.__call__, trainable='kernel')",
    "to_nnx": "fs.to_nnx(linear, *fs.from_nnx(linear)[1:])",
}
# What runs, although the types say less: a checkpoint gives the count back as a number, a transformation is whatever
# has the two methods, and keys may be abstract.
LOOSE = {
    "an int as count": "fs.apply_gradients(tx, carry._replace(step=0), {}, {})",
    "a NumPy count": "fs.apply_gradients(tx, carry._replace(step=np.int32(0)), {}, {})",
    "a NumPy array as count": "fs.apply_gradients(tx, carry._replace(step=np.zeros((), int)), {}, {})",
    "an optimizer of one's own": "fs.init_carry({}, {}, types.SimpleNamespace(init=tx.init, update=tx.update))",
    "MultiSteps": "fs.init_carry({}, {}, optax.MultiSteps(tx, 2))",
    "an abstract key": "fs.rng_state(dropout=jax.eval_shape(lambda: jax.random.key(0)))",
    "a NumPy key": "fs.rng_state(dropout=np.asarray(jax.random.PRNGKey(0)))",
    "a set of names": "fs.with_mutable(nn.Dense(1), capture={'intermediates'})",
    "a whole decay": "fs.with_ema(step, decay=0)",
    "frozen params": "fs.settle_state(fn, core.freeze({'w': jnp.ones(2)}), core.freeze({}), jnp.ones(2))",
    "abstract params": "fs.split_params({'params': {'w': jax.ShapeDtypeStruct((2,), 'float32')}})",
    "a list of params": "fs.init_carry([jnp.ones(2)], {}, tx)",
    "params of lookahead": "fs.init_carry(optax.LookaheadParams.init_synced({'w': jnp.ones(2)}), {}, tx)",
    "a list as a carry": "fs.jit_step(step)([jnp.ones(2)], 3)",
}
CODE = """
import functools, json, sys
import types
import flax.linen as nn, jax, jax.numpy as jnp, jaxtyping, numpy as np, optax
import flaxsplit as fs
from flax import core, nnx
linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
tx = optax.sgd(0.1)
carry = fs.init_carry({}, {}, tx)
def fn(params, state, x): return x, state
def loss_fn(params, state, batch): return jnp.float32(0), state
def step(carry, batch): return carry, batch
found, rejected = {}, set()
for name, call in json.load(sys.stdin).items():
    try:
        eval(call)
    except Exception as error:
        found[name] = type(error).__name__
        while error is not None:  # where ours comes out, the checker's is what it was raised for
            rejected.add(name) if isinstance(error, jaxtyping.TypeCheckError) else None
            error = error.__context__
print(json.dumps([found, sorted(rejected)]))
"""


def errors_of(calls: dict[str, str], checker: str) -> Any:
    """The class of error that each call ends in, and what the checker rejected, in a process of its own."""
    environment = os.environ | {"FLAXSPLIT_TYPECHECKER": checker}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, input=json.dumps(calls), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("checker", ["typeguard", "beartype"])
def test_a_wrong_argument_to_every_public_function_is_rejected(checker: str) -> None:
    errors, rejected = errors_of(WRONG, checker)
    assert rejected == sorted(WRONG.keys() - {"adopt_carry"})  # takes anything, and says itself what cannot be adopted
    ours = {"CollectionError", "SignatureError"}  # these come out where there is one: they name the leaf
    alone = {name: error for name, error in errors.items() if error not in ours}
    assert alone == dict.fromkeys(["jit_step", "value_and_grad", "with_optimizer"], "TypeCheckError")


@pytest.mark.parametrize("checker", ["", "typeguard", "beartype"])
def test_right_arguments_are_not_rejected(checker: str) -> None:
    assert errors_of(RIGHT, checker) == [{}, []]


@pytest.mark.parametrize("checker", ["", "typeguard", "beartype"])
def test_what_runs_unchecked_runs_checked(checker: str) -> None:
    assert errors_of(LOOSE, checker) == [{}, []]


def test_without_a_checker_nothing_checks_types() -> None:
    assert errors_of(WRONG, "")[1] == []


def test_a_checker_that_is_none_is_said() -> None:
    environment = os.environ | {"FLAXSPLIT_TYPECHECKER": "yes"}
    code = "import flaxsplit"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    expected = "FLAXSPLIT_TYPECHECKER: typeguard, beartype, or a path such as package.decorator; got 'yes'"
    assert done.stderr.splitlines()[-1] == f"ImportError: {expected}"


def test_every_public_function_is_in_the_tables() -> None:
    functions = {name for name, _ in inspect.getmembers(fs, inspect.isfunction) if name[0] != "_"}
    assert functions - RIGHT.keys() == {"compile_log"}  # takes no argument
    assert functions - WRONG.keys() == {"compile_log"}


@pytest.mark.skipif(bool(_checks.TYPECHECKER), reason="says what holds without a checker")
def test_off_means_that_nothing_is_wrapped() -> None:
    assert _checks.checked(len) is len
    assert not hasattr(fs.split_params, "__wrapped__")
    assert not hasattr(fs.with_optimizer, "__wrapped__")


def test_a_checked_function_keeps_its_name_its_words_and_its_signature() -> None:
    code = "import inspect, flaxsplit as fs; f = fs.jit_step; "
    code += "print(f.__name__, f.__doc__[:8], *inspect.signature(f).parameters)"
    environment = os.environ | {"FLAXSPLIT_TYPECHECKER": "typeguard"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["jit_step", "Compiles", "step", "like", "batch", "donate"]
    assert _checks.typechecked(errors_of).__name__ == "errors_of"


def test_an_error_that_is_none_of_ours_leaves_the_checkers_word() -> None:
    def breaks(error: Exception) -> None:
        raise error

    raise_ours: Any = vars(_checks)["_raise_ours"]
    raise_ours(breaks, (ZeroDivisionError(),), {})
    ours = fs.SignatureError("f(x)", "x must be 1", ["x: 2"], "it is 2", "f(1)")
    with pytest.raises(fs.SignatureError):
        raise_ours(breaks, (ours,), {})
