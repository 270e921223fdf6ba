"""Every combinator as it is on `jax.make_mesh`, whose axes are Explicit: nothing of the program says `auto_axes`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flaxsplit as fs

from .flags import needs_jit
from .meshes import EXPLICIT, line, on
from .models import X, Y

pytestmark = [
    needs_jit,
    pytest.mark.skipif(jax.__version_info__ < (0, 7), reason="jax-ml/jax#29839: vmap draws on no Explicit axis"),
]
MESH = line(EXPLICIT, 2)
EVERYWHERE, CUT = on(MESH), on(MESH, "data")
TX, KEY = optax.adam(1e-2), jax.random.key(0)


class Net(nn.Module):
    """Dropout of one example, where there is a rate."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(1)(nn.Dropout(self.rate, deterministic=not self.rate)(x))


class NNXNet(nnx.Module):
    """Batch statistics of the whole batch."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm, self.head = nnx.BatchNorm(10, rngs=rngs), nnx.Linear(10, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(x))


def loss_of(apply: Any) -> Any:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, state = apply(params, state, batch[0])
        return optax.l2_loss(out, batch[1]).mean(), state

    return loss_fn


def carry_of(rate: float = 0.0, **state: Any) -> fs.Carry:
    params, rest = fs.split_params(Net(rate).init(KEY, X))
    return fs.init_carry(params, rest | state, TX)


def dropping(step_of: Callable[[Any], Any], **state: Any) -> tuple[Any, fs.Carry]:
    apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(Net(0.5))))
    return step_of(loss_of(apply)), carry_of(0.5, **fs.rng_state(dropout=KEY), **state)


def averaged() -> tuple[Any, fs.Carry]:
    step = fs.with_ema(fs.with_optimizer(loss_of(fs.with_mutable(Net())), TX), decay=0.9, every=2)
    return step, carry_of(ema=carry_of().params)


def per_example() -> tuple[Any, fs.Carry]:
    grads_of = fs.vmap_stateful(fs.value_and_grad(loss_of(fs.with_mutable(Net()))))

    def step(carry: fs.Carry, batch: Any) -> tuple[fs.Carry, jax.Array]:
        (losses, grads), state = grads_of(carry.params, carry.state, batch)
        clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -0.1, 0.1).mean(0), grads)
        return fs.apply_gradients(TX, carry, clipped, state), losses.mean()

    return step, carry_of()


def settled() -> tuple[Any, fs.Carry]:
    """A state that grows an axis at its first update."""

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        mean = 0.9 * state["stats"]["mean"] + 0.1 * batch[0].mean(0, keepdims=True)
        return optax.l2_loss((batch[0] - mean) @ params["w"], batch[1]).mean(), {"stats": {"mean": mean}}

    params, state = {"w": jnp.ones((10, 1))}, {"stats": {"mean": jnp.zeros(10)}}
    state = fs.settle_state(loss_fn, params, state, (X, Y))
    return fs.with_optimizer(loss_fn, TX), fs.init_carry(params, state, TX)


def of_nnx() -> tuple[Any, fs.Carry]:
    fn, params, state = fs.from_nnx(NNXNet(nnx.Rngs(0)))
    return fs.with_optimizer(loss_of(fn), TX), fs.init_carry(params, state, TX)


STEPS: dict[str, Callable[[], tuple[Any, fs.Carry]]] = {
    "with_rngs(vmap_stateful)": lambda: dropping(lambda loss_fn: fs.with_optimizer(loss_fn, TX)),
    "microbatches": lambda: dropping(lambda loss_fn: fs.with_optimizer(loss_fn, TX, microbatches=4)),
    "skip_nonfinite": lambda: dropping(lambda loss_fn: fs.skip_nonfinite(fs.with_optimizer(loss_fn, TX))),
    "with_ema": averaged,
    "per-example gradients": per_example,
    "settle_state": settled,
    "from_nnx": of_nnx,
}


@pytest.mark.parametrize("way", ["step", "scan_steps"])
@pytest.mark.parametrize("name", STEPS)
def test_it_equals_one_device_and_compiles_once(name: str, way: str) -> None:
    step, single = STEPS[name]()
    batch, cut = (X, Y), CUT
    if way == "scan_steps":
        batch, cut = (jnp.stack([X] * 2), jnp.stack([Y] * 2)), on(MESH, None, "data")
        step = fs.scan_steps(step)
    sharded = fs.adopt_carry(single, jax.tree.map(lambda leaf: _like(leaf), single))
    assert {leaf.sharding for leaf in jax.tree.leaves(sharded)} == {EVERYWHERE}
    on_mesh: Any = fs.jit_step(fs.assert_max_traces(step), like=sharded, batch=cut)
    alone: Any = fs.jit_step(step)
    loss: Any = None
    compiles = []
    host = jax.tree.map(np.asarray, batch)
    for _ in range(20):
        with fs.compile_log() as log:
            sharded, loss = on_mesh(sharded, host)
        compiles.append(log.compiles[step.__name__])
        single, expected = alone(single, batch)
        np.testing.assert_allclose(loss, expected, rtol=2e-3, atol=1e-6)
    assert compiles == [1] + 19 * [0]


def _like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=EVERYWHERE)


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0)], ids=["typed", "legacy"])
@pytest.mark.parametrize("where", ["traced", "eager"])
@pytest.mark.parametrize("axis", [0, -2])
def test_lanes_draw_what_they_draw_on_one_device(key: jax.Array, where: str, axis: int) -> None:
    apply: Any = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(nn.Dropout(0.5, deterministic=False)), in_axes=axis))
    state, x = fs.rng_state(dropout=key), jnp.ones((8, 16))
    expected, _ = apply({}, state, x)
    run = jax.jit(apply) if where == "traced" else apply
    out, new_state = run({}, jax.device_put(state, EVERYWHERE), jax.device_put(x, CUT))
    np.testing.assert_array_equal(out, expected)
    assert out.sharding.is_equivalent_to(CUT, 2)
    assert new_state["rngs"]["dropout"].sharding.is_fully_replicated


def test_params_that_lie_on_no_mesh_come_back_whole() -> None:
    """Their gradients lie on one."""

    @jax.jit
    def step(grads: Any) -> fs.Carry:
        params = {"w": jnp.ones(8)}
        carry = fs.Carry(jnp.int32(0), params, dict[str, Any](), TX.init(params))
        return fs.apply_gradients(TX, carry, {"w": grads}, {})

    new = step(jax.device_put(jnp.ones(8), CUT)).params["w"]
    assert new.sharding.is_fully_replicated


@pytest.mark.parametrize("split", [True, False], ids=["split -> whole", "whole -> split"])
def test_state_comes_back_to_where_it_lay(split: bool) -> None:
    places = (CUT, EVERYWHERE) if split else (EVERYWHERE, CUT)
    state = {"stats": {"mean": jax.device_put(jnp.zeros(10), places[0])}}
    shard: Any = jax.sharding

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        mean = shard.reshard(state["stats"]["mean"], places[1]) + 1.0
        return params["w"] * batch.mean(), {"stats": {"mean": mean}}

    carry = fs.init_carry({"w": jnp.ones(())}, state, TX, sharding=EVERYWHERE)
    step = fs.with_optimizer(loss_fn, TX, microbatches=2)
    moved, _ = jax.jit(fs.scan_steps(step))(carry, jax.device_put(jnp.ones((3, 8)), EVERYWHERE))
    mean = moved.state["stats"]["mean"]
    assert mean.sharding.is_equivalent_to(places[0], 1)
    np.testing.assert_array_equal(mean, np.full(10, 6.0))
