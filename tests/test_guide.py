"""The two examples of Flax's guide on managing params and state, against the guide's own loop, jitted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import core

import flaxsplit as fs

from .flags import ONCE, needs_promotion, needs_x32
from .models import MLP, BiasAdder, X, Y, structure

STEPS = 20


def assert_equal(left: Any, right: Any) -> None:
    """Compares two trees bit for bit."""
    assert structure(left) == structure(right)
    assert len(jax.tree.leaves(left)) > 0
    jax.tree.map(np.testing.assert_array_equal, left, right)


@needs_promotion
def test_bias_adder_equals_the_guides_loop() -> None:
    model, x = BiasAdder(), jnp.ones((10, 5))
    variables = model.init(jax.random.key(0), x)
    tx = optax.sgd(learning_rate=0.02)

    # the guide's loop, with its update step jitted
    state, params = core.pop(variables, "params")
    opt_state = tx.init(params)

    @jax.jit
    def update_step(x: jax.Array, opt_state: Any, params: Any, state: Any) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            y, updated = model.apply({"params": params, **state}, x, mutable=list(state.keys()))
            return ((x - y) ** 2).sum(), updated

        (_, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return opt_state, optax.apply_updates(params, updates), state

    with fs.compile_log() as theirs:
        for i in range(STEPS):
            opt_state, params, state = update_step(x * i, opt_state, params, state)

    # the same with flaxsplit
    apply = fs.with_mutable(model)

    def loss_fn(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, state = apply(params, state, x)
        return ((x - y) ** 2).sum(), state

    start, start_state = fs.split_params(variables)
    settled = fs.settle_state(apply, start, start_state, x)
    carry = fs.init_carry(start, settled, tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    with fs.compile_log() as ours:
        for i in range(STEPS):
            carry, _ = step(carry, x * i)

    assert_equal(carry.params, params)
    assert_equal(carry.state, state)
    assert carry.state["batch_stats"]["mean"].shape == (1, 5)
    # the guide's state grows from f32[5] to f32[1,5] at the first update, and the step compiles for both
    assert (theirs.compiles["update_step"], ours.compiles["loss_fn"]) == (2 * ONCE, ONCE)


@needs_x32
def test_vmapped_mlp_equals_the_guides_loop() -> None:
    model = MLP(hidden_size=10, out_size=1)
    variables = model.init(jax.random.key(0), X[0])
    tx = optax.sgd(learning_rate=0.02)

    # the guide's loop, with train=True where the guide forgets it, and jitted
    state, params = core.pop(variables, "params")
    opt_state = tx.init(params)

    @jax.jit
    def update_step(opt_state: Any, params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            def one(x: jax.Array) -> Any:
                return model.apply({"params": params, **state}, x, train=True, mutable=list(state.keys()))

            pred, updated = jax.vmap(one, out_axes=(0, None), axis_name="batch")(x)
            return optax.l2_loss(pred, y).mean(), updated

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return opt_state, optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(STEPS):
        opt_state, params, state, value = update_step(opt_state, params, state, X, Y)
        losses.append(value)

    apply = fs.vmap_stateful(fs.with_mutable(model), axis_name="batch")

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        x, y = batch
        pred, state = apply(params, state, x, train=True)
        return optax.l2_loss(pred, y).mean(), state

    carry = fs.init_carry(*fs.split_params(variables), tx)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_fn, tx)))
    ours = []
    for _ in range(STEPS):
        carry, value = step(carry, (X, Y))
        ours.append(value)

    assert_equal(carry.params, params)
    assert_equal(carry.state, state)
    assert_equal(ours, losses)
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), carry.state, fs.split_params(variables)[1])
    assert all(jax.tree.leaves(moved))


def test_the_guides_forgotten_train_flag_is_said_aloud() -> None:
    model = MLP()
    params, state = fs.split_params(model.init(jax.random.key(0), X[0]))
    apply = fs.vmap_stateful(fs.with_mutable(model), axis_name="batch")
    with np.testing.assert_raises(fs.UntouchedStateWarning):  # warnings are errors in these tests
        apply(params, state, X)
    assert apply(params, state, X, train=True)[0].shape == (32, 1)
