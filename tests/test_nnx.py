"""NNX modules trained through flaxsplit against NNX's own loop, and what from_nnx and to_nnx promise."""

import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flaxsplit as fs

from . import nnx_models as m

STEPS = 20
ADAM = optax.adam(1e-2)
OPTIMIZERS = {
    "sgd": optax.sgd(0.05, momentum=0.9),
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "schedule": optax.adam(optax.cosine_decay_schedule(1e-2, STEPS)),
}


def leaves_of(model: nnx.Module) -> dict[str, Any]:
    """The arrays of a module by path, keys as numbers."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    return {jax.tree_util.keystr(path): numbers(leaf) for path, leaf in pairs}


def numbers(leaf: Any) -> Any:
    typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed else leaf)


def assert_equal(left: Any, right: Any) -> None:
    """Compares two trees bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    assert jax.tree.leaves(left)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def loss_fn_of(fn: Any) -> Any:
    def loss_fn(params, state, x):
        out, state = fn(params, state, x)
        return m.loss_of(out), state

    return loss_fn


def trained(make: Any, x: Any, tx: Any, wrt: Any) -> tuple[nnx.Module, Any, Any]:
    """Trains through flaxsplit, counting traces and compiles; writes back into a module of another seed."""
    fn, params, state = fs.from_nnx(make(rngs=m.rngs()), trainable=wrt)
    loss_fn = loss_fn_of(fn)
    grads = jax.jit(jax.grad(loss_fn, has_aux=True))(params, state, x)[0]
    carry = fs.init_carry(params, state, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    losses = []
    with fs.compile_log() as log:
        for _ in range(STEPS):
            carry, loss = step(carry, x)
            losses.append(loss)
    assert (log.traces["loss_fn"], log.compiles["loss_fn"]) == (1, 1), str(log)
    return fs.to_nnx(make(rngs=m.rngs(7)), carry.params, carry.state), losses, grads


def assert_as_nnx(name: str, tx: Any) -> None:
    make, x, wrt = m.MODELS[name]
    theirs = make(rngs=m.rngs())
    before = leaves_of(theirs)
    losses, grads = m.train(theirs, x, tx, wrt, STEPS)
    model, our_losses, our_grads = trained(make, x, tx, wrt)
    assert_equal(our_losses, losses)
    assert losses[-1] < losses[0]
    assert_equal(leaves_of(model), leaves_of(theirs))
    assert any((before[path] != leaf).any() for path, leaf in leaves_of(model).items())
    assert_equal(jax.tree.leaves(our_grads), jax.tree.leaves(grads))


@pytest.mark.parametrize("name", m.MODELS)
def test_training_equals_nnx_bit_for_bit(name):
    assert_as_nnx(name, ADAM)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["MLP", "Block"])
def test_with_any_optimizer(name, optimizer):
    assert_as_nnx(name, OPTIMIZERS[optimizer])
