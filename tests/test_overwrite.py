"""A collection whose gradient is its next state: the scales and amax histories of Flax's fp8 layers."""

import textwrap
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs

from .flags import needs_jit, needs_x32
from .meshes import KINDS, line

pytestmark = [needs_jit, needs_x32]
NAME = "_overwrite_with_gradient"
X = jax.random.normal(jax.random.key(0), (32, 16))
Y = jax.random.normal(jax.random.key(1), (32, 16))
TX = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))


class Net(nn.Module):
    """Two fp8 layers, with a BatchNorm between them where that is asked for."""

    norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, 16]` to `[batch, 16]`."""
        x = nn.Dense(32, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x)
        x = nn.BatchNorm(use_running_average=False)(x) if self.norm else x
        return nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(nn.relu(x))


class State(TrainState):
    """Flax's own, with batch statistics."""

    batch_stats: Any = None


def loss_of(model: Net) -> Any:
    """The loss function."""
    apply = fs.with_mutable(model)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        out, state = apply(params, state, batch[0])
        return ((out - batch[1]) ** 2).mean(), state

    return loss_fn


def flax_step(model: Net) -> Any:
    """As in Flax's guide on fp8: the collection lies among what is differentiated, `apply_gradients` overwrites it."""

    @jax.jit
    def step(state: State, batch: Any) -> tuple[State, Any]:
        def loss(variables: Any) -> Any:
            out, updated = model.apply(
                {**variables, "batch_stats": state.batch_stats}, batch[0], mutable=["batch_stats"]
            )
            return ((out - batch[1]) ** 2).mean(), dict(updated).get("batch_stats", {})

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=statistics), value

    return step


def start(model: Net) -> tuple[State, Any, Any]:
    """Flax's state; params and state of ours."""
    variables = model.init(jax.random.key(2), X)
    learned = {name: variables[name] for name in ("params", NAME)}
    theirs = State.create(apply_fn=model.apply, params=learned, tx=TX, batch_stats=variables.get("batch_stats", {}))
    return theirs, *fs.split_params(variables)


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compares two trees bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("norm", [False, True], ids=["alone", "beside BatchNorm"])
@pytest.mark.parametrize("scan", [False, True], ids=["step", "scan"])
def test_law_9_a_step_equals_flaxs_train_state_bit_for_bit(norm: bool, scan: bool) -> None:
    model = Net(norm)
    theirs, params, state = start(model)
    carry = fs.init_carry(params, state | {"ema": params}, TX)
    step = fs.assert_max_traces(fs.with_ema(fs.with_optimizer(loss_of(model), TX), decay=0.9))
    many = fs.jit_step(fs.scan_steps(step) if scan else step)
    flax, losses = flax_step(model), []
    for _ in range(100):
        theirs, expected = flax(theirs, (X, Y))
        losses.append(expected)
    if scan:
        carry, found = many(carry, jax.tree.map(lambda leaf: jnp.stack([leaf] * 100), (X, Y)))
        rtol = 2e-7 if jax.__version_info__ >= (0, 7) else 4e-7
        np.testing.assert_allclose(found, jnp.stack(losses), rtol=rtol)  # a mean is fused otherwise inside a loop
    else:
        for expected in losses:
            carry, loss = many(carry, (X, Y))
            assert_equal(loss, expected)
    assert_equal(carry.params, theirs.params["params"])
    assert_equal(carry.state[NAME], theirs.params[NAME])
    assert_equal(carry.state.get("batch_stats", {}), theirs.batch_stats)
    assert_equal(carry.opt_state, theirs.opt_state)


def amax(state: Any) -> dict[str, float]:
    """The newest entry of each amax history of inputs and kernels."""
    found = jax.tree_util.tree_flatten_with_path(state[NAME])[0]
    named = {jax.tree_util.keystr(path): float(leaf[0]) for path, leaf in found}
    return {name: value for name, value in named.items() if "amax" in name and "output_grad" not in name}


@pytest.mark.parametrize("count", [2, 4, 8])
def test_microbatches_see_the_amax_of_the_whole_batch(count: int) -> None:
    model = Net()
    _, params, state = start(model)
    (_, grads), whole = jax.jit(fs.value_and_grad(loss_of(model)))(params, state, (X, Y))
    (_, parts_grads), parts = jax.jit(fs.value_and_grad(loss_of(model), microbatches=count))(params, state, (X, Y))
    assert amax(parts) == amax(whole)
    assert all(value > 0 for value in amax(whole).values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.2, atol=0.02), parts_grads, grads)


@KINDS
def test_devices_see_the_amax_of_the_whole_batch(kind: Any) -> None:
    model = Net()
    _, params, state = start(model)
    _, whole = jax.jit(fs.value_and_grad(loss_of(model)))(params, state, (X, Y))
    mesh = line(kind)
    per_device = fs.with_optimizer(loss_of(model), TX, axis_name="data")
    step = jax.shard_map(per_device, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    carry = fs.init_carry(params, state, TX, sharding=NamedSharding(mesh, P()))
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    synced, _ = jax.jit(step)(carry, batch)
    assert amax(synced.state) == amax(whole)
    if kind is AxisType.Auto:  # the gradient of Flax's fp8 layers names no out_sharding, as Explicit axes ask for
        split, _ = fs.jit_step(fs.with_optimizer(loss_of(model), TX), like=carry, donate=False)(carry, batch)
        assert amax(split.state) == amax(whole)


def test_a_collection_of_another_name() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        return (params["w"] * batch).sum() + state["fp8_metas"]["scale"] * 3.0, state

    state = {"fp8_metas": {"scale": jnp.float32(1)}}
    grad_fn = fs.value_and_grad(loss_fn, overwrite="fp8_metas")
    (_, grads), new_state = grad_fn({"w": jnp.ones(2)}, state, jnp.ones(2))
    assert float(new_state["fp8_metas"]["scale"]) == 3.0
    assert grads.keys() == {"w"}
    _, untouched = fs.value_and_grad(loss_fn)({"w": jnp.ones(2)}, state, jnp.ones(2))
    assert float(untouched["fp8_metas"]["scale"]) == 1.0


class Block(nn.Module):
    """One layer of many."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps `[batch, 16]` to `[batch, 16]`."""
        return nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x), None


class Deep(nn.Module):
    """Layers under `nn.scan`, whose scales have a leading axis."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, 16]` to `[batch, 16]`."""
        axes: Any = {"params": 0, NAME: 0}
        layers: Any = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        out: jax.Array = layers()(x, None)[0]
        return out


@pytest.mark.parametrize("count", [1, 2])
def test_layers_under_scan_have_scales_each(count: int) -> None:
    model: Any = Deep()
    params, state = fs.split_params(model.init(jax.random.key(2), X))
    carry = fs.init_carry(params, state, TX)
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_of(model), TX, microbatches=count)))
    for _ in range(2):
        carry, _ = step(carry, (X, Y))
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry.state):
        assert leaf.shape[0] == 3
        if "input_amax" in jax.tree_util.keystr(path):
            assert len({float(each) for each in leaf.max(1)}) == 3  # each layer saw other inputs


@pytest.mark.parametrize("kind", ["Fp8DirectDotGeneralOp", "NANOOFp8DotGeneralOp", "Fp8Einsum"])
def test_every_fp8_layer_of_flax(kind: str) -> None:
    if not hasattr(nn, kind):
        pytest.skip(f"this Flax has no {kind}")

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            if kind != "Fp8Einsum":
                return nn.Dense(16, dot_general_cls=getattr(nn, kind))(x)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (16, 16))
            result: jax.Array = getattr(nn, kind)()("ab,bc->ac", x, kernel)
            return result

    model: Any = Layer()
    params, state = fs.split_params(model.init(jax.random.key(2), X))
    step = fs.jit_step(fs.assert_max_traces(fs.with_optimizer(loss_of(model), TX)), donate=False)
    carry, _ = step(fs.init_carry(params, state, TX), (X, Y))
    (_, grads), _ = jax.jit(fs.value_and_grad(loss_of(model)))(params, state, (X, Y))
    jax.tree.map(lambda grad, param: None, grads, params)  # one structure, or it raises
    assert all(leaf[0] > 0 for leaf in jax.tree.leaves(carry.state[NAME]) if leaf.size > 1)


def test_a_poisoned_batch_leaves_the_scales() -> None:
    model = Net()
    _, params, state = start(model)
    step = fs.jit_step(fs.skip_nonfinite(fs.with_optimizer(loss_of(model), TX)), donate=False)
    carry, _ = step(fs.init_carry(params, state, TX), (X, Y))
    poisoned, loss = step(carry, (X.at[0, 0].set(jnp.nan), Y))
    assert jnp.isnan(loss)
    assert_equal(poisoned.state, carry.state)
    assert_equal(step(poisoned, (X, Y))[0].state, step(carry, (X, Y))[0].state)


def test_a_step_that_does_not_overwrite_is_told() -> None:
    model = Net()
    _, params, state = start(model)
    carry = fs.init_carry(params, state, TX)

    def by_hand(carry: fs.Carry, batch: Any) -> Any:
        (loss, state), grads = jax.value_and_grad(loss_of(model), has_aux=True)(carry.params, carry.state, batch)
        return fs.apply_gradients(TX, carry, grads, state), loss

    with pytest.warns(fs.UntouchedStateWarning) as told:
        jax.eval_shape(by_hand, carry, (X, Y))
    (warning,) = [cast(Any, each.message) for each in told]
    assert str(warning) == textwrap.dedent("""
        apply_gradients(tx, carry, grads, new_state): fp8 scales must be overwritten by their gradient at each update
          got:
            state['_overwrite_with_gradient']: stays as it is
          likely cause: jax.value_and_grad differentiated the params alone, so the scales stay as they were made
          fix: (loss, grads), state = value_and_grad(loss_fn)(carry.params, carry.state, batch)
    """).strip()
    scope: Any = {"value_and_grad": fs.value_and_grad, "loss_fn": loss_of(model), "carry": carry, "batch": (X, Y)}
    exec(warning.fix, scope)  # noqa: S102
    fs.apply_gradients(TX, carry, scope["grads"], scope["state"])  # silent


def test_scales_of_each_example_are_refused_with_the_line_that_joins_them() -> None:
    model = Net()
    _, params, state = start(model)

    def loss_fn(params: Any, state: Any, x: Any) -> Any:
        return loss_of(model)(params, state, (x[None], x[None]))

    with pytest.raises(fs.UnsyncedStateError) as caught:
        fs.vmap_stateful(fs.value_and_grad(loss_fn))(params, state, X)
    assert caught.value.cause.startswith("each lane has fp8 scales of its own, in Dense_0/Fp8DirectDotGeneralOp_0")
    assert caught.value.fix == (
        "state_axes={'_overwrite_with_gradient': 0} and a state with that axis; "
        "to join them, jax.tree.map(lambda leaf: leaf.max(0), new_state['_overwrite_with_gradient'])"
    )
    wide = {NAME: jax.tree.map(lambda leaf: jnp.stack([leaf] * len(X)), state[NAME])}
    (_, grads), new_state = fs.vmap_stateful(fs.value_and_grad(loss_fn), state_axes={NAME: 0})(params, wide, X)
    assert jax.tree.leaves(grads)[0].shape[0] == len(X)
    joined = jax.tree.map(lambda leaf: leaf.max(0), new_state[NAME])
    whole = fs.value_and_grad(lambda p, s, b: loss_of(model)(p, s, (b, b)))(params, state, X)[1]
    assert amax({NAME: joined}) == pytest.approx(amax(whole))


def test_a_bridged_nnx_module_keeps_its_scales_in_the_state() -> None:
    module: Any = nnx.bridge.ToNNX(Net(), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(module, X)
    fn, params, state = fs.from_nnx(module)
    assert NAME in state

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        out, state = fn(params, state, batch[0])
        return ((out - batch[1]) ** 2).mean(), state

    carry = fs.init_carry(params, state, TX)
    carry, _ = fs.jit_step(fs.with_optimizer(loss_fn, TX))(carry, (X, Y))
    assert all(value > 0 for value in amax(carry.state).values())


def test_evaluation_reads_the_collection() -> None:
    model = Net()
    _, params, state = start(model)
    out, same = fs.with_mutable(model, mutable=False)(params, state, X)
    assert out.shape == Y.shape
    assert_equal(same[NAME], state[NAME])


# What others did: each computes something else than Flax, and cannot be written with value_and_grad


def by_mistake(mistake: str) -> Any:
    """Two steps over two microbatches."""
    model = Net()
    start_, _, _ = start(model)
    learned = start_.params
    clipped = mistake == "clipped"

    def part(learned: Any, i: int) -> Any:
        return jax.grad(lambda v: ((model.apply(v, X[i::2]) - Y[i::2]) ** 2).mean())(learned)

    @jax.jit
    def step(learned: Any, opt_state: Any) -> tuple[Any, Any]:
        first, last = part(learned, 0), part(learned, 1)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, last)
        seen = (mean, learned) if clipped else (mean["params"], learned["params"])
        updates, opt_state = TX.update(seen[0], opt_state, seen[1])
        updated = optax.apply_updates(seen[1], updates)
        scales = {
            "none": jax.tree.map(jnp.maximum, first[NAME], last[NAME]),
            "averaged": mean[NAME],
            "the last one": last[NAME],
            "the old one": learned[NAME],
        }
        return updated if clipped else {"params": updated, NAME: scales[mistake]}, opt_state

    opt_state = TX.init(learned if clipped else learned["params"])
    for _ in range(2):
        learned, opt_state = step(learned, opt_state)
    return learned


@pytest.mark.parametrize("mistake", ["none", "clipped", "averaged", "the last one", "the old one"])
def test_the_mistakes_of_others_give_other_scales(mistake: str) -> None:
    model = Net()
    _, params, state = start(model)
    carry = fs.init_carry(params, state, TX)
    step = fs.jit_step(fs.with_optimizer(loss_of(model), TX, microbatches=2))
    for _ in range(2):
        carry, _ = step(carry, (X, Y))
    wrong = by_mistake(mistake)[NAME]
    equal = all(
        np.allclose(a, b, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(carry.state[NAME]), jax.tree.leaves(wrong), strict=True)
    )
    assert equal == (mistake == "none")
