"""What batch statistics mean under shard_map, and making a carry that no device could hold straight into its shards."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from .flags import needs_jit
from .meshes import KINDS, line
from .models import MLP, X, Y

pytestmark = needs_jit
TX = optax.adam(1e-2)
KEY = jax.random.key(0)


@KINDS
def test_abstract_initialisation_goes_straight_into_shards(kind: AxisType) -> None:
    wide = nn.Sequential([nn.Dense(1024), nn.relu, nn.Dense(1024)])

    def init(key: jax.Array) -> fs.Carry:
        params, state = fs.split_params(wide.init(key, jnp.zeros((1, 512))))
        return fs.init_carry(params, state | {"ema": params} | fs.rng_state(dropout=key), TX)

    abstract = jax.eval_shape(init, KEY)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    shardings = jax.tree.map(lambda leaf: NamedSharding(line(kind), P("data") if leaf.ndim else P()), abstract)
    compiled = jax.jit(init, out_shardings=shardings).lower(KEY).compile()
    memory: Any = compiled.memory_analysis()
    # a device makes its eighth of everything, and needs room for no more than that beside it
    assert memory.output_size_in_bytes < whole / 8 * 1.01
    assert memory.temp_size_in_bytes < whole / 8
    carry = compiled(KEY)
    assert [leaf.sharding for leaf in jax.tree.leaves(carry)] == jax.tree.leaves(shardings)
    for ours, expected in zip(jax.tree.leaves(carry), jax.tree.leaves(init(KEY)), strict=True):
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)


@KINDS
def test_zero_1_splits_the_moments_alone(kind: AxisType) -> None:
    mesh = line(kind, 2)
    everywhere, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return optax.l2_loss(jnp.tanh(batch[0] @ params["a"]) @ params["b"], batch[1]).mean(), state

    params = {"a": jnp.full((10, 64), 0.01), "b": jnp.full((64, 1), 0.01)}
    single, whole = (fs.init_carry(params, {}, TX, sharding=place) for place in (None, everywhere))
    places = jax.tree.map(lambda leaf: cut if leaf.ndim else everywhere, whole.opt_state)
    carry = whole._replace(opt_state=jax.device_put(whole.opt_state, places))
    step: Any = fs.with_optimizer(loss_fn, TX)
    jitted = fs.jit_step(fs.assert_max_traces(step), like=carry, batch=cut)
    for _ in range(5):
        carry, loss = jitted(carry, (X, Y))
        single, expected = jax.jit(step)(single, (X, Y))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for moments in (carry.opt_state[0].mu, carry.opt_state[0].nu):
        assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(moments)} == {5, 32}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(carry.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), carry.params, single.params)


def step_of(norm_axis: Any, mapped: bool, **options: Any) -> Any:
    """A step over the guide's MLP, of a batch or of one example."""
    apply: Any = fs.with_mutable(MLP(axis_name=norm_axis))
    apply = fs.vmap_stateful(apply, axis_name="batch") if mapped else apply

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        pred, state = apply(params, state, batch[0], train=True)
        return optax.l2_loss(pred, batch[1]).mean(), state

    return fs.with_optimizer(loss_fn, TX, **options)


def start() -> fs.Carry:
    """The carry of step 0."""
    return fs.init_carry(*fs.split_params(MLP(axis_name=None).init(KEY, X)), TX)


def statistics(axis_name: Any, mapped: bool, kind: AxisType, microbatches: int = 1, **options: Any) -> list[Any]:
    """The running mean that each of eight devices holds after one step under shard_map."""
    step = step_of(axis_name, mapped, axis_name="data", microbatches=microbatches)
    mesh = line(kind)
    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()), **options)
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    carry, _ = jax.jit(step)(jax.device_put(start(), NamedSharding(mesh, P())), batch)
    mean = carry.state["batch_stats"]["BatchNorm_0"]["mean"]
    return [np.asarray(shard.data) for shard in mean.addressable_shards]


@KINDS
@pytest.mark.parametrize(("axis_name", "mapped"), [("data", False), (("data", "batch"), True)])
def test_synced_by_name_the_statistics_are_those_of_the_global_batch(
    axis_name: Any, mapped: bool, kind: AxisType
) -> None:
    single, _ = jax.jit(step_of(None, False))(start(), (X, Y))
    expected = single.state["batch_stats"]["BatchNorm_0"]["mean"]
    for each in statistics(axis_name, mapped, kind, check_vma=not mapped):
        np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)


@KINDS
@pytest.mark.parametrize("microbatches", [1, 2])
def test_not_synced_over_the_mesh_the_leaf_is_named(microbatches: int, kind: AxisType) -> None:
    with pytest.raises(fs.UnsyncedStateError) as caught:
        statistics(None, False, kind, microbatches)
    assert str(caught.value) == (
        "value_and_grad(axis_name=...): state must come out the same on every device of the axis 'data'\n"
        "  got:\n"
        "    state['batch_stats']['BatchNorm_0']['mean']: differs per device\n"
        "    state['batch_stats']['BatchNorm_0']['var']: differs per device\n"
        "  likely cause: a layer that updates its state has no axis_name, or lacks this one\n"
        "  fix: nn.BatchNorm(..., axis_name='data'); or jax.lax.pmean(leaf, 'data') in loss_fn"
    )


@KINDS
def test_params_that_are_each_devices_own_stay_so(kind: AxisType) -> None:
    mesh = line(kind)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return (params["w"] * batch).mean(), state

    tx = optax.sgd(0.1)
    step = fs.with_optimizer(loss_fn, tx, axis_name="data")

    def trained(params: Any, batch: Any) -> Any:
        return step(fs.Carry(jnp.zeros((), jnp.int32), params, {}, tx.init(params)), batch)[0].params

    each = jax.shard_map(trained, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    row = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    ours = jax.jit(each)({"w": row}, row)["w"]
    np.testing.assert_allclose(ours, jnp.arange(8.0) - 0.35, rtol=1e-6)


@KINDS
@pytest.mark.parametrize(("axis_name", "mapped"), [(None, False), ("batch", True)])
def test_with_the_check_of_jax_off_each_device_has_its_own(axis_name: Any, mapped: bool, kind: AxisType) -> None:
    # which a name of vmap's inside needs: JAX marks what varies along mesh axes only
    means = statistics(axis_name, mapped, kind, check_vma=False)
    assert len({each.tobytes() for each in means}) == 8  # one array, says its sharding


@KINDS
def test_not_synced_over_vmap_the_leaf_is_named(kind: AxisType) -> None:
    with pytest.raises(fs.UnsyncedStateError, match=r"state\['batch_stats'\]\['BatchNorm_0'\]\['mean'\]: differs"):
        statistics("data", True, kind)
