"""`vmap_stateful` beside the batched model (its law is in test_laws): axes, keys, ensembles, nesting."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxsplit as fs

from .models import MLP, Dropping, X, structure

KEY = jax.random.key(0)


def dropping(order: str) -> Any:
    """Stacks rngs and vmap in either order."""
    apply = fs.with_mutable(Dropping())
    return fs.with_rngs(fs.vmap_stateful(apply)) if order == "outside" else fs.vmap_stateful(fs.with_rngs(apply))


def start(key: jax.Array = KEY) -> tuple[Any, Any]:
    """Params and state of `Dropping`, with a dropout stream."""
    params, state = fs.split_params(Dropping().init(KEY, X[0], train=False))
    return params, state | fs.rng_state(dropout=key)


@pytest.mark.parametrize("order", ["outside", "inside"])
@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "legacy"])
def test_dropout_differs_per_example_and_per_step_and_is_reproducible(order: str, key: jax.Array) -> None:
    apply = dropping(order)
    params, state = start(key)
    same = jnp.tile(X[:1], (32, 1))  # equal examples: whatever differs, differs by its mask
    first, state_1 = apply(params, state, same)
    second, state_2 = apply(params, state_1, same)
    again, _ = apply(params, state, same)
    assert len(np.unique(np.asarray(first), axis=0)) > 16
    assert (first != second).any()
    np.testing.assert_array_equal(first, again)
    keys = (
        [jax.random.key_data(s["rngs"]["dropout"]) for s in (state, state_1, state_2)]
        if order == "typed"
        else [
            np.asarray(
                jax.random.key_data(s["rngs"]["dropout"])
                if jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
                else s["rngs"]["dropout"]
            )
            for s in (state, state_1, state_2)
        ]
    )
    assert len({k.tobytes() for k in map(np.asarray, keys)}) == 3
    assert state_1["rngs"]["dropout"].shape == key.shape


def test_both_orders_of_rngs_and_vmap_have_one_law() -> None:
    params, state = start()
    for apply in (dropping("outside"), dropping("inside")):
        assert structure(apply(params, state, X)[1]) == structure(state)


def test_keys_that_nothing_draws_from_pass_through() -> None:
    params, state = start()
    _, new_state = fs.vmap_stateful(fs.with_mutable(Dropping(), mutable=False))(params, state, X, train=False)
    assert new_state["rngs"]["dropout"] is state["rngs"]["dropout"]


@pytest.mark.parametrize(("split", "least", "most"), [(False, 1, 1), ({"dropout": False}, 1, 1), (True, 17, 32)])
def test_keys_may_be_shared(split: Any, least: int, most: int) -> None:
    masked = fs.with_mutable(nn.Dropout(0.5, deterministic=False))
    apply: Any = fs.with_rngs(fs.vmap_stateful(masked, split_rngs=split))
    out, _ = apply({}, fs.rng_state(dropout=KEY), jnp.ones((32, 16)))
    assert least <= len(np.unique(np.asarray(out), axis=0)) <= most


def test_an_ensemble_has_params_and_state_per_member() -> None:
    model = MLP(axis_name=None)
    variables = jax.vmap(lambda key: model.init(key, X))(jax.random.split(KEY, 4))
    params, state = fs.split_params(variables)
    apply = fs.vmap_stateful(
        fs.with_mutable(model), in_axes=None, params_axes=0, state_axes={"batch_stats": 0}, axis_name="member"
    )
    out, new_state = apply(params, state, X, train=True)
    assert out.shape == (4, 32, 1)
    for i in range(4):
        one_params, one_state = jax.tree.map(lambda leaf, i=i: leaf[i], (params, state))
        expected, expected_state = fs.with_mutable(model)(one_params, one_state, X, train=True)
        np.testing.assert_allclose(out[i], expected, rtol=1e-5, atol=1e-6)
        jax.tree.map(
            lambda new, old, i=i: np.testing.assert_allclose(new[i], old, rtol=1e-5, atol=1e-6),
            new_state,
            expected_state,
        )


def test_axes_of_arguments_and_outputs() -> None:
    def fn(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        return (x + y, x * params["w"]), state

    params = {"w": jnp.float32(2)}
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones(2)
    (added, scaled), state = fs.vmap_stateful(fn, in_axes=(1, None), out_axes=(0, 1))(params, {}, x, y)
    np.testing.assert_array_equal(added, x.T + 1)
    np.testing.assert_array_equal(scaled, x * 2)
    assert state == {}
    out, _ = fs.vmap_stateful(lambda p, s, tree: (tree["a"] + tree["b"], s), in_axes=({"a": 0, "b": None},))(
        {}, {}, {"a": jnp.arange(3), "b": jnp.ones(2)}
    )
    assert out.shape == (3, 2)
    out, _ = fs.vmap_stateful(lambda p, s: (jax.lax.axis_index("batch"), s), axis_size=5)({}, {})
    np.testing.assert_array_equal(out, jnp.arange(5))


def test_two_axes_with_two_names() -> None:
    model = nn.BatchNorm(use_running_average=False, axis_name=("outer", "inner"))
    x = jax.random.normal(KEY, (4, 8, 3))
    params, state = fs.split_params(nn.BatchNorm(use_running_average=False).init(KEY, x[0, 0]))
    apply = fs.vmap_stateful(fs.vmap_stateful(fs.with_mutable(model), axis_name="inner"), axis_name="outer")
    out, new_state = apply(params, state, x)
    flat = nn.BatchNorm(use_running_average=False)
    expected, expected_state = fs.with_mutable(flat)(params, state, x.reshape(32, 3))
    np.testing.assert_allclose(out.reshape(32, 3), expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new_state, expected_state)


def test_keyword_arguments_are_not_mapped() -> None:
    def fn(params: Any, state: Any, x: jax.Array, *, table: Any) -> tuple[jax.Array, Any]:
        return table[x], state

    out, _ = fs.vmap_stateful(fn)({}, {}, jnp.array([0, 2]), table=jnp.arange(3) * 10)
    np.testing.assert_array_equal(out, [0, 20])
